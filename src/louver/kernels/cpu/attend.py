"""step, attend_tiers and attend_dense: native twins of the reference's ops."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from louver.kernels.cpu import native
from louver.kernels.cpu.native import Cache, share
from louver.kernels.ops import Bounds, TierOutput
from louver.protocols import COUNTS, CutRule, Cuts
from louver.shapes import PerQueryHead, PerRow, Query
from louver.sketch.layout import Sketch

EVIDENCE = ("lse", "certificate", "arithmetic_bound", "dropped_mass_bound", "tau")


def attend_dense(
    q: Query,
    keys: Cache,
    values: Cache,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> tuple[Query, PerQueryHead]:
    """Exact attention over every valid token; see louver.kernels.reference.attend_dense."""
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2])
    native.load().attend_dense(
        share(q.contiguous()), share(keys), share(values), share(kv_start), share(kv_len), share(block_table),
        softmax_scale, share(out), share(lse), native.num_threads(), native.isa,
    )  # fmt: skip
    return out, lse


def attend_tiers(
    q: Query,
    keys: Cache,
    values: Cache,
    sketch: Sketch,
    bounds: Bounds,
    cuts: Cuts,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    drop: bool,
    record: bool = False,
    block_table: Int[Tensor, "batch pages"] | None = None,
    before: tuple[TierOutput, Bool[Tensor, "batch num_kv_heads"]] | None = None,
) -> TierOutput:
    """One decode step, every key in the tier its upper bound puts it in; see louver.kernels.reference.attend_tiers."""
    room = Room(q, keys, record, block_table)
    changed = None if before is None else room.start_from(*before)
    rank = None if cuts.rank is None else share(cuts.rank.long().contiguous())
    native.load().attend_tiers(
        native.sketch_view(sketch), share(q.contiguous()), share(keys), share(values), share(kv_start), share(kv_len),
        share(block_table), softmax_scale, share(bounds.estimate.contiguous()), share(bounds.half_width.contiguous()),
        share(bounds.undecided.contiguous().view(torch.uint8)), share(cuts.unread.contiguous()),
        share(cuts.fine.contiguous()), share(cuts.exact.contiguous()), rank, drop, changed, *room.shared(),
        native.num_threads(), native.isa,
    )  # fmt: skip
    return room.output()


def step(
    q: Query,
    keys: Cache,
    values: Cache,
    sketch: Sketch,
    rule: CutRule,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    sinks: int = 0,
    recent: int = 0,
    keep_best: bool = False,
    record: bool = False,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> TierOutput:
    """One decode step under a rule, fused; see louver.kernels.reference.step."""
    room = Room(q, keys, record, block_table)
    native.load().step(
        native.sketch_view(sketch), share(q.contiguous()), share(keys), share(values), share(kv_start), share(kv_len),
        share(block_table), softmax_scale, rule_values(rule, sinks, recent, keep_best), *room.shared(),
        native.num_threads(), native.isa,
    )  # fmt: skip
    return room.output()


def rule_values(rule: CutRule, sinks: int, recent: int, keep_best: bool) -> tuple:
    """A rule as the extension takes it."""
    return rule.drop, rule.share, rule.count, rule.tau, rule.unread_mass, sinks, recent, keep_best


class Room:
    """Where a step's output and evidence go."""

    def __init__(self, q: Query, keys: Cache, record: bool, block_table: Tensor | None) -> None:
        batch, num_q_heads, _ = q.shape
        self.out = torch.empty(q.shape, dtype=q.dtype)
        self.evidence = torch.empty(5, batch, num_q_heads)
        self.counts = torch.empty(batch, keys.shape[1], len(COUNTS), dtype=torch.int64)
        self.mask = None
        if record:
            width = keys.shape[2] * (1 if block_table is None else block_table.shape[1])
            self.mask = torch.zeros(batch, num_q_heads, width, dtype=torch.bool)

    def shared(self) -> tuple:
        """As the extension takes them."""
        mask = None if self.mask is None else share(self.mask.view(torch.uint8))
        return share(self.out), share(self.evidence), share(self.counts), mask

    def start_from(self, step: TierOutput, changed: Tensor) -> Any:
        """Hold an earlier step's results, but for the KV heads [batch, num_kv_heads] that changed; those, for the extension."""
        self.out.copy_(step.out)
        self.evidence[:] = torch.stack([getattr(step, name) for name in EVIDENCE])
        self.counts.copy_(step.counts)
        if self.mask is not None and step.exact_mask is not None:
            group_size = self.mask.shape[1] // changed.shape[1]
            kept = ~changed.repeat_interleave(group_size, 1)
            torch.logical_and(step.exact_mask, kept[..., None], out=self.mask)
        return share(changed.contiguous().view(torch.uint8))

    def output(self) -> TierOutput:
        """What was written there."""
        evidence = dict(zip(EVIDENCE, self.evidence.unbind(), strict=True))
        return TierOutput(out=self.out, counts=self.counts, exact_mask=self.mask, **evidence)
