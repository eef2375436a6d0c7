"""``louver capture``: keep what a model's attention sees, for the experiments."""

from pathlib import Path
from typing import Annotated

import typer

from louver.cli.console import Stages, console, errors, reports_errors
from louver.cli.lists import split_list
from louver.experiments.capture import Config, run
from louver.files import check_writable


@reports_errors
def capture(
    model: Annotated[str | None, typer.Argument(help="A folder or hub name. Default: a 135M model, offline.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file. Default: Python's own help topics.")] = None,
    layers: Annotated[str | None, typer.Option(help='Layers, as 0,5,10, or "all". Default: eight of them.')] = None,
    num_queries: Annotated[int, typer.Option(min=32, help="Queries kept, at the last positions.")] = 512,
    tokens: Annotated[int, typer.Option(min=64, help="Cut the text to this many tokens.")] = 8192,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("capture.safetensors"),
) -> None:
    """Run a text through a model once and keep queries, keys and values of some layers."""
    check_writable(out)
    config = Config(
        model=model,
        prompt_file=prompt_file,
        layers=None if layers in (None, "all") else split_list("--layers", layers, int),
        every_layer=layers == "all",
        num_queries=num_queries,
        max_tokens=tokens,
    )
    with Stages() as stages:
        captured = run(config, stages, say=lambda line: errors.print(line, style="dim"))
    captured.save(out)
    shape = captured.shape_fields()
    console.print(
        f"Wrote {out}: {shape['data']}, {shape['kv_len']:,} tokens, layers {', '.join(map(str, captured.layers))}; "
        f"{len(captured.query_positions)} queries of {shape['num_q_heads']} heads on {shape['num_kv_heads']} KV heads",
        soft_wrap=True,
    )
