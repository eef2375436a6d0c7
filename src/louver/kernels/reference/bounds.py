"""bounds: upper and lower bounds of every sketched key, and their histograms."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.geometry.bounds import sliced_norms
from louver.geometry.metric import inverse_weight
from louver.geometry.rounding import UNIT, estimate_slack, radius_inflation, score_slack
from louver.kernels.ops import Bounds
from louver.kernels.reference.paging import contiguous
from louver.kernels.reference.product import matmul
from louver.kernels.reference.rows import exact_scores, row_lengths, to_rows, valid_rows
from louver.protocols import BoundSummary
from louver.shapes import Cache, PerRow, Query
from louver.sketch.encode import decode_frames
from louver.sketch.layout import NO_BOUND, Sketch, frame_centers, frame_scales, unpack_nibbles, unpack_radii

BINS = 1024
TOP_SHARE = 3 / 4  # of the bins lie between the mean and the largest upper bound, where the cuts are


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
    """Bound every sketched key's score; sinks and recent count tokens at a row's ends that are exact in any case."""
    sketch = sketch.by_row()
    num_blocks = int(sketch.num_blocks.max()) if sketch.num_blocks.numel() else 0
    estimate, half_width = _frame_bounds(q, sketch, num_blocks)
    length, longest = row_lengths(kv_start, kv_len)
    index = torch.arange(estimate.shape[2], device=q.device)
    closed = index < sketch.num_blocks[:, None] * sketch.config.frame_len
    free = closed & (index >= sinks) & (index < (length - recent)[:, None])
    bounded = (_radii(sketch, num_blocks) != NO_BOUND).all(-1).flatten(2)
    finite = torch.isfinite(estimate + half_width).unflatten(1, (keys.shape[1], -1)).all(2)
    undecided = free[:, None] & bounded & finite

    rows = to_rows(contiguous(keys, block_table), kv_start, length, longest)
    scores, absolute = exact_scores(q, rows)
    decided = valid_rows(length, longest).expand(-1, keys.shape[1], -1).clone()
    decided[:, :, : undecided.shape[2]] &= ~undecided
    summary = summarize(
        estimate,
        half_width,
        undecided.repeat_interleave(q.shape[1] // keys.shape[1], 1),
        scores - score_slack(absolute, q.shape[2]),
        decided.repeat_interleave(q.shape[1] // keys.shape[1], 1),
        length,
        softmax_scale,
    )
    return Bounds(estimate=estimate, half_width=half_width, undecided=undecided, summary=summary)


def _frame_bounds(q: Query, sketch: Sketch, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Estimates and half-widths [batch, num_q_heads, num_blocks * frame_len]; docs/guarantee.md, 2-4."""
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads, frame_len = sketch.key_codes.shape[1], sketch.config.frame_len
    x = torch.nn.functional.pad(q.float(), (0, sketch.dims - head_dim)).unflatten(1, (num_kv_heads, -1))
    frame, widest = sketch.key_frame[:, :, :num_blocks], sketch.key_scale[:, :, :num_blocks]
    scale = frame_scales(frame, widest)

    sketched = decode_frames(unpack_nibbles(sketch.key_codes[:, :, :num_blocks]), frame, widest)
    estimate = matmul(x, sketched.flatten(2, 3).transpose(-1, -2))  # batch kv_heads group keys

    inverse = inverse_weight(scale, sketch.query_weight[:, :, None], sketch.config.metric)
    norms = sliced_norms(
        x[:, :, None], inverse[:, :, :, None], sketch.config.slice_dims
    )  # batch kv blocks group slices
    least, unit = (part[:, :, :num_blocks, None] for part in (sketch.radius_least, sketch.radius_unit))
    radius = least + _radii(sketch, num_blocks).float() * unit
    reach = matmul(norms, radius.transpose(-1, -2))  # batch kv blocks group frame_len
    extent = (frame_centers(frame).abs() + 8) * scale
    slack = estimate_slack(matmul(x.abs(), extent.transpose(-1, -2)), head_dim)
    half_width = (reach * radius_inflation(head_dim)).transpose(2, 3) + slack[
        ..., None
    ]  # batch kv group blocks frame_len
    half_width = half_width.flatten(3, 4)
    half_width = half_width + 2 * UNIT * (estimate.abs() + half_width)  # adding the two rounds once more
    shape = (batch, num_q_heads, num_blocks * frame_len)
    return estimate.reshape(shape), half_width.reshape(shape)


