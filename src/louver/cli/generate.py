"""``louver generate``: stream a model's answer to a file, decoded through Louver."""

from pathlib import Path
from typing import Annotated

import typer

from louver.cli.console import Stages, console, errors, reports_errors
from louver.cli.defaults import INDEX_HELP, POLICY_HELP, default_policy
from louver.errors import InputFileError
from louver.experiments.generation import Config, run
from louver.experiments.rows import write_rows
from louver.files import check_writable


@reports_errors
def generate(
    model: Annotated[str, typer.Argument(help='A folder, a name on the model hub, or "demo".')],
    prompt_file: Annotated[Path, typer.Option(help="The text to read.")],
    question: Annotated[str | None, typer.Option(help="Put under the text.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Go through the model's chat template.")] = False,
    policy: Annotated[str | None, typer.Option(help=POLICY_HELP)] = None,
    index: Annotated[str, typer.Option(help=INDEX_HELP)] = "sketch",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    backend: Annotated[str, typer.Option(help="Which kernels; auto is the fastest here.")] = "auto",
    store: Annotated[
        str, typer.Option(help="Where exact keys and values live: device, host (RAM) or disk (mapped files).")
    ] = "device",
    store_path: Annotated[Path | None, typer.Option(help="Of the store disk: a folder for its files.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Generate greedily from a file through Louver; then say how fast, how much was read and what is certified."""
    check_writable(json)
    if store == "disk" and store_path is None:
        raise InputFileError("--store disk needs --store-path, the folder its working files are to live in")
    config = Config(
        model=model,
        prompt_file=prompt_file,
        question=question,
        chat=chat,
        policy=policy or default_policy(index),
        index=index,
        max_new_tokens=max_new_tokens,
        backend=backend,
        store=store,
        store_path=store_path,
    )
    stages = Stages()

    def show(text: str) -> None:
        stages.stop()  # the bar of the prefill would be in the text's way
        console.print(text, end="", markup=False, soft_wrap=True)

    with stages:
        (row,) = run(config, show, stages)
    console.print()
    if json is not None:
        write_rows(json, [row], seed=None)
    errors.print(
        f"\n{row['num_tokens']} tokens at {row['tokens_per_s']:.1f} tokens/s after reading {row['kv_len']:,} in "
        f"{row['prefill_s']:.1f} s  ·  {row['policy']} saved {1 - row['bytes_fraction']:.0%} of the bytes dense attention reads "
        f"({row['exact_fraction']:.1%} of the keys exact)  ·  {_certificate(row)}  ·  {_memory(row)}",
        style="dim",
    )


def _certificate(row: dict) -> str:
    if row["guarantee"] == "certified":
        mean, worst = row["output_error_bound"], row["output_error_bound_worst"]
        return f"certified relative output error {mean:.2g} mean, {worst:.2g} worst"
    return f"certified dropped mass {row['dropped_mass_bound']:.2%} mean"


def _memory(row: dict) -> str:
    places = (("gpu", "on the GPU"), ("host", "in RAM"), ("disk", "on disk"))
    held = [f"{row[f'{place}_bytes'] / 2**20:,.0f} MiB {where}" for place, where in places if row[f"{place}_bytes"]]
    return f"{', '.join(held)}, the index {row['index_memory_fraction']:.0%} of keys and values"
