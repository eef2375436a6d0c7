"""What a decode step reads, in bytes, per KV head. One place, so every figure counts the same things.

Counted: the codes, radii and frames of all closed keys; the value codes of the keys read coarsely and the frames of the blocks
they lie in; the 16-bit key of every scanned key and the 16-bit value of every exact key (the cache's own width when that
is wider counts as 16 bits too, on both sides of the ratio); the open block in full. Not counted: the query, the output, and
what a backend spills between its passes, which is its own affair and shows in its time.
"""

from jaxtyping import Int
from torch import Tensor

CACHE_BYTES = 2  # per element of a 16-bit cache, the unit every ratio is stated against
FRAME_BYTES = 3  # per channel: a float16 center and an 8-bit scale


def frame_bytes(num_dims: int) -> int:
    """Bytes of one block's frame: center and scale per channel."""
    return FRAME_BYTES * num_dims


def key_block_bytes(num_dims: int, num_slices: int, frame_len: int) -> int:
    """Bytes of one block's keys in the sketch: codes, radii, frame and radius units."""
    return frame_len * (num_dims // 2 + num_slices) + frame_bytes(num_dims) + 4 * num_slices


def step_bytes(
    *,
    num_blocks: Int[Tensor, "batch num_kv_heads"],
    num_open: Int[Tensor, "batch num_kv_heads"],
    num_scanned: Int[Tensor, "batch num_kv_heads"],
    num_exact: Int[Tensor, "batch num_kv_heads"],
    num_coarse: Int[Tensor, "batch num_kv_heads"],
    num_value_blocks: Int[Tensor, "batch num_kv_heads"],
    head_dim: int,
    num_dims: int,
    num_slices: int,
    frame_len: int,
) -> Int[Tensor, "batch num_kv_heads"]:
    """Bytes one step reads. num_scanned and num_exact count keys of closed blocks; num_open is added in full."""
    row = CACHE_BYTES * head_dim
    return (
        num_blocks * key_block_bytes(num_dims, num_slices, frame_len)
        + num_open * 2 * row
        + num_scanned * row
        + num_exact * row
        + num_coarse * (num_dims // 2)
        + num_value_blocks * (frame_bytes(num_dims) + 8)
    )


def dense_bytes(num_keys: Int[Tensor, "*shape"], head_dim: int) -> Int[Tensor, "*shape"]:
    """Bytes dense attention reads for num_keys keys and values in 16 bits."""
    return num_keys * (2 * CACHE_BYTES * head_dim)
