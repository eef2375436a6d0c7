"""The latency experiment: what a decode step's attention takes as the cache grows, upkeep included.

A generation without its model: at each length the cache is filled (``build_ms``: an index built, tokens copied), then every step appends a
token and attends. ``latency_us`` is the median step; ``amortized_us`` the mean of all steps, those that close a block and encode it
included, with the build spread over ``amortized_over`` steps. Ways: Louver's policies on every backend here; each backend's dense kernel,
and torch's SDPA, on the same growing buffers; and what a model does by itself, concatenating its cache at every step: SDPA, and eager
attention with repeated keys and values. The ways take turns, step by step.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from louver.attention import DenseAttention, LouverAttention
from louver.errors import InputFileError
from louver.experiments.bench import DTYPES
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.experiments.synthetic import heavy_tailed
from louver.kernels import available_backends, get_ops, resolve_backend
from louver.kv.device import DeviceStore
from louver.policies import parse

WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to time. Every field changes results but ``steps`` and ``reserve``, which change what they rest on."""

    kv_lens: tuple[int, ...] = option((2048, 8192, 16384, 32768), help="Tokens in the cache when decoding starts.")
    shape: tuple[int, ...] = option((32, 8, 128), help="num_q_heads,num_kv_heads,head_dim")
    dtype: str = option("bfloat16", help="float32, float16 or bfloat16")
    policies: tuple[str, ...] = option(("topk:20", "budget:0.01", "exact:0.01"), help="What a step keeps.")
    backends: tuple[str, ...] = option(("auto",), help="Backends, auto, or all.")
    steps: int = option(140, help="Decode steps per length; over 128 of them a block is encoded.")
    amortized_over: int = option(512, help="Tokens of a generation that share the cost of the build.")
    seed: int = option(0, help="Of the data.")

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputFileError(f"dtype={self.dtype!r} is unknown; wanted one of {', '.join(DTYPES)}")
        if len(self.shape) != 3 or self.shape[0] % self.shape[1]:
            raise InputFileError(f"shape={self.shape}; wanted num_q_heads,num_kv_heads,head_dim, the first a multiple")
        if self.steps < 1 or self.amortized_over < 1:
            raise InputFileError("wanted at least one step, and one token to amortise over")
        for policy in self.policies:
            parse(policy)

    @property
    def chosen_backends(self) -> list[str]:
        """By name, each once."""
        names = available_backends() if self.backends == ("all",) else self.backends
        return list(dict.fromkeys(resolve_backend(name) for name in names))


class DenseKernel:
    """A backend's dense kernel on buffers that grow in place: the fairest opponent."""

    def __init__(self, backend: str) -> None:
        self.attend_dense = get_ops(backend).attend_dense
        self.store = DeviceStore()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens [batch, num_kv_heads, new_len, head_dim] in place."""
        self.store.append(keys, values)

    def observe(self, queries: Tensor, kv_start: Tensor | None, softmax_scale: float) -> None:
        """Nothing to learn."""

    def attend(self, q: Tensor, softmax_scale: float) -> Tensor:
        """Attention of q [batch, num_q_heads, head_dim]."""
        store, values = self.store, self.store.values
        assert values is not None
        return self.attend_dense(q, store.keys, values, store.kv_start, store.kv_len, softmax_scale)[0]


class Concatenating:
    """What a model does without help: concatenate keys and values at every step, attend with torch."""

    def __init__(self, eager: bool) -> None:
        self.eager = eager
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens [batch, num_kv_heads, new_len, head_dim] by concatenation."""
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 2)
        self.values = values if self.values is None else torch.cat([self.values, values], 2)

    def observe(self, queries: Tensor, kv_start: Tensor | None, softmax_scale: float) -> None:
        """Nothing to learn."""

    def attend(self, q: Tensor, softmax_scale: float) -> Tensor:
        """Attention of q [batch, num_q_heads, head_dim]."""
        assert self.keys is not None and self.values is not None
        if not self.eager:
            return scaled_dot_product_attention(
                q[:, :, None], self.keys, self.values, scale=softmax_scale, enable_gqa=True
            )
        group = q.shape[1] // self.keys.shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (self.keys, self.values))
        return ((q[:, :, None] @ keys.mT) * softmax_scale).softmax(-1, dtype=torch.float32).to(q.dtype) @ values


