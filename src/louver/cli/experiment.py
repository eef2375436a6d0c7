"""``louver experiment``: a command per experiment of the catalog, its options read off the fields of its Config."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from louver.cli.console import Stages, console, reports_errors
from louver.cli.experiment_all import run_all
from louver.cli.lists import split_list
from louver.experiments.catalog import experiments
from louver.experiments.charts import can_draw, chart_png, facts
from louver.experiments.experiment import Experiment
from louver.experiments.journal import Journal
from louver.experiments.rows import write_bytes, write_rows
from louver.files import check_writable

experiment = typer.Typer(help="Measure bounds, policies and baselines on a real model.", no_args_is_help=True)

WIDEST_TABLE = 200

Json = Annotated[
    Path | None, typer.Option(help="Write the rows to this file; what a long run has so far is beside it.")
]
PerLayer = Annotated[bool, typer.Option("--per-layer", help="Add rows_per_layer to the file.")]
Plot = Annotated[Path, typer.Option(help="The picture to write; a number is added to its name for a second one.")]


def command_of(described: Experiment) -> Any:
    """The function that typer makes a command of; its signature is the Config's options, --json, --per-layer and --plot."""
    options = {f.name: f for f in dataclasses.fields(described.config) if "help" in f.metadata}
    hints = typing.get_type_hints(described.config)

    @reports_errors
    def command(json: Path | None, per_layer: bool, plot: Path, **given: Any) -> None:
        check_writable(json, plot)
        read = {name: _read(name, value, hints[name]) for name, value in given.items()}
        config = described.config(**read)
        with Stages() as stages:
            rows, more = described.measure(config, stages, journal := Journal.beside(json))
        if json is not None:
            kept = {name: rest for name, rest in more.items() if per_layer or name != "rows_per_layer"}
            write_rows(json, rows, seed=getattr(config, "seed", 0), **kept)
            journal.close()
        print_whole(table_of(described, rows))
        console.print(f"\n{described.finding(rows)}", soft_wrap=True)
        _draw(described, {"rows": rows, **more}, plot)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, keyword, annotation=_annotation(f, hints[name]), default=_default(f))
        for name, f in options.items()
    ]
    shared = (
        ("json", Json, None),
        ("per_layer", PerLayer, False),
        ("plot", Plot, Path(f"louver-{described.name}.png")),
    )
    parameters += [inspect.Parameter(name, keyword, annotation=kind, default=default) for name, kind, default in shared]
    parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)  # required ones first
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = described.summary
    return command


def print_whole(table: Table) -> None:
    """Print a table as wide as it is: a narrow terminal wraps its lines, and a file gets them whole."""
    Console(width=max(console.width, WIDEST_TABLE), highlight=False).print(table)


def table_of(described: Experiment, rows: list[dict[str, Any]]) -> Table:
    """The experiment's table for the terminal."""
    title = f"{described.name.capitalize()}   ({facts(rows[0])})" if rows else described.name
    table = Table(title=title, title_justify="left", box=None)
    for column in described.columns:
        table.add_column(column.heading, justify="right" if column.is_number else "left", no_wrap=not table.columns)
    for cells in described.cells(rows):
        table.add_row(*cells)
    return table


def _annotation(f: dataclasses.Field, hint: Any) -> Any:
    """Lists are text on the command line; everything else is what it is."""
    kind = str if typing.get_origin(hint) is tuple else hint
    return Annotated[kind, typer.Option(help=f.metadata["help"])]


def _default(f: dataclasses.Field) -> Any:
    if f.default is dataclasses.MISSING:
        return inspect.Parameter.empty
    if isinstance(f.default, tuple):
        return ",".join(f"{x:g}" if isinstance(x, float) else str(x) for x in f.default)
    return f.default


def _read(name: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is not tuple or isinstance(value, tuple):
        return value
    return split_list("--" + name.replace("_", "-"), value, typing.get_args(hint)[0])


def _draw(described: Experiment, document: Mapping[str, Any], plot: Path) -> None:
    if not can_draw():
        console.print("No picture: matplotlib is not installed.", style="dim")
        return
    for number, chart in enumerate(described.charts):
        path = plot if not number else plot.with_stem(f"{plot.stem}-{number + 1}")
        write_bytes(path, chart_png(chart, document.get(chart.of, [])))
        console.print(f"Wrote {path}", style="dim")


for _described in experiments().values():
    experiment.command(_described.name)(command_of(_described))
experiment.command("all")(run_all)
