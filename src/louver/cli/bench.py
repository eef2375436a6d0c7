"""``louver bench``: what a decode step's attention costs here, beside every dense way of doing it."""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from louver.cli.console import Stages, console, reports_errors
from louver.cli.lists import split_list
from louver.errors import InputFileError
from louver.experiments import bench_gpu, bench_prompt
from louver.experiments.bench import Config, run
from louver.experiments.bench_charts import charts
from louver.experiments.charts import can_draw, chart_png
from louver.experiments.rows import Row, write_bytes, write_rows
from louver.files import check_writable


@reports_errors
def bench(
    kv_lens: Annotated[str, typer.Option(help="Keys in the cache, separated by commas.")] = "2048,8192,40000",
    shape: Annotated[str, typer.Option(help="num_q_heads,num_kv_heads,head_dim")] = "32,8,128",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "bfloat16",
    policy: Annotated[str, typer.Option(help="Policies, separated by commas.")] = "topk:20,budget:0.01,exact:0.01",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    backend: Annotated[str, typer.Option(help="Which kernels; auto is the fastest here.")] = "auto",
    repetitions: Annotated[int, typer.Option(min=1, help="Times each way is called, in turn.")] = 31,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 0,
    capture: Annotated[
        Path | None,
        typer.Option(help="Measure on the layers of this capture (louver capture), at its length and shape."),
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(min=1, help="Instead: what encoding adds to a prompt of this many tokens of the demo's model."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw time against length, and against keys selected, into this folder.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """Time policies beside torch's attention and Louver's own dense kernel, in turn, and check every step in float64."""
    check_writable(json, None if plot is None else plot / "bench_.png")
    if device not in ("cpu", "cuda"):
        raise InputFileError(f"--device {device}: wanted cpu or cuda")
    sizes = split_list("--shape", shape, int)
    if len(sizes) != 3:
        raise InputFileError(f"--shape {shape}: wanted num_q_heads,num_kv_heads,head_dim")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise InputFileError("--device cuda: torch sees no CUDA device here")
        q_heads, kv_heads, head_dim = map(str, sizes)
        arguments = ["--kv-lens", kv_lens, "--policies", policy, "--dtype", dtype, "--repetitions", str(repetitions)]
        arguments += ["--num-q-heads", q_heads, "--num-kv-heads", kv_heads, "--head-dim", head_dim, "--seed", str(seed)]
        bench_gpu.main(arguments + ([] if json is None else ["--json", str(json)]))
        return
    if prompt is not None:
        _prompt(prompt, split_list("--policy", policy, str), backend, json)
        return
    config = Config(
        kv_lens=split_list("--kv-lens", kv_lens, int),
        shape=(sizes[0], sizes[1], sizes[2]),
        dtype=dtype,
        policies=split_list("--policy", policy, str),
        repetitions=repetitions,
        seed=seed,
        backend=backend,
        capture=capture,
    )
    if plot is not None and not can_draw():
        raise InputFileError("--plot needs matplotlib: pip install 'louver[plots]'")
    with Stages() as stages:
        rows = list(run(config, lambda done, total: stages("Measuring", done, total)))
    if json is not None:
        write_rows(json, rows, seed=seed, device="cpu")
    console.print(report(rows))
    for name, chart in {} if plot is None else charts(rows).items():
        assert plot is not None
        path = plot / f"bench_{name}.png"
        write_bytes(path, chart_png(chart, rows))
        console.print(f"wrote {path}")


def _prompt(num_tokens: int, policies: tuple[str, ...], backend: str, json: Path | None) -> None:
    with Stages() as stages:
        rows = list(bench_prompt.run(num_tokens, policies, backend, partial(stages, "Reading the prompt")))
    if json is not None:
        write_rows(json, rows, seed=None, device="cpu")
    for row in rows:
        console.print(
            f"{row['policy']}: {row['kv_len']:,} tokens, {row['num_layers']} layers: prefill {row['prefill_ms'] / 1e3:.1f} s, "
            f"encoding {row['encode_ms'] / 1e3:.2f} s, {row['encode_share']:.1%} of it"
        )


def report(rows: list[Row]) -> Table:
    """A line per length and way."""
    table = Table(box=None)
    for name in ("keys", "way"):
        table.add_column(name)
    for name in ("ms", "p20-p80", "vs torch", "vs dense", "bytes", "index", "recall", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["kv_len"]),
            row["policy"],
            f"{row['latency_us'] / 1e3:.3f}",
            f"{row['latency_us_p20'] / 1e3:.3f}-{row['latency_us_p80'] / 1e3:.3f}",
            f"{row['speedup_vs_best_torch']:.2f}x",
            f"{row['speedup_vs_dense']:.2f}x",
            f"{row['bytes_fraction']:.3f}",
            f"{row['index_memory_fraction']:.0%}" if "index_memory_fraction" in row else "",
            f"{row['recall']:.4f}" if "recall" in row else "",
            f"{row['output_error']:.2%}" if "output_error" in row else "",
        )
    return table
