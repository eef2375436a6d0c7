"""How long a decode step's attention takes on a CPU: Louver's policies beside every dense way, in one run.

The calls take turns, repetition by repetition, so that whatever else the machine does falls on all alike. Each turn uses
another copy of the cache, several of them, so that no call finds its data in the processor's last cache, as a model's other
layers would have thrown it out. Louver is timed through the public ``attend``, Python included. Guarantee of the dense rows:
exact.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from louver.attention.sparse import attend
from louver.errors import InputFileError
from louver.experiments.bench_data import Copy, captured, synthetic
from louver.experiments.rows import Row
from louver.kernels import get_ops, resolve_backend
from louver.kernels.cpu import native
from louver.policies.spec import parse
from louver.protocols import AttendResult
from louver.shapes import group_heads

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TORCH = ("sdpa", "eager_grouped", "eager_repeat")
WARM_UP = 2

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure. Every field but ``repetitions`` changes results."""

    kv_lens: tuple[int, ...] = (2048, 8192, 40000)
    shape: tuple[int, int, int] = (32, 8, 128)  # num_q_heads, num_kv_heads, head_dim
    dtype: str = "bfloat16"
    policies: tuple[str, ...] = ("topk:20", "budget:0.01", "exact:0.01")
    repetitions: int = 31
    seed: int = 0
    backend: str = "auto"
    capture: Path | None = None  # measure on its layers instead; its own length and shape

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputFileError(f"dtype={self.dtype!r} is unknown; wanted one of {', '.join(DTYPES)}")
        if min(self.kv_lens) < 1:
            raise InputFileError(f"kv_lens={self.kv_lens}; wanted at least one key")
        if len(self.shape) != 3 or min(self.shape) < 1 or self.shape[0] % self.shape[1]:
            raise InputFileError(f"shape={self.shape}; wanted num_q_heads,num_kv_heads,head_dim, the first a multiple")
        for policy in self.policies:
            parse(policy)