Way = LouverAttention | DenseAttention | DenseKernel | Concatenating


def run(config: Config, on_progress: Progress = no_progress) -> Outcome:
    """A row per length and way.

    Raises:
        BackendError: a backend is not there.
    """
    rows: list[dict[str, Any]] = []
    backends = config.chosen_backends
    for kv_len in config.kv_lens:
        stage = f"Decoding after {kv_len:,} tokens"
        rows += _measure(config, backends, kv_len, partial(_tell, on_progress, stage, config.steps))
    return rows, {}


def _tell(on_progress: Progress, stage: str, total: int, done: int) -> None:
    on_progress(stage, done, total)


def ways(config: Config, backends: list[str]) -> Iterator[tuple[dict[str, Any], Way]]:
    """Every way with the row fields that name it, its cache empty."""
    for backend in backends:
        yield {"policy": "dense", "backend": backend, "guarantee": "exact"}, DenseKernel(backend)
    yield {"policy": "sdpa_in_place", "backend": "torch", "guarantee": "exact"}, DenseAttention()
    yield {"policy": "sdpa", "backend": "torch", "guarantee": "exact"}, Concatenating(eager=False)
    yield {"policy": "eager", "backend": "torch", "guarantee": "exact"}, Concatenating(eager=True)
    for backend in backends:
        for spec in config.policies:
            policy = parse(spec)
            fields = {"policy": policy.spec, "backend": backend, "guarantee": policy.guarantee}
            yield fields, LouverAttention(policy, backend=backend)


def _measure(config: Config, backends: list[str], kv_len: int, on_step: Any) -> list[dict[str, Any]]:
    num_q_heads, num_kv_heads, head_dim = config.shape
    device = "cuda" if "triton" in backends else "cpu"
    shape = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    data = heavy_tailed(kv_len + config.steps, **shape, dtype=DTYPES[config.dtype], seed=config.seed, device=device)
    scale, measured = head_dim**-0.5, []
    for fields, way in ways(config, backends):
        started = _now(device)
        way.append(data.keys[:, :, :kv_len].clone(), data.values[:, :, :kv_len].clone())
        way.observe(data.metric_queries, None, scale)
        measured.append((fields, way, 1e3 * (_now(device) - started), []))
    for step in range(config.steps):
        place = slice(kv_len + step, kv_len + step + 1)
        for _, way, _, times in measured:
            started = _now(device)
            way.append(data.keys[:, :, place], data.values[:, :, place])
            way.attend(data.q, scale)
            times.append(1e6 * (_now(device) - started))
        on_step(step + 1)
    base = shape | {"data": "heavy_tailed", "kv_len": kv_len, "dtype": config.dtype, "device": device, "batch": 1}
    rows = [base | fields | _figures(times, build_ms, config) for fields, _, build_ms, times in measured]
    for row in rows:
        for other in ("dense", "sdpa_in_place", "sdpa", "eager"):
            theirs = min(r["amortized_us"] for r in rows if r["policy"] == other)
            row[f"speedup_vs_{other}"] = theirs / row["amortized_us"]
    return rows


def _figures(times: list[float], build_ms: float, config: Config) -> dict[str, float]:
    kept = torch.tensor(times[WARM_UP:] or times, dtype=torch.float64)
    return {
        "latency_us": float(kept.median()),
        "latency_us_p20": float(kept.quantile(0.2)),
        "latency_us_p80": float(kept.quantile(0.8)),
        "build_ms": build_ms,
        "amortized_us": float(kept.mean()) + 1e3 * build_ms / config.amortized_over,
        "amortized_over": config.amortized_over,
        "num_threads": torch.get_num_threads(),
    }


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
