"""tighten: score the keys whose upper bounds reach a cut, and summarise the bounds with their scores in place.

A scored key's real score lies within rounding of its computed one, so what holds of a summary of bounds (docs/guarantee.md, 6)
holds of this one, and a policy may look again. Cost: the keys scored are read in full, once, for all heads of their GQA group.
"""

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from louver.geometry.rounding import score_slack
from louver.kernels.ops import Bounds
from louver.kernels.reference.bounds import summarize
from louver.kernels.reference.paging import contiguous
from louver.kernels.reference.rows import exact_scores, row_lengths, to_rows, valid_rows
from louver.protocols import BoundSummary
from louver.shapes import Cache, PerQueryHead, PerRow, Query


def tighten(
    q: Query,
    keys: Cache,
    bounds: Bounds,
    cut: PerQueryHead,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    retire: bool = False,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> BoundSummary:
    """A summary in which the keys with upper >= cut, for any head of a group, are bounded by their scores.

    retire: the keys with upper < cut are dropped; they leave the histograms, and their mass becomes ``retired_mass``.
    """
    length, longest = row_lengths(kv_start, kv_len)
    rows = to_rows(contiguous(keys, block_table), kv_start, length, longest)
    group_size = q.shape[1] // rows.shape[1]
    scores, absolute = exact_scores(q, rows)
    slack = score_slack(absolute, q.shape[2])
    held = min(bounds.undecided.shape[2], longest)  # a shorter row's blocks may end beyond its tokens
    decided = valid_rows(length, longest).expand(-1, rows.shape[1], -1).clone()
    decided[..., :held] &= ~bounds.undecided[..., :held]

    undecided = bounds.undecided[..., :held].repeat_interleave(group_size, 1)
    reached = ~(bounds.upper[..., :held] < cut[..., None])
    read = reached.unflatten(1, (-1, group_size)).any(2).repeat_interleave(group_size, 1)
    narrower = read & (slack[..., :held] < bounds.half_width[..., :held])
    estimate = torch.where(narrower, scores[..., :held], bounds.estimate[..., :held])
    half_width = torch.where(narrower, slack[..., :held], bounds.half_width[..., :held])
    kept = undecided & reached if retire else undecided
    summary = summarize(
        estimate, half_width, kept, scores - slack, decided.repeat_interleave(group_size, 1), length, softmax_scale
    )
    if not retire:
        return summary
    weight = torch.exp((estimate + half_width) * softmax_scale - summary.shift[..., None])
    return replace(summary, retired_mass=torch.where(undecided & ~reached, weight, 0.0).sum(-1))
