"""``louver tune``: which policy for which head of my model?"""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from louver.cli.console import Stages, console, reports_errors
from louver.cli.lists import split_list
from louver.experiments.rows import write_rows
from louver.experiments.tuning import LADDER, MEASURES, SCOPES, Config, Tuning, run
from louver.files import check_writable


@reports_errors
def tune(
    model: Annotated[str | None, typer.Argument(help="A folder or hub name. Default: a 135M model, offline.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A text like yours. Default: Python's own help topics.")
    ] = None,
    target_error: Annotated[float, typer.Option(help="What the measure may be on the held-out tokens.")] = 1e-3,
    measure: Annotated[
        str, typer.Option(help="kl: nats from dense attention; top1: share of other tokens.")
    ] = MEASURES[0],
    ladder: Annotated[str, typer.Option(help="Policies to choose from. Default: a grid of exact:F+unread:M.")] = "",
    scope: Annotated[str, typer.Option(help="Who chooses: head, or layer (any policy; fused on a GPU).")] = SCOPES[0],
    project: Annotated[bool, typer.Option(help="Weigh errors by what they move the layer's output by.")] = True,
    tokens: Annotated[int, typer.Option(help="Cut the text here: tune at the length you serve.")] = 4096,
    held_out: Annotated[int, typer.Option(help="Tokens at the text's end to judge by.")] = 128,
    backend: Annotated[str, typer.Option(help="Which kernels; auto is the fastest here.")] = "auto",
    json: Annotated[Path, typer.Option(help="Write the policies to this file.")] = Path("louver-tuning.json"),
) -> None:
    """Find the policy per head that meets a target on the model's own predictions, at the least bytes.

    Use the result with attach(model, tuning="louver-tuning.json") or LouverCache.from_tuning.
    """
    check_writable(json)
    config = Config(
        model=model,
        prompt_file=prompt_file,
        target_error=target_error,
        measure=measure,
        ladder=split_list("--ladder", ladder, str) if ladder else LADDER,
        scope=scope,
        project=project,
        max_tokens=tokens,
        held_out=held_out,
        backend=backend,
    )
    with Stages() as stages:
        found = run(config, stages)
    write_rows(
        json, found.rows, seed=None, policies=found.policies, num_layers=found.num_layers,
        measure=measure, target_error=target_error,
    )  # fmt: skip
    console.print(table(found))
    console.print(f"\nWrote {json}", style="dim")


def table(found: Tuning) -> Table:
    """Every choice that was judged; the last was taken."""
    shown = Table(title="Policies for all layers alike, and for each", title_justify="left", box=None)
    for name in ("", "policy"):
        shown.add_column(name)
    for name in ("bytes / dense", "KL, nats", "same token"):
        shown.add_column(name, justify="right")
    for row in found.rows:
        figures = (f"{row['bytes_fraction']:.3f}", f"{row['kl_nats']:.1e}", f"{row['top1_agreement']:.1%}")
        shown.add_row(row["stage"], row["policy"] or f"{row['num_policies']} policies", *figures)
    return shown
