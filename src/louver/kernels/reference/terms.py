"""What each undecided key adds to the output certificate, by upper bound: what `settle` spends by.

Nothing rests on these sums: a certificate is computed from what was done. They say where it comes from (docs/guarantee.md, 8).
"""

import torch

from louver.geometry.rounding import logit_slack, norm_above
from louver.kernels.ops import Bounds, ErrorTerms
from louver.kernels.reference.bounds import bin_of, summed_by_bin
from louver.shapes import Query
from louver.sketch.accounting import CACHE_BYTES
from louver.sketch.layout import Sketch


def error_terms(out: Query, sketch: Sketch, bounds: Bounds) -> ErrorTerms:
    """The terms of a step whose output, in float32, is about ``out`` [batch, num_q_heads, head_dim]."""
    sketch, summary, scale = sketch.by_row(), bounds.summary, bounds.summary.softmax_scale
    group_size = out.shape[1] // sketch.value_mean.shape[1]
    sketched = bounds.estimate.shape[2]
    num_blocks = sketched // sketch.config.frame_len

    def per_key(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, :num_blocks].repeat_interleave(sketch.config.frame_len, -1).repeat_interleave(group_size, 1)

    spread = per_key(sketch.value_spread)
    error = spread if sketch.value_error is None else per_key(sketch.value_error)
    mean = sketch.value_mean[..., : out.shape[-1]].repeat_interleave(group_size, 1)
    away = norm_above(mean - out.float())[..., None]

    undecided = bounds.undecided.repeat_interleave(group_size, 1)
    logit = bounds.estimate * scale - summary.shift[..., None]
    off = bounds.half_width * scale
    off = off + logit_slack((bounds.estimate * scale).abs() + off + summary.shift.abs()[..., None])
    weight = torch.where(undecided, torch.exp(logit), 0.0)
    surplus = torch.where(undecided, torch.exp(logit + off), 0.0) - weight
    shifted = torch.where(undecided, surplus * (spread + away), 0.0)
    place = bin_of(torch.where(undecided, bounds.upper, -torch.inf), summary.edges)

    def binned(x: torch.Tensor) -> torch.Tensor:
        return summed_by_bin(place, torch.where(undecided, x, 0.0), summary.edges)

    row = CACHE_BYTES * sketch.head_dim
    return ErrorTerms(
        coarse=binned(shifted + weight * error),
        unread=binned(shifted + weight * spread),
        mass=binned(weight),
        exact_bytes=2 * row,
        coarse_bytes=sketch.dims // 2,
    )
