"""The command line: ``louver info | demo | generate``. Glue only; the work is done in the layers below."""

from louver.cli.app import app, main

__all__ = ["app", "main"]
