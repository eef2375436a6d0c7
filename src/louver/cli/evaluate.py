"""``louver eval``: benchmarks of lm-evaluation-harness, decoded through Louver."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from louver.cli.console import console, reports_errors
from louver.cli.lists import split_list
from louver.experiments.evaluation import Config, run
from louver.experiments.rows import Row, write_rows
from louver.files import check_writable
from louver.policies import DEFAULT_POLICY


@reports_errors
def evaluate(
    model: Annotated[str, typer.Argument(help='A folder, a name on the model hub, or "demo".')],
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lm-evaluation-harness, separated by commas.")],
    policy: Annotated[
        str, typer.Option(help="Policies or other methods (quest:0.1, fp8), separated by commas.")
    ] = f"dense,{DEFAULT_POLICY}",
    limit: Annotated[float | None, typer.Option(help="Samples per task, or a share of them below 1.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question. Default: the task's.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder with task files of your own.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Go through the model's chat template.")] = False,
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and answer. Default: the model's.")] = None,
    gen_kwargs: Annotated[str | None, typer.Option(help="Such as max_gen_toks=1024,do_sample=false.")] = None,
    metadata: Annotated[str | None, typer.Option(help="JSON for the tasks, such as RULER's max_seq_lengths.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 1,
    backend: Annotated[str, typer.Option(help="Which kernels; auto is the fastest here.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the few-shot examples.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """Answer a benchmark with every decode step through a policy, beside dense attention."""
    check_writable(json)
    config = Config(
        model=model,
        tasks=split_list("--tasks", tasks, str),
        policies=split_list("--policy", policy, str),
        limit=limit,
        num_fewshot=num_fewshot,
        include_path=include_path,
        chat=chat,
        max_length=max_length,
        gen_kwargs=gen_kwargs,
        metadata=metadata,
        batch_size=batch_size,
        backend=backend,
        seed=seed,
    )
    rows = run(config)
    if json is not None:
        write_rows(json, rows, seed=seed)
    console.print(table(rows))


def table(rows: Sequence[Row]) -> Table:
    """A line per task, metric and method."""
    shown = Table(box=None, caption="±: 1.96 standard errors; bytes read over dense attention's; keys attended exactly")
    shown.caption_justify = "left"
    for name in ("task", "metric", "method"):
        shown.add_column(name, no_wrap=True)
    for name in ("score", "±", "samples", "bytes", "exact"):
        shown.add_column(name, justify="right")
    for row in rows:
        reach = "–" if row["score_low"] is None else f"{row['score'] - row['score_low']:.3f}"
        samples = "–" if row["num_samples"] is None else f"{row['num_samples']:,}"
        figures = (
            f"{row['score']:.3f}",
            reach,
            samples,
            f"{row['bytes_fraction']:.3f}",
            f"{row['exact_fraction']:.1%}",
        )
        shown.add_row(row["task"], row["metric"], row["policy"], *figures)
    return shown
