"""The offload experiment without a GPU: RAM against files, and against copying the whole cache before attending it."""

import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from louver.attention import LouverAttention
from louver.experiments.bench import interleaved
from louver.experiments.offload_rows import cache_bytes, dense_output, evidence, facts, moved_bytes, timing
from louver.experiments.synthetic import Synthetic
from louver.policies import parse


def measure(data: Synthetic, policies: tuple[str, ...], repetitions: int) -> Iterator[dict[str, Any]]:
    """Rows of one length."""
    scale = data.keys.shape[3] ** -0.5
    with tempfile.TemporaryDirectory(prefix="louver-offload-") as folder:
        layers = {
            (spec, store): _filled(data, LouverAttention(spec, store=store, path=folder if store == "disk" else None))
            for spec in policies
            for store in ("host", "disk")
        }
        buffers = [torch.empty_like(x) for x in (data.keys, data.values)]

        def stream() -> torch.Tensor:
            for buffer, x in zip(buffers, (data.keys, data.values), strict=True):
                buffer.copy_(x)
            return dense_output(data.q, buffers[0], buffers[1])

        ways: dict[str, Any] = {
            "resident": [lambda: dense_output(data.q, data.keys, data.values)],
            "streamed": [stream],
        }
        for (spec, store), layer in layers.items():
            ways[f"{spec} {store}"] = [lambda layer=layer: layer.attend(data.q, scale)]
        times = {name: timing([1e6 * t for t in found]) for name, found in interleaved(ways, repetitions).items()}
        compared = {f"speedup_vs_{way}": times[way]["latency_us"] for way in ("resident", "streamed")}

        def against(name: str) -> dict[str, float]:
            return times[name] | {field: us / times[name]["latency_us"] for field, us in compared.items()}

        for way, moved in (("resident", 0), ("streamed", cache_bytes(data))):
            named = facts(data, index="none", policy="dense", store=way, guarantee="exact")
            yield (
                named
                | against(way)
                | {"moved_bytes": moved, "moved_fraction": moved / cache_bytes(data), "recall": 1.0}
            )
        for (spec, store), layer in layers.items():
            layer.record = True
            result = layer.attend(data.q, scale)
            guarantee = "exact" if parse(spec).drops else "certified"
            yield (
                facts(data, index="sketch", policy=spec, store=store, guarantee=guarantee)
                | against(f"{spec} {store}")
                | {
                    "moved_bytes": moved_bytes(result.stats),
                    "moved_fraction": moved_bytes(result.stats) / cache_bytes(data),
                    "bytes_fraction": result.stats.bytes_fraction,
                    "index_memory_fraction": layer.memory_bytes()["index"] / cache_bytes(data),
                    **evidence(data, result),
                }
            )


def _filled(data: Synthetic, layer: LouverAttention) -> LouverAttention:
    layer.append(data.keys, data.values)
    layer.observe(data.metric_queries, None, data.keys.shape[3] ** -0.5)
    return layer
