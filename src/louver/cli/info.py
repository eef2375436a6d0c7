"""``louver info``: what this machine has, and what Louver makes of it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from louver.cli.console import console, reports_errors
from louver.experiments.rows import machine, write_rows


@reports_errors
def info(json: Annotated[Path | None, typer.Option(help="Also write it to this file.")] = None) -> None:
    """Show versions, devices and the cache folder."""
    facts = machine(seed=None)
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if isinstance(value, dict):
            for key, version in value.items():
                table.add_row(key, str(version), style="dim" if version is None else None)
        elif name != "command":
            table.add_row(name, str(value))
    console.print(table)
    if json is not None:
        write_rows(json, [], seed=None)
