"""``louver demo``: one long document, one question, with and without Louver, everything checked."""

from pathlib import Path
from typing import Annotated

import typer

from louver.cli.console import Stages, console, errors, reports_errors
from louver.cli.defaults import INDEX_HELP, POLICY_HELP, default_policy
from louver.cli.demo_report import report
from louver.experiments.demo import Config, run
from louver.experiments.document import QUESTION
from louver.experiments.plots import attention_png
from louver.experiments.rows import write_bytes, write_rows
from louver.files import check_writable


@reports_errors
def demo(
    model: Annotated[str | None, typer.Option(help="A folder or hub name. Default: a 135M model, offline.")] = None,
    document: Annotated[Path | None, typer.Option(help="A text file. Default: Python's own help topics.")] = None,
    question: Annotated[str, typer.Option(help="Asked about the document.")] = QUESTION,
    policy: Annotated[str | None, typer.Option(help=POLICY_HELP)] = None,
    index: Annotated[str, typer.Option(help=INDEX_HELP)] = "sketch",
    tokens: Annotated[int, typer.Option(min=1, help="Cut the document to this many tokens.")] = 6000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Decode this many tokens, each way.")] = 32,
    backend: Annotated[str, typer.Option(help="Which kernels; auto is the fastest here.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for demo.json and attention.png.")] = Path("louver-demo"),
    json: Annotated[Path | None, typer.Option(help="Write the rows here instead of OUT/demo.json.")] = None,
) -> None:
    """Decode the answer to a question about a long document, densely and through Louver, and compare."""
    config = Config(
        model=model,
        document=document,
        question=question,
        policy=policy or default_policy(index),
        index=index,
        document_tokens=tokens,
        max_new_tokens=max_new_tokens,
        backend=backend,
    )
    rows_path, picture_path = json or out / "demo.json", out / "attention.png"
    check_writable(rows_path, picture_path)
    with Stages() as stages:
        result = run(config, stages, say=lambda line: errors.print(line, style="dim"))
    more = {
        "rows_per_layer": result.rows_per_layer,
        "rows_per_step": result.rows_per_step,
        "texts": result.texts,
        "picture": result.picture,
    }
    image = attention_png(result.rows[-1], result.texts, result.picture, result.rows_per_step)
    write_rows(rows_path, result.rows, seed=None, **more)
    write_bytes(picture_path, image)
    console.print(report(result))
    console.print(f"\nWrote {rows_path} and {picture_path}", style="dim")
