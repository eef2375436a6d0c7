"""The offload experiment on a GPU: steps as CUDA graphs with a cold L2, in turn; their parts by the profiler's kernel times."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from louver.attention import LouverAttention
from louver.experiments.bench_gpu import FLUSH_BYTES, interleaved
from louver.experiments.offload_rows import cache_bytes, dense_output, evidence, facts, moved_bytes, timing
from louver.experiments.synthetic import Synthetic
from louver.kernels import get_ops
from louver.policies import parse

# Which part of a step a kernel belongs to. "tiers" lists the exact keys and attends the rest through the sketch, in one pass.
PARTS = {
    "lookup": ("prepare_kernel", "scan", "scan_kernel", "resolve_kernel", "list_keys", "list_kernel"),
    "coarse": ("tiers", "tiers_kernel"),
    "fetch": ("rank_kernel", "attend", "exact_kernel"),
}
PROFILED = 5
LAYERS = 3  # of transformers' cache, which prefetches the next layer while one is attended
STEPS = 6


def measure(data: Synthetic, policies: tuple[str, ...], repetitions: int) -> Iterator[dict[str, Any]]:
    """Rows of one length."""
    scale, whole = data.keys.shape[3] ** -0.5, cache_bytes(data)
    before = torch.cuda.memory_allocated()
    layers: dict[tuple[str, str], LouverAttention] = {}
    grown: dict[tuple[str, str], int] = {}
    for spec in policies:
        for store in ("host", "device"):
            layer = LouverAttention(spec, store=store)
            layer.append(data.keys, data.values)
            layer.observe(data.metric_queries, None, scale)
            layers[spec, store] = layer
            now = torch.cuda.memory_allocated()
            grown[spec, store], before = now - before, now
    host = [x.cpu().pin_memory() for x in (data.keys, data.values)]
    buffers = [torch.empty_like(x) for x in (data.keys, data.values)]
    ends = [torch.tensor([n], dtype=torch.int32, device="cuda") for n in (0, data.keys.shape[2])]

    def copy() -> None:
        for buffer, x in zip(buffers, host, strict=True):
            buffer.copy_(x, non_blocking=True)

    def dense() -> Tensor:
        return get_ops("triton").attend_dense(data.q, buffers[0], buffers[1], *ends, scale)[0]

    def streamed() -> Tensor:
        copy()
        return dense()

    ways: dict[str, Callable[[], object]] = {
        "dense": dense,
        "sdpa": lambda: dense_output(data.q, buffers[0], buffers[1]),
        "streamed": streamed,
    }
    copy()
    for (spec, store), layer in layers.items():
        ways[f"{spec} {store}"] = lambda layer=layer: layer.attend(data.q, scale).out
    times = {name: timing(found) for name, found in interleaved(ways, repetitions).items()}
    resident = min(times["dense"]["latency_us"], times["sdpa"]["latency_us"])
    theirs = _transformers(data)

    def against(us: float) -> dict[str, float | None]:
        return {
            "speedup_vs_resident": resident / us,
            "speedup_vs_streamed": times["streamed"]["latency_us"] / us,
            "speedup_vs_transformers_offloaded": None if theirs is None else theirs["latency_us"] / us,
        }

    for name in ("dense", "sdpa"):
        row = facts(data, index="none", policy="dense", store="device", guarantee="exact") | times[name]
        yield row | against(times[name]["latency_us"]) | {
            "backend": "triton" if name == "dense" else "torch", "moved_bytes": 0, "gpu_bytes": whole, "gpu_fraction": 1.0,
        }  # fmt: skip
    row = facts(data, index="none", policy="dense", store="streamed", guarantee="exact") | times["streamed"]
    yield row | against(times["streamed"]["latency_us"]) | {
        "moved_bytes": whole, "moved_fraction": 1.0, "gb_per_s": whole / times["streamed"]["latency_us"] / 1e3,
        "gpu_bytes": 0, "gpu_fraction": 0.0,  # but for a buffer that all layers share
    }  # fmt: skip
    if theirs is not None:
        row = facts(data, index="none", policy="dense", store="transformers_offloaded", guarantee="exact") | theirs
        yield row | against(theirs["latency_us"]) | {"moved_bytes": 2 * whole, "moved_fraction": 2.0}
    for (spec, store), layer in layers.items():
        name = f"{spec} {store}"
        held = layer.memory_bytes()
        parts = _parts(ways[name])
        layer.record = True
        result = layer.attend(data.q, scale)
        layer.record = False
        moved = moved_bytes(result.stats, data.keys.dtype) if store == "host" else 0
        guarantee = "exact" if parse(spec).drops else "certified"
        row = facts(data, index="sketch", policy=spec, store=store, guarantee=guarantee) | times[name] | parts
        row |= against(times[name]["latency_us"]) | {
            "lookup_device": "cuda",
            "moved_bytes": moved,
            "moved_fraction": moved / whole,
            "bytes_fraction": result.stats.bytes_fraction,
            "gpu_bytes": held["gpu"],
            "gpu_fraction": held["gpu"] / whole,
            "gpu_fraction_allocated": grown[spec, store] / whole,
            "index_memory_fraction": held["index"] / whole,
            **evidence(data, result),
        }
        if store == "host":
            row |= _gathers(data, layer, host, result.exact_mask)
        yield row


def _parts(call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of a step's kernels by part, with a cold L2."""
    from torch.profiler import ProfilerActivity, profile

    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            flush.zero_()
            call()
        torch.cuda.synchronize()
    spent = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        for part, kernels in PARTS.items():
            if event.key in kernels:
                spent[part] += event.self_device_time_total / PROFILED
    return {f"{part}_us": us for part, us in spent.items() if us}