def run(config: Config, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Iterator[Row]:
    """Rows of every length: the dense ways first, then the policies."""
    backend = resolve_backend(config.backend)
    dtype = DTYPES[config.dtype]
    lengths = config.kv_lens if config.capture is None else (0,)  # a capture's own
    total = len(lengths) * config.repetitions
    for number, kv_len in enumerate(lengths):
        if config.capture is None:
            data, copies = "heavy_tailed", synthetic(kv_len, config.shape, dtype, config.seed, backend)
        else:
            data, copies = captured(config.capture, dtype, backend)
        ways: dict[str, list[Call]] = {}
        for copy in copies:
            for name, call in {**_dense(copy, backend), **_sparse(copy, config.policies)}.items():
                ways.setdefault(name, []).append(call)
        done = number * config.repetitions
        times = interleaved(ways, config.repetitions, lambda i, done=done: on_progress(done + i, total))
        yield from _rows(config, data, backend, times, copies)


def interleaved(
    ways: dict[str, list[Call]], repetitions: int, on_repetition: Callable[[int], None] = lambda done: None
) -> dict[str, list[float]]:
    """Seconds of every repetition of every way, in turn, each call on the next copy: none finds in the cache what another left."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(-WARM_UP, repetitions):
        for place, (name, calls) in enumerate(ways.items()):
            call = calls[(repetition + place) % len(calls)]
            begin = time.perf_counter()
            call()
            if repetition >= 0:
                times[name].append(time.perf_counter() - begin)
        on_repetition(max(0, repetition + 1))
    return times


def _dense(copy: Copy, backend: str) -> dict[str, Call]:
    q, keys, values, store = copy.q, copy.keys, copy.values, copy.index.store
    scale, group_size = q.shape[2] ** -0.5, q.shape[1] // keys.shape[1]

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(q[:, :, None], keys, values, scale=scale, enable_gqa=True)

    def eager_grouped() -> Tensor:
        logits = group_heads(q, keys.shape[1]) @ keys.mT
        return torch.softmax(logits * scale, -1, dtype=torch.float32).to(q.dtype) @ values

    def eager_repeat() -> Tensor:
        logits = q[:, :, None] @ keys.repeat_interleave(group_size, 1).mT
        return torch.softmax(logits * scale, -1, dtype=torch.float32).to(q.dtype) @ values.repeat_interleave(
            group_size, 1
        )

    def dense() -> tuple[Tensor, Tensor]:
        return get_ops(backend).attend_dense(q, keys, values, store.kv_start, store.kv_len, scale)

    return {"sdpa": sdpa, "eager_grouped": eager_grouped, "eager_repeat": eager_repeat, "dense": dense}


def _sparse(copy: Copy, policies: tuple[str, ...]) -> dict[str, Call]:
    return {
        policy: lambda policy=policy: attend(copy.q, copy.index, policy=policy, keep_best=True) for policy in policies
    }


def _rows(
    config: Config, data: str, backend: str, times: dict[str, list[float]], copies: list[Copy]
) -> Iterator[dict[str, Any]]:
    _, num_kv_heads, kv_len, head_dim = copies[0].keys.shape
    medians = {name: percentile(t, 50) for name, t in times.items()}
    best_torch = min(medians[name] for name in TORCH)
    for name, seconds in times.items():
        sparse = name in config.policies
        row = {
            "kv_len": kv_len,
            "num_q_heads": copies[0].q.shape[1],
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "dtype": config.dtype,
            "batch": 1,
            "data": data,
            "num_threads": torch.get_num_threads(),
            "instruction_set": native.instruction_set() if backend == "cpu" else None,
            "index": "sketch" if sparse else "none",
            "backend": backend if sparse or name == "dense" else "torch",
            "policy": parse(name).spec if sparse else name,
            **{
                f"latency_us{suffix}": 1e6 * percentile(seconds, p)
                for suffix, p in (("", 50), ("_p20", 20), ("_p80", 80))
            },
            "speedup_vs_best_torch": best_torch / medians[name],
            **{f"speedup_vs_{other}": medians[other] / medians[name] for other in (*TORCH, "dense")},
        }
        yield row | (_mean_evidence(config, copies, name) if sparse else {"bytes_fraction": 1.0, "guarantee": "exact"})


def _mean_evidence(config: Config, copies: list[Copy], policy: str) -> dict[str, Any]:
    """Of a capture, over its layers: counts are added, the rest averaged. The copies of a synthetic cache are all alike."""
    found = [evidence(copy, policy) for copy in (copies if config.capture is not None else copies[:1])]
    merged: dict[str, Any] = {}
    for name, first in found[0].items():
        values = [each[name] for each in found]
        if isinstance(first, str):
            merged[name] = first
        else:
            merged[name] = sum(values) if name.startswith("num_") else sum(values) / len(values)
    return merged


def evidence(copy: Copy, policy: str) -> dict[str, Any]:
    """What one step read and missed, against float64."""
    q, num_kv_heads = copy.q, copy.keys.shape[1]
    result = attend(copy.q, copy.index, policy=policy, keep_best=True, record=True)
    scores = (group_heads(q.double(), num_kv_heads) @ copy.keys.double().mT).flatten(1, 2)
    weights = torch.softmax(scores * q.shape[2] ** -0.5, -1)
    truth = (group_heads(weights, num_kv_heads) @ copy.values.double()).flatten(1, 2)
    error = (truth - result.out.double()).norm(dim=-1)
    bound = result.certificate.double() + result.arithmetic_bound
    relative = (error / truth.norm(dim=-1)).flatten()
    stats = result.stats
    return {
        "bytes_fraction": stats.bytes_fraction,
        "index_memory_fraction": copy.index.memory_bytes() / (2 * copy.keys.numel() * copy.keys.element_size()),
        "scanned_fraction": stats.fraction("scanned"),
        "selected_fraction": stats.fraction("exact"),
        "live_fraction": stats.fraction("coarse"),
        **_recall(scores, result),
        "dropped_mass_bound": result.dropped_mass_bound.mean().item(),
        "output_error": relative.mean().item(),
        "output_error_p99": relative.quantile(0.99).item(),
        "output_error_bound": (bound / truth.norm(dim=-1)).median().item(),
        "num_bound_violations": int((error > bound).sum()),
        "guarantee": parse(policy).guarantee,
    }


def _recall(scores: Tensor, result: AttendResult) -> dict[str, float]:
    """Of the keys whose true score reaches the reported tau, the share attended exactly."""
    assert result.exact_mask is not None
    relevant = scores >= result.tau.double()[..., None]
    missed = int((relevant & ~result.exact_mask).sum())
    return {"recall": 1 - missed / max(1, int(relevant.sum())), "num_false_negatives": missed}


def percentile(values: list[float], percent: int) -> float:
    """Linear interpolation between order statistics."""
    return torch.tensor(values, dtype=torch.float64).quantile(percent / 100).item()
