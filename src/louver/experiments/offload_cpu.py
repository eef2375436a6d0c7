"""The offload experiment without a GPU: RAM against files, and against copying the whole cache before attending it."""

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from louver.attention import LouverAttention
from louver.experiments.bench import interleaved
from louver.experiments.offload_rows import cache_bytes, dense_output, evidence, facts, moved_bytes, timing
from louver.experiments.synthetic import Synthetic
from louver.kernels import get_ops, resolve_backend
from louver.policies import parse


def measure(data: Synthetic, policies: tuple[str, ...], repetitions: int) -> Iterator[dict[str, Any]]:
    """Rows of one length."""
    scale, ops = data.keys.shape[3] ** -0.5, get_ops(resolve_backend("auto"))
    ends = [torch.full((data.keys.shape[0],), n, dtype=torch.int32) for n in (0, data.keys.shape[2])]
    with tempfile.TemporaryDirectory(prefix="louver-offload-") as folder:
        layers = {
            (spec, store): _filled(data, LouverAttention(spec, store=store, path=folder if store == "disk" else None))
            for spec in policies
            for store in ("host", "disk")
        }
        buffers = [torch.empty_like(x) for x in (data.keys, data.values)]

        def dense(keys: Tensor, values: Tensor) -> Tensor:
            return ops.attend_dense(data.q, keys, values, *ends, scale)[0]

        def stream() -> Tensor:
            for buffer, x in zip(buffers, (data.keys, data.values), strict=True):
                buffer.copy_(x)
            return dense(buffers[0], buffers[1])

        ways: dict[str, Any] = {
            "dense": [lambda: dense(data.keys, data.values)],
            "sdpa": [lambda: dense_output(data.q, data.keys, data.values)],
            "streamed": [stream],
        }
        for (spec, store), layer in layers.items():
            ways[f"{spec} {store}"] = [lambda layer=layer: layer.attend(data.q, scale)]
        times = {name: timing([1e6 * t for t in found]) for name, found in interleaved(ways, repetitions).items()}
        compared = {
            "speedup_vs_resident": min(times[name]["latency_us"] for name in ("dense", "sdpa")),
            "speedup_vs_streamed": times["streamed"]["latency_us"],
        }

        def against(name: str) -> dict[str, float]:
            return times[name] | {field: us / times[name]["latency_us"] for field, us in compared.items()}

        for way, moved in (("dense", 0), ("sdpa", 0), ("streamed", cache_bytes(data))):
            store = way if way == "streamed" else "device"
            named = facts(data, index="none", policy="dense", store=store, guarantee="exact")
            named |= {"backend": "torch" if way == "sdpa" else ops.__name__.rpartition(".")[2]}
            yield named | against(way) | {"moved_bytes": moved, "moved_fraction": moved / cache_bytes(data)}
        for (spec, store), layer in layers.items():
            layer.record = True
            result = layer.attend(data.q, scale)
            guarantee = "exact" if parse(spec).drops else "certified"
            yield (
                facts(data, index="sketch", policy=spec, store=store, guarantee=guarantee)
                | against(f"{spec} {store}")
                | {
                    "moved_bytes": moved_bytes(result.stats, data.keys.dtype),
                    "moved_fraction": moved_bytes(result.stats, data.keys.dtype) / cache_bytes(data),
                    "bytes_fraction": result.stats.bytes_fraction,
                    "index_memory_fraction": layer.memory_bytes()["index"] / cache_bytes(data),
                    **evidence(data, result),
                }
            )


def _filled(data: Synthetic, layer: LouverAttention) -> LouverAttention:
    layer.append(data.keys, data.values)
    layer.observe(data.metric_queries, None, data.keys.shape[3] ** -0.5)
    return layer
