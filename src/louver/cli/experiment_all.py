"""``louver experiment all``: every experiment on one model, and the report."""

from pathlib import Path
from typing import Annotated

import typer

from louver.cli.console import Stages, console, errors, fail, reports_errors
from louver.cli.lists import split_list
from louver.experiments.report import build
from louver.experiments.rows import write_text
from louver.experiments.suite import Config, run
from louver.files import check_writable


@reports_errors
def run_all(
    out: Annotated[Path, typer.Option(help="Folder for the rows and report.html.")] = Path("louver-experiments"),
    model: Annotated[str | None, typer.Option(help="A folder or hub name. Default: a 135M model, offline.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Eight layers, 8,192 tokens, every setting; hours.")] = False,
    only: Annotated[str | None, typer.Option(help="Some of the experiments, separated by commas.")] = None,
) -> None:
    """Run every experiment on one model and write the report; without --full on two layers, in minutes."""
    check_writable(out / "report.html")
    config = Config(out=out, model=model, full=full, only=split_list("--only", only, str) if only else ())
    with Stages() as stages:
        written, failed = run(config, stages, say=lambda line: errors.print(line, style="dim", soft_wrap=True))
    if written:
        write_text(out / "report.html", build(out))
        console.print(f"Wrote {', '.join(path.name for path in written)} and report.html to {out}", soft_wrap=True)
    if failed:
        fail("; ".join(f"{name}: {why}" for name, why in failed.items()))
