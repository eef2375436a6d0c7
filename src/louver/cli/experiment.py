"""``louver experiment``: what each bound, and each policy, is worth on a capture of a real model."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from louver.cli.console import Stages, console, reports_errors
from louver.cli.lists import split_list
from louver.experiments import precision as precisions
from louver.experiments import pruning as prunings
from louver.experiments.charts import can_draw, combination, facts, label, precision_png, pruning_png
from louver.experiments.codecs import CODECS
from louver.experiments.rows import write_bytes, write_rows

experiment = typer.Typer(help="Measure bounds and policies on a capture (see `louver capture`).", no_args_is_help=True)

CaptureFile = Annotated[Path, typer.Option(help="What `louver capture` wrote.")]
Json = Annotated[Path | None, typer.Option(help="Write the rows to this file.")]
PerLayer = Annotated[bool, typer.Option("--per-layer", help="Add rows_per_layer to the file.")]
Defaults = prunings.Config(capture=Path())


def _list(values: tuple[Any, ...]) -> str:
    return ",".join(f"{x:g}" if isinstance(x, float) else str(x) for x in values)


@experiment.command()
@reports_errors
def pruning(
    capture: CaptureFile,
    targets: Annotated[str, typer.Option(help="Keys to find: a number, or a share below 1.")] = _list(Defaults.targets),
    index: Annotated[str, typer.Option(help="ball, box (16 consecutive keys), sketch.")] = _list(Defaults.index),
    rule: Annotated[str, typer.Option(help="Of ball: sum, ta, and, oracle-and.")] = _list(Defaults.rule),
    subspaces: Annotated[str, typer.Option(help="Of ball.")] = _list(Defaults.subspaces),
    group_len: Annotated[str, typer.Option(help="Of ball: keys per group.")] = _list(Defaults.group_len),
    grouping: Annotated[str, typer.Option(help="Of ball: kcenter, consecutive, kmeans.")] = _list(Defaults.grouping),
    center: Annotated[str, typer.Option(help="Of ball: mean, key.")] = _list(Defaults.center),
    slicing: Annotated[str, typer.Option(help="Of ball: contiguous, interleaved, random, rotated.")] = "contiguous",
    codec: Annotated[str, typer.Option(help=f"Of sketch: sketch, {', '.join(CODECS)}.")] = _list(Defaults.codec),
    planes: Annotated[str, typer.Option(help="Of sketch: bits read in one plane or two.")] = _list(Defaults.planes),
    metric: Annotated[str, typer.Option(help="Of sketch: frame, diagonal, identity, full.")] = _list(Defaults.metric),
    json: Json = None,
    per_layer: PerLayer = False,
    plot: Annotated[Path, typer.Option(help="The picture to write.")] = Path("louver-pruning.png"),
) -> None:
    """How many keys each bound leaves to be read, and what that costs: a row per combination of the lists given."""
    config = prunings.Config(
        capture=capture,
        targets=split_list("--targets", targets, float),
        index=split_list("--index", index, str),
        rule=split_list("--rule", rule, str),
        subspaces=split_list("--subspaces", subspaces, int),
        group_len=split_list("--group-len", group_len, int),
        grouping=split_list("--grouping", grouping, str),
        center=split_list("--center", center, str),
        slicing=split_list("--slicing", slicing, str),
        codec=split_list("--codec", codec, str),
        planes=split_list("--planes", planes, int),
        metric=split_list("--metric", metric, str),
    )
    with Stages() as stages:
        rows, layer_rows = prunings.run(config, stages)
    _write(json, rows, layer_rows if per_layer else None)
    console.print(pruning_table(rows))
    _draw(plot, pruning_png, rows)


@experiment.command()
@reports_errors
def precision(
    capture: CaptureFile,
    policies: Annotated[str, typer.Option(help="Policies, and drop:F, fp8, kivi4.")] = precisions.POLICIES,
    backend: Annotated[str, typer.Option(help="Which kernels; auto is the fastest here.")] = "auto",
    json: Json = None,
    per_layer: PerLayer = False,
    plot: Annotated[Path, typer.Option(help="The picture to write.")] = Path("louver-precision.png"),
) -> None:
    """How far the attention output is off, against the bytes a step reads: a row per policy."""
    named = policies != precisions.POLICIES
    config = precisions.Config(
        capture=capture,
        policies=split_list("--policies", policies, str),
        backend=backend,
        optional=() if named else precisions.Config(capture=capture).optional,
    )
    with Stages() as stages:
        rows, layer_rows = precisions.run(config, stages)
    _write(json, rows, layer_rows if per_layer else None)
    console.print(precision_table(rows))
    _draw(plot, precision_png, rows)


def pruning_table(rows: list[dict[str, Any]]) -> Table:
    """A line per combination; per target the share scanned for one head, and the bytes read."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    table = Table(title=f"Keys scanned, bytes read / dense   ({facts(rows[0])})", title_justify="left", box=None)
    table.add_column("bound", no_wrap=True)
    for target in targets:
        table.add_column(f"k = {label(target)}", justify="right")
    table.add_column("lost", justify="right")
    table.add_column("guarantee")
    for name in dict.fromkeys(combination(row) for row in rows):
        mine = [row for row in rows if combination(row) == name]
        cells = [f"{row['scanned_fraction']:6.1%}  {row['bytes_fraction']:.3f}" for row in mine]
        lost = sum(row["num_false_negatives"] for row in mine)
        table.add_row(name, *cells, f"{lost:,}", mine[0]["guarantee"])
    return table


def precision_table(rows: list[dict[str, Any]]) -> Table:
    """A line per policy."""
    table = Table(title=f"Error of the attention output   ({facts(rows[0])})", title_justify="left", box=None)
    table.add_column("policy", no_wrap=True)
    for name in ("bytes / dense", "mean error", "p99", "median bound", "violations"):
        table.add_column(name, justify="right")
    table.add_column("guarantee")
    for row in rows:
        bound, violations = row["output_error_bound_median"], row["num_bound_violations"]
        table.add_row(
            row["policy"],
            f"{row['bytes_fraction']:.3f}",
            f"{row['output_error']:.2%}",
            f"{row['output_error_p99']:.2%}",
            "" if bound is None else f"{bound:.2g}",
            "" if violations is None else f"{violations}",
            row["guarantee"],
        )
    return table


def _write(path: Path | None, rows: list[dict[str, Any]], layer_rows: list[dict[str, Any]] | None) -> None:
    if path is None:
        return
    if layer_rows is None:
        write_rows(path, rows, seed=0)
    else:
        write_rows(path, rows, seed=0, rows_per_layer=layer_rows)


def _draw(path: Path, draw: Any, *rows: Any) -> None:
    if not can_draw():
        console.print("No picture: matplotlib is not installed.", style="dim")
        return
    write_bytes(path, draw(*rows))
    console.print(f"\nWrote {path}", style="dim")
