"""A KV head whose step would read at least what dense attention reads goes dense: every key of it is exact.

The sketch has been read by then, and stays counted: such a head reads 1 + the sketch's share of dense attention's bytes, its certificate
is 0, and its keys and values are read as one stream. Tensor code throughout: no host waits for the decision.
"""

from types import ModuleType

from jaxtyping import Bool, Int
from torch import Tensor

from louver.attention.asked import everything_where
from louver.kernels.ops import Bounds
from louver.protocols import COUNTS, Cuts
from louver.sketch.accounting import CACHE_BYTES, byte_weights
from louver.sketch.layout import Sketch


def blocks_of(keys: Bool[Tensor, "batch num_kv_heads sketched"], frame_len: int) -> Int[Tensor, "batch num_kv_heads"]:
    """How many blocks hold one of the keys."""
    return keys.unflatten(-1, (-1, frame_len)).any(-1).sum(-1)


def dense_where_dearer(cuts: Cuts, bounds: Bounds, sketch: Sketch, drops: bool, ops: ModuleType) -> Cuts:
    """The cuts, lowered to everything for the KV heads whose step would read at least as much as dense attention.

    A dropping step is taken to read the values of all keys that it scores: which of them it keeps is known only afterwards.
    """
    frame_len, num_keys = sketch.config.frame_len, bounds.summary.num_keys[:, None]
    closed = sketch.num_blocks[:, None] * frame_len
    lowest = cuts.unread if drops else cuts.exact
    undecided, exact, coarse, value_blocks = ops.count_tiers(bounds, cuts.unread, lowest, frame_len).unbind(-1)
    sizes = byte_weights(sketch.head_dim, sketch.dims, sketch.num_slices, frame_len)
    weight = dict(zip(COUNTS, sizes, strict=True))
    spent = sketch.num_blocks[:, None] * weight["blocks"] + (num_keys - closed) * weight["open"]
    spent = spent + (closed - undecided + exact) * (weight["scanned"] + weight["exact"])
    spent = spent + coarse * weight["coarse"] + value_blocks * weight["value_blocks"]
    dearer = (spent >= num_keys * 2 * CACHE_BYTES * sketch.head_dim) & (num_keys > 0)
    dearer = dearer.repeat_interleave(cuts.exact.shape[1] // dearer.shape[1], 1)
    return everything_where(dearer, cuts)
