"""attend_within and attend_mass: steps that certify what they are asked for, in one call.

What attention/within.py and attention/looks.py do over any backend's ops.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from louver.kernels.cpu import native
from louver.kernels.cpu.attend import Room
from louver.kernels.cpu.native import Cache, share
from louver.kernels.ops import TierOutput
from louver.protocols import CutRule
from louver.shapes import PerRow, Query
from louver.sketch.accounting import byte_weights
from louver.sketch.layout import Sketch


def attend_within(
    q: Query,
    keys: Cache,
    values: Cache,
    sketch: Sketch,
    first: CutRule,
    error: float,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    sinks: int = 0,
    recent: int = 0,
    record: bool = False,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> tuple[TierOutput, Int[Tensor, "batch num_kv_heads"]]:
    """One step with certificate + arithmetic <= error |out| or certificate 0, per query head; and bytes that the counts don't cover.

    first: a rule whose share of the keys is exact in any case. The bytes are of value codes, and frames, that a pass read of keys which
    are exact in the end.
    """
    room = Room(q, keys, record, block_table)
    more = torch.empty(q.shape[0], keys.shape[1], dtype=torch.int64)
    native.load().attend_within(
        native.sketch_view(sketch), share(q.contiguous()), share(keys), share(values), share(kv_start), share(kv_len),
        share(block_table), softmax_scale, first.share,
        error, sinks, recent, _bytes_of(sketch), *room.shared(), share(more),
        native.num_threads(), native.isa,
    )  # fmt: skip
    return room.output(), more


def attend_mass(
    q: Query,
    keys: Cache,
    values: Cache,
    sketch: Sketch,
    dropped_mass: float,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    sinks: int = 0,
    recent: int = 0,
    keep_best: bool = False,
    record: bool = False,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> TierOutput:
    """One step that drops keys whose certified share of the mass is at most ``dropped_mass``, or none of its KV head's."""
    room = Room(q, keys, record, block_table)
    native.load().attend_mass(
        native.sketch_view(sketch), share(q.contiguous()), share(keys), share(values), share(kv_start), share(kv_len),
        share(block_table), softmax_scale, (dropped_mass, sinks, recent, keep_best), _bytes_of(sketch), *room.shared(),
        native.num_threads(), native.isa,
    )  # fmt: skip
    return room.output()


def _bytes_of(sketch: Sketch) -> tuple[int, ...]:
    """What each of COUNTS costs."""
    return byte_weights(sketch.head_dim, sketch.dims, sketch.num_slices, sketch.config.frame_len)
