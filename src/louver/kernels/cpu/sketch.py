"""encode_block and bounds: native twins of the reference's ops."""

import torch
from jaxtyping import Int
from torch import Tensor

from louver.kernels.cpu import native
from louver.kernels.cpu.native import Cache, share
from louver.kernels.ops import Bounds
from louver.kernels.reference.bounds import summarize
from louver.shapes import PerRow, Query
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


def bounds(
    q: Query,
    keys: Cache,
    sketch: Sketch,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    sinks: int = 0,
    recent: int = 0,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> Bounds:
    """Bound every sketched key's score; see louver.kernels.reference.bounds."""
    batch, num_q_heads, _ = q.shape
    num_kv_heads = keys.shape[1]
    length = (kv_len - kv_start).clamp_min(0)
    longest = int(length.max()) if batch else 0
    sketched = (int(sketch.num_blocks.max()) if batch else 0) * sketch.config.frame_len
    estimate, half_width = (torch.zeros(batch, num_q_heads, sketched) for _ in range(2))
    undecided = torch.zeros(batch, num_kv_heads, sketched, dtype=torch.bool)
    known = torch.full((batch, num_q_heads, longest), -torch.inf)
    native.load().bounds(
        native.sketch_view(sketch), share(q.contiguous()), share(keys), share(kv_start), share(kv_len),
        share(block_table), sinks, recent, share(estimate), share(half_width), share(undecided.view(torch.uint8)),
        share(known), native.num_threads(), native.isa,
    )  # fmt: skip
    decided = (torch.arange(longest) < length[:, None])[:, None].repeat(1, num_kv_heads, 1)
    decided[:, :, :sketched] &= ~undecided[:, :, :longest]
    group_size = num_q_heads // num_kv_heads
    summary = summarize(
        estimate,
        half_width,
        undecided.repeat_interleave(group_size, 1),
        known,
        decided.repeat_interleave(group_size, 1),
        length,
        softmax_scale,
    )
    return Bounds(estimate=estimate, half_width=half_width, undecided=undecided, summary=summary)
