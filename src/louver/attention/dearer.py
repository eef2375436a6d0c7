"""A KV head whose step would read at least what dense attention reads goes dense: every key of it is exact.

The sketch has been read by then, and stays counted: such a head reads 1 + the sketch's share of dense attention's bytes, its certificate
is 0, and its keys and values are read as one stream. Tensor code throughout: no host waits for the decision.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from louver.attention.asked import everything_where
from louver.kernels.ops import Bounds
from louver.protocols import COUNTS, Cuts
from louver.shapes import PerQueryHead
from louver.sketch.accounting import CACHE_BYTES, byte_weights
from louver.sketch.layout import Sketch


def shared_by_group(bounds: Bounds, cut: PerQueryHead) -> Bool[Tensor, "batch num_kv_heads sketched"]:
    """The undecided keys whose upper bound reaches the cut for some head of the group."""
    reached = ~(bounds.upper < cut[..., None])
    return reached.unflatten(1, (bounds.undecided.shape[1], -1)).any(2) & bounds.undecided


def blocks_of(keys: Bool[Tensor, "batch num_kv_heads sketched"], frame_len: int) -> Int[Tensor, "batch num_kv_heads"]:
    """How many blocks hold one of the keys."""
    return keys.unflatten(-1, (-1, frame_len)).any(-1).sum(-1)


def dense_where_dearer(cuts: Cuts, bounds: Bounds, sketch: Sketch, drops: bool) -> Cuts:
    """The cuts, lowered to everything for the KV heads whose step would read at least as much as dense attention.

    A dropping step is taken to read the values of all keys that it scores: which of them it keeps is known only afterwards.
    """
    frame_len, num_keys = sketch.config.frame_len, bounds.summary.num_keys[:, None]
    closed = sketch.num_blocks[:, None] * frame_len
    exact = shared_by_group(bounds, cuts.unread if drops else cuts.exact)
    coarse = torch.zeros_like(exact) if drops else shared_by_group(bounds, cuts.unread) & ~exact
    decided = closed - bounds.undecided.sum(-1)  # of the closed keys
    read = decided + exact.sum(-1)
    columns = {
        "keys": num_keys,
        "blocks": sketch.num_blocks[:, None],
        "open": num_keys - closed,
        "scanned": read,
        "exact": read,
        "coarse": coarse.sum(-1),
        "value_blocks": blocks_of(coarse, frame_len),
    }
    weights = byte_weights(sketch.head_dim, sketch.dims, sketch.num_slices, frame_len)
    spent = sum((columns[name] * weight for name, weight in zip(COUNTS, weights, strict=True)), torch.zeros_like(read))
    dearer = (spent >= num_keys * 2 * CACHE_BYTES * sketch.head_dim) & (num_keys > 0)
    dearer = dearer.repeat_interleave(cuts.exact.shape[1] // dearer.shape[1], 1)
    return everything_where(dearer, cuts)
