"""The offload experiment: a decode step whose exact keys and values are not on the GPU.

One layer, synthetic heavy-tailed keys. Louver reads through its sketch; beside it, the whole cache streamed to the GPU at each
step, transformers' own offloaded cache, dense attention with everything on the GPU, and nearest-neighbour indexes on the CPU, which is how
the paper's retrieval baselines find keys. A step has three parts: *lookup* (which keys), *fetch* (their exact keys and
values across the bus, with the attention over them), and for policies that drop nothing the *coarse* attention to the rest.

On a GPU the parts are the times of the kernels that make them. Without one, the host's RAM stands for both sides of the bus: figures
are then the CPU's, ``device`` says so, and "moved" counts what would cross.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from louver.errors import InputFileError, PolicyError
from louver.experiments import offload_cpu, offload_gpu
from louver.experiments.baselines.ann import KINDS, AnnIndex, AnnOptions
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.experiments.offload_rows import cache_bytes, facts
from louver.experiments.synthetic import Synthetic, heavy_tailed
from louver.policies import parse
from louver.shapes import group_heads


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure. Every field but ``repetitions`` changes results."""

    kv_lens: tuple[int, ...] = option((40000, 131072), help="Keys in the cache.")
    policies: tuple[str, ...] = option(("budget:0.01", "exact:0.01"), help="What a step keeps.")
    ann: tuple[str, ...] = option(("hnsw", "ivf", "lsh"), help=f"Indexes on the CPU: some of {', '.join(KINDS)}.")
    ann_kv_lens: tuple[int, ...] = option(
        (40000,), help="Lengths that those are measured at; building them takes minutes."
    )
    ann_share: float = option(0.01, help="Share of the keys that those are asked for.")
    ann_heads: int = option(2, help="KV heads that those are built for; their times are scaled to all.")
    shape: tuple[int, ...] = option((32, 8, 128), help="num_q_heads,num_kv_heads,head_dim")
    device: str = option("auto", help="cuda, cpu, or auto for cuda where there is one.")
    repetitions: int = option(15, help="Times each way is called, in turn.")
    seed: int = option(0, help="Of the data.")

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or self.shape[0] % self.shape[1]:
            raise InputFileError(f"shape={self.shape}; wanted num_q_heads,num_kv_heads,head_dim, the first a multiple")
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputFileError(f"device={self.device!r}; wanted auto, cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputFileError("device='cuda': torch sees no CUDA device here")
        if bad := [kind for kind in self.ann if kind not in KINDS]:
            raise PolicyError(f"index {bad[0]!r} is unknown; wanted some of {', '.join(KINDS)}")
        for policy in self.policies:
            parse(policy)


def run(config: Config, on_progress: Progress = no_progress) -> Outcome:
    """A row per length and way."""
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    rows: list[dict[str, Any]] = []
    for done, kv_len in enumerate(config.kv_lens):
        on_progress("Offload, length by length", done, len(config.kv_lens))
        num_q_heads, num_kv_heads, head_dim = config.shape
        data = heavy_tailed(
            kv_len,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=torch.float16 if cuda else torch.float32,  # as models have it there
            seed=config.seed,
            device="cuda" if cuda else "cpu",
        )
        measure = offload_gpu.measure if cuda else offload_cpu.measure
        rows += measure(data, config.policies, config.repetitions)
        if kv_len in config.ann_kv_lens:
            rows += _approximate(config, data)
    on_progress("Offload, length by length", len(config.kv_lens), len(config.kv_lens))
    return rows, {}


def _approximate(config: Config, data: Synthetic) -> Iterator[dict[str, Any]]:
    """Lookup and recall of each index on the CPU; what it finds would have to be fetched like anybody's keys."""
    kv_len, heads = data.keys.shape[2], min(config.ann_heads, data.keys.shape[1])
    wanted = max(1, math.ceil(config.ann_share * kv_len))
    q = group_heads(data.q, data.keys.shape[1])[0, :heads].float().cpu()
    keys = data.keys[0, :heads].float().cpu()
    for kind in config.ann:
        times, found, moved, held = [], 0, 0, 0
        for head in range(heads):
            index = AnnIndex(keys[head], AnnOptions(kind=kind))
            ids = _timed(lambda index=index, head=head: index.search(q[head], wanted), config.repetitions, times)
            true = (q[head].double() @ keys[head].double().mT).topk(wanted).indices
            found += sum(int(torch.isin(t, i).sum()) for t, i in zip(true, ids, strict=True))
            moved += ids[ids >= 0].unique().numel() * 2 * data.keys.element_size() * keys.shape[2]
            held += index.memory_bytes()
        total = heads * q.shape[1] * wanted
        scale = data.keys.shape[1] / heads
        yield facts(data, index=kind, policy=f"k = {config.ann_share:g}", store="host", guarantee="none") | {
            "lookup_us": scale * sum(times),
            "lookup_device": "cpu",
            "moved_bytes": round(scale * moved),
            "moved_fraction": scale * moved / cache_bytes(data),
            "gpu_bytes": 0,
            "gpu_fraction": 0.0,
            "index_memory_fraction": held / (4 * keys.numel()),
            "recall": found / total,
            "num_false_negatives": total - found,
            "kv_heads_measured": heads,
        }


def _timed(call: Any, repetitions: int, times: list[float]) -> Tensor:
    """The result of a call whose median time, in microseconds, is added to times."""
    seconds, result = [], call()
    for _ in range(min(repetitions, 7)):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    times.append(1e6 * float(torch.tensor(seconds, dtype=torch.float64).median()))
    return result
