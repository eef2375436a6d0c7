"""``louver report``: one page from a folder of result rows."""

from pathlib import Path
from typing import Annotated

import typer

from louver.cli.console import console, reports_errors
from louver.experiments.report import build
from louver.experiments.rows import write_text
from louver.files import check_writable


@reports_errors
def report(
    folder: Annotated[Path, typer.Argument(help="Row files, as `louver experiment NAME --json` writes them.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Put claims, findings, pictures and tables of every experiment on one page that needs no network."""
    check_writable(out)
    page = build(folder)
    write_text(out, page)
    console.print(f"Wrote {out} ({len(page) / 2**20:.1f} MiB)", style="dim")
