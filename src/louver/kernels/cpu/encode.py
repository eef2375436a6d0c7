"""encode_block: the native twin of the reference's op."""

from jaxtyping import Int
from torch import Tensor

from louver.kernels.cpu import native
from louver.kernels.cpu.native import Cache, share
from louver.shapes import PerRow
from louver.sketch.layout import Sketch


def encode_block(
    keys: Cache,
    values: Cache | None,
    sketch: Sketch,
    kv_start: PerRow,
    kv_len: PerRow,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> None:
    """Close the blocks that are full; see louver.kernels.reference.encode_block."""
    native.load().encode_block(
        native.sketch_view(sketch),
        share(keys),
        share(values),
        share(kv_start),
        share(kv_len),
        share(block_table),
        native.num_threads(),
        native.isa,
    )
