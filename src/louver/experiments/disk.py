"""The disk experiment: a cache of gigabytes in memory-mapped files decodes, while the process's own memory stays small.

What counts is RssAnon, memory that the system could not drop and would have to swap: the sketch, torch itself and scratch space. The
mapped cache appears as RssFile, as much of it as there is room for, and can be dropped at any time. Keys come in chunks, as
from a prompt read in parts, so no copy of the cache is ever in memory.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from louver.attention import LouverAttention
from louver.errors import InputFileError
from louver.experiments.bench import DTYPES
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.experiments.offload_rows import timing
from louver.experiments.synthetic import heavy_tailed
from louver.policies import parse

CHUNK_TOKENS = 4096
STATUS = Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to hold. Every field but ``steps`` changes results."""

    gigabytes: float = option(3.0, help="Size of the cache, all layers together.")
    policy: str = option("exact:0.01", help="What a step keeps.")
    dtype: str = option("float32", help="Of the cache: float32, as models on a CPU have it, float16 or bfloat16.")
    layers: int = option(4, help="Layers that share the size.")
    shape: tuple[int, ...] = option((32, 8, 128), help="num_q_heads,num_kv_heads,head_dim")
    folder: Path | None = option(None, help="Of the working files; default: a new one among the temporary files.")
    steps: int = option(8, help="Decode steps.")
    seed: int = option(0, help="Of the data.")

    def __post_init__(self) -> None:
        parse(self.policy)
        if self.dtype not in DTYPES:
            raise InputFileError(f"dtype={self.dtype!r} is unknown; wanted one of {', '.join(DTYPES)}")
        if self.gigabytes <= 0 or self.layers < 1 or self.steps < 1:
            raise InputFileError("gigabytes, layers and steps must be above 0")
        if not STATUS.exists():
            raise InputFileError(f"there is no {STATUS} here, so a process's memory cannot be told apart")


def run(config: Config, on_progress: Progress = no_progress) -> Outcome:
    """One row."""
    num_q_heads, num_kv_heads, head_dim = config.shape
    dtype = DTYPES[config.dtype]
    per_token = 2 * num_kv_heads * head_dim * dtype.itemsize * config.layers
    chunks = max(1, round(config.gigabytes * 1e9 / per_token / CHUNK_TOKENS))
    before = resident()["RssAnon"]
    with tempfile.TemporaryDirectory(prefix="louver-disk-") as temporary:
        room = (chunks * CHUNK_TOKENS) + config.steps
        layers = [
            LouverAttention(config.policy, store="disk", path=config.folder or temporary, reserve_tokens=room)
            for _ in range(config.layers)
        ]
        data = heavy_tailed(
            CHUNK_TOKENS,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            seed=config.seed,
        )
        for chunk in range(chunks):
            # New keys without the cost of drawing them: the channels of every chunk are turned by one place.
            keys, values = data.keys.roll(chunk, 3), data.values.roll(chunk, 3)
            for layer in layers:
                layer.append(keys, values)
                layer.observe(data.metric_queries, None, head_dim**-0.5)
            on_progress("Filling the cache", chunk + 1, chunks)
        times, peak, read = [], 0, 0.0
        for _ in range(config.steps):
            started = time.perf_counter()
            for layer in layers:
                layer.append(data.keys[:, :, :1], data.values[:, :, :1])
                read += layer.attend(data.q, head_dim**-0.5).stats.bytes_fraction
            times.append(1e6 * (time.perf_counter() - started) / config.layers)
            peak = max(peak, resident()["RssAnon"])
        row = _row(config, layers, timing(times), peak, read / config.steps / config.layers)
    return [row | {"rss_anon_bytes_before": before}], {}


def _row(
    config: Config, layers: list[LouverAttention], times: dict[str, float], peak: int, bytes_fraction: float
) -> dict[str, Any]:
    held = [layer.memory_bytes() for layer in layers]
    cache = sum(part["disk"] for part in held)
    return {
        "kv_len": layers[0].kv_len,
        "num_layers": config.layers,
        "num_q_heads": config.shape[0],
        "num_kv_heads": config.shape[1],
        "head_dim": config.shape[2],
        "dtype": config.dtype,
        "data": "heavy_tailed",
        "device": "cpu",
        "index": "sketch",
        "policy": config.policy,
        "store": "disk",
        "disk_bytes": cache,
        "index_memory_fraction": sum(part["index"] for part in held) / cache,
        "rss_anon_bytes": peak,
        "rss_anon_fraction": peak / cache,
        "rss_file_bytes": resident()["RssFile"],
        "bytes_fraction": bytes_fraction,
        **times,
        "guarantee": "exact" if parse(config.policy).drops else "certified",
    }


def resident() -> dict[str, int]:
    """This process's resident bytes by kind, as Linux counts them."""
    lines = (line.split() for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("Rss"))
    return {name.rstrip(":"): 1024 * int(kilobytes) for name, kilobytes, _ in lines}
