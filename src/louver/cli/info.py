"""``louver info``: what this machine has, and what Louver makes of it."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from louver.cli.console import console, reports_errors
from louver.experiments.rows import machine, write_rows
from louver.files import check_writable
from louver.kernels import available_backends
from louver.kernels.cpu import native


@reports_errors
def info(json: Annotated[Path | None, typer.Option(help="Also write it to this file.")] = None) -> None:
    """Show versions, devices and the cache folder."""
    check_writable(json)
    facts = machine(seed=None)
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if isinstance(value, dict):
            for key, version in value.items():
                table.add_row(key, str(version), style="dim" if version is None else None)
        elif name != "command":
            table.add_row(name, str(value))
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        table.add_row(f"backends, {device}", ", ".join(available_backends(device)))
    table.add_row("cpu kernels", _cpu_kernels())
    console.print(table)
    if json is not None:
        write_rows(json, [], seed=None)


def _cpu_kernels() -> str:
    """The instruction sets the compiled kernels can use here, or how to get compiled kernels."""
    if native.available():
        return ", ".join(native.load().instruction_sets())
    return f"not built ({native.reason}); {native.HOW_TO_BUILD}"
