"""What a decode step reads, in bytes, per KV head. One place, so every figure counts the same things.

Counted: the codes, radii and frames of all closed keys; the value codes of the keys read coarsely and the frames of the blocks
they lie in; the 16-bit key of every scanned key and the 16-bit value of every exact key (the cache's own width when that
is wider counts as 16 bits too, on both sides of the ratio); the open block in full. Not counted: the query, the output, and
what a backend spills between its passes, which is its own affair and shows in its time.
"""

from functools import cache

from louver.protocols import COUNTS
from louver.sketch.layout import half_len

CACHE_BYTES = 2  # per element of a 16-bit cache, the unit every ratio is stated against
FRAME_BYTES = 2  # per channel: a center and a scale in 16 bits


def frame_bytes(num_dims: int) -> int:
    """Bytes of one block's frame: center and scale per channel, and the widest scale."""
    return FRAME_BYTES * num_dims + 1


def value_frame_bytes(num_dims: int) -> int:
    """Bytes of one block's value frame and of the two bounds beside it."""
    return frame_bytes(num_dims) + 8


def key_block_bytes(num_dims: int, num_slices: int, frame_len: int) -> int:
    """Bytes of one block's keys in the sketch: codes, radii, frame, and where radii begin and what their units are."""
    radii = half_len(frame_len) + 8
    return frame_len * (num_dims // 2) + radii * num_slices + frame_bytes(num_dims)


@cache  # asked at every step
def byte_weights(head_dim: int, num_dims: int, num_slices: int, frame_len: int) -> tuple[int, ...]:
    """Bytes per unit of each of louver.protocols.COUNTS, for a step that a sketch serves."""
    row = CACHE_BYTES * head_dim
    weights = {
        "keys": 0,
        "blocks": key_block_bytes(num_dims, num_slices, frame_len),
        "open": 2 * row,
        "scanned": row,
        "exact": row,
        "coarse": num_dims // 2,
        "value_blocks": value_frame_bytes(num_dims),
    }
    return tuple(weights[name] for name in COUNTS)


def plain_byte_weights(head_dim: int) -> tuple[int, ...]:
    """The same for a step without a sketch: a scanned key and an exact value are read in full, nothing else is."""
    row = CACHE_BYTES * head_dim
    weights = {"open": 2 * row, "scanned": row, "exact": row}
    return tuple(weights.get(name, 0) for name in COUNTS)