def _radii(sketch: Sketch, num_blocks: int) -> Tensor:
    """Radius codes, uint8 [batch, kv_heads, num_blocks, frame_len, slices]."""
    return unpack_radii(sketch.key_radius[:, :, :num_blocks], sketch.config.frame_len)


def summarize(
    estimate: Float[Tensor, "batch heads sketched"],
    half_width: Float[Tensor, "batch heads sketched"],
    undecided: Tensor,
    decided_lower: Float[Tensor, "batch heads longest"],
    decided: Tensor,
    length: Int[Tensor, " batch"],
    softmax_scale: float,
) -> BoundSummary:
    """Histograms of undecided bounds; decided_lower are the scores of all keys less their rounding, read where decided."""
    upper, lower = estimate + half_width, estimate - half_width
    known = torch.where(decided & ~torch.isnan(decided_lower), decided_lower, -torch.inf)
    edges = _edges(torch.where(undecided, upper, torch.nan))
    upper_bin, lower_bin, known_bin = (bin_of(x, edges) for x in (upper, lower, known))
    every = torch.cat([known, torch.where(undecided, upper, -torch.inf)], -1)
    peak = every.amax(-1) if every.shape[-1] else every.new_full(every.shape[:-1], -torch.inf)
    shift = torch.where(torch.isfinite(peak), peak, 0.0) * softmax_scale

    def mass(score: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, torch.exp(score * softmax_scale - shift[..., None]), 0.0)

    def histogram(bin_index: Tensor, weight: Tensor) -> Tensor:
        return summed_by_bin(bin_index, weight, edges)

    best = torch.cat([known, torch.where(undecided, lower, -torch.inf)], -1)
    return BoundSummary(
        edges=edges,
        upper_count=histogram(upper_bin, undecided.int()),
        lower_count=histogram(lower_bin, undecided.int()) + histogram(known_bin, decided.int()),
        upper_mass=histogram(upper_bin, mass(upper, undecided)),
        lower_mass=histogram(upper_bin, mass(lower, undecided)),
        decided_mass=mass(known, decided).sum(-1),
        best_lower=best.amax(-1) if best.shape[-1] else best.new_full(best.shape[:-1], -torch.inf),
        shift=shift,
        num_keys=length,
        softmax_scale=softmax_scale,
    )


def bin_of(x: Float[Tensor, "batch heads n"], edges: Float[Tensor, "batch heads bins_plus_1"]) -> Tensor:
    """The bin each x falls into, int64: edges[i] > x >= edges[i + 1], the first and last bins being open."""
    inner = edges[..., 1:-1].flip(-1).contiguous()  # ascending
    return edges.shape[-1] - 2 - torch.searchsorted(inner, x.contiguous(), right=True)


def summed_by_bin(bin_index: Int[Tensor, "batch heads n"], weight: Tensor, edges: Tensor) -> Tensor:
    """Sum of the weights in each bin."""
    out = torch.zeros(*edges.shape[:-1], edges.shape[-1] - 1, dtype=weight.dtype, device=weight.device)
    return out.scatter_add_(-1, bin_index, weight)


def _edges(upper: Float[Tensor, "batch heads sketched"]) -> Float[Tensor, "batch heads bins_plus_1"]:
    """Descending edges: most bins between the mean and the largest upper bound, the rest below; NaN marks absent keys."""
    lead = upper.shape[:-1]
    if upper.shape[-1] == 0:
        upper = upper.new_full((*lead, 1), torch.nan)
    present = ~torch.isnan(upper)
    high = torch.where(present, upper, -torch.inf).amax(-1)
    low = torch.where(present, upper, torch.inf).amin(-1)
    mean = torch.where(present, upper, 0.0).sum(-1) / present.sum(-1).clamp_min(1)
    absent = ~torch.isfinite(high)
    high, low, mean = (torch.where(absent, 0.0, x) for x in (high, low, mean))
    mean = torch.minimum(torch.maximum(mean, low), high)
    num_top = int(BINS * TOP_SHARE)
    top = torch.linspace(0, 1, num_top, device=upper.device)
    rest = torch.linspace(0, 1, BINS - num_top + 1, device=upper.device)[1:-1]
    inner = torch.cat(
        [high[..., None] + (mean - high)[..., None] * top, mean[..., None] + (low - mean)[..., None] * rest], -1
    )
    # Rounding must not make an edge rise, nor overflow in a spread of 2^128 leave a hole.
    inner = torch.nan_to_num(inner, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).cummin(-1).values
    ends = inner.new_full((*lead, 1), torch.inf)
    return torch.cat([ends, inner, -ends], -1)
