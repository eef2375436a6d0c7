"""step: one decode step from a rule: bounds, resolve, attend_tiers. Fast backends fuse it; this is what they must equal."""

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from louver.kernels.ops import TierOutput
from louver.kernels.reference.attend import attend_tiers
from louver.kernels.reference.bounds import bounds
from louver.kernels.reference.resolve import resolve
from louver.protocols import BoundSummary, CutRule, Cuts
from louver.shapes import Cache, PerRow, Query
from louver.sketch.layout import Sketch


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
    """One decode step under a rule. sinks and recent tokens are exact; keep_best never lets a retrieval select nothing."""
    found = bounds(q, keys, sketch, kv_start, kv_len, softmax_scale, sinks, recent, block_table)
    cuts = resolve(rule, found.summary)
    if keep_best:
        cuts = keep_the_best(cuts, found.summary)
    return attend_tiers(
        q, keys, values, sketch, found, cuts, kv_start, kv_len, softmax_scale, rule.drop, record, block_table
    )


def keep_the_best(cuts: Cuts, summary: BoundSummary) -> Cuts:
    """Lower the cuts so that the key with the best score is exact: its upper bound is at least every lower bound."""
    names = ("unread", "fine", "exact")
    return replace(cuts, **{name: torch.minimum(getattr(cuts, name), summary.best_lower) for name in names})
