"""The caches ``louver bench`` measures on: copies of a synthetic one, or the layers of a capture."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from louver.experiments.capture import Capture
from louver.experiments.synthetic import heavy_tailed
from louver.index.sketch import SketchIndex
from louver.memory import empty

CACHE_BYTES = 96 << 20  # sketches of all copies together take more than this, three times a large last-level cache
LARGEST_BYTES = 4 << 30  # of keys and values over all copies


@dataclass(frozen=True, kw_only=True)
class Copy:
    """One copy of the cache, with its index."""

    q: Tensor
    index: SketchIndex

    @property
    def keys(self) -> Tensor:
        return self.index.store.keys

    @property
    def values(self) -> Tensor:
        values = self.index.store.values
        assert values is not None
        return values


def synthetic(kv_len: int, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, backend: str) -> list[Copy]:
    """Copies of one heavy-tailed cache, as many as it takes that none stays in the processor's last cache."""
    num_q_heads, num_kv_heads, head_dim = shape
    elements = kv_len * num_kv_heads * head_dim
    wanted = -(-CACHE_BYTES // elements)  # a sketch takes about a byte for a key's and a value's channel
    room = LARGEST_BYTES // (2 * elements * dtype.itemsize)
    copies = []
    for _ in range(max(1, min(wanted, room, 64))):
        made = heavy_tailed(
            kv_len, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, seed=seed
        )
        index = SketchIndex.build(_held(made.keys), _held(made.values), made.metric_queries, backend=backend)
        copies.append(Copy(q=made.q, index=index))
    return copies


def captured(path: Path, dtype: torch.dtype, backend: str) -> tuple[str, list[Copy]]:
    """The capture's name, and a copy per layer: its last query over the tokens up to it."""
    capture = Capture.load(path)
    end = int(capture.query_positions[-1]) + 1
    copies = []
    for layer in capture.layers.values():
        keys, values = (_held(x[None, :, :end].to(dtype)) for x in (layer.keys, layer.values))
        queries = layer.queries[None].to(dtype)
        index = SketchIndex.build(keys, values, queries[:, :, capture.fitting()], backend=backend)
        copies.append(Copy(q=queries[:, :, -1].contiguous(), index=index))
    return capture.model, copies


def _held(x: Tensor) -> Tensor:
    """A copy in memory such as a cache has its tokens in."""
    return empty(tuple(x.shape), x.dtype, x.device).copy_(x)