def _gathers(data: Synthetic, layer: LouverAttention, host: list[Tensor], mask: Tensor | None) -> dict[str, float]:
    """Microseconds to bring the same exact keys and values to the GPU first: gathered by the GPU, and gathered by the host."""
    assert mask is not None and layer.store.values is not None
    union = mask[0].unflatten(0, (data.keys.shape[1], -1)).any(1)
    head, token = union.nonzero().unbind(1)
    sources = (layer.store.keys[0], layer.store.values[0])
    by_gpu = interleaved({"gather": lambda: [x[head, token] for x in sources]}, 7)["gather"]
    rows = (head * data.keys.shape[2] + token).cpu()
    flat = [x[0].flatten(0, 1) for x in host]
    staging = [torch.empty(len(rows), x.shape[1], dtype=x.dtype, pin_memory=True) for x in flat]
    there = [torch.empty_like(x, device="cuda") for x in staging]
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        for x, stage, target in zip(flat, staging, there, strict=True):
            torch.index_select(x, 0, rows, out=stage)
            target.copy_(stage, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(1e6 * (time.perf_counter() - started))
    return {
        "gather_by_gpu_us": timing(by_gpu)["latency_us"],
        "gather_by_host_us": timing(seconds)["latency_us"],
        "gathered_bytes": 4 * len(rows) * data.keys.shape[3],
    }


def _transformers(data: Synthetic) -> dict[str, float] | None:
    """Time per layer of a decode step through transformers' offloaded cache; None without transformers."""
    with contextlib.suppress(ImportError):
        from transformers import DynamicCache, LlamaConfig

        num_q_heads, num_kv_heads, head_dim = data.q.shape[1], data.keys.shape[1], data.keys.shape[3]
        shape: dict[str, Any] = {
            "num_attention_heads": num_q_heads,
            "num_key_value_heads": num_kv_heads,
            "head_dim": head_dim,
        }
        cache = DynamicCache(config=LlamaConfig(num_hidden_layers=LAYERS, **shape), offloading=True)
        for layer in range(LAYERS):
            cache.update(data.keys, data.values, layer)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, token = torch.cuda.memory_allocated(), (data.keys[:, :, :1], data.values[:, :, :1])
        times = []
        for _ in range(STEPS):
            started = time.perf_counter()
            for layer in range(LAYERS):
                dense_output(data.q, *cache.update(*token, layer))
            torch.cuda.synchronize()
            times.append(1e6 * (time.perf_counter() - started) / LAYERS)
        return timing(times[1:]) | {"gpu_bytes_peak": torch.cuda.max_memory_allocated() - before}
    return None
