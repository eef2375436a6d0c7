"""bounds, tighten and count_tiers: native twins of the reference's ops, which policies look at."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from louver.kernels.cpu import native
from louver.kernels.cpu.native import Cache, share
from louver.kernels.ops import Bounds
from louver.kernels.reference.bounds import BINS
from louver.kernels.reference.counts import TIER_COUNTS
from louver.protocols import BoundSummary
from louver.shapes import PerQueryHead, PerRow, Query
from louver.sketch.layout import Sketch

SUMMARY = (
    "edges",
    "upper_count",
    "lower_count",
    "upper_mass",
    "lower_mass",
    "decided_mass",
    "best_lower",
    "shift",
    "retired_mass",
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
    sketched = (int(sketch.num_blocks.max()) if batch else 0) * sketch.config.frame_len
    estimate, half_width = (torch.zeros(batch, num_q_heads, sketched) for _ in range(2))
    undecided = torch.zeros(batch, keys.shape[1], sketched, dtype=torch.bool)
    known = _nothing_known(q, kv_start, kv_len)
    native.load().bounds(
        native.sketch_view(sketch), share(q.contiguous()), share(keys), share(kv_start), share(kv_len),
        share(block_table), sinks, recent, share(estimate), share(half_width), share(undecided.view(torch.uint8)),
        share(known), native.num_threads(), native.isa,
    )  # fmt: skip
    summary = _summarize(
        kv_start, kv_len, softmax_scale, estimate, half_width, undecided.view(torch.uint8), known, False
    )
    return Bounds(estimate=estimate, half_width=half_width, undecided=undecided, summary=summary)


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
    """A summary in which the keys above a cut are bounded by their scores; see louver.kernels.reference.tighten."""
    estimate, half_width = torch.empty_like(bounds.estimate), torch.empty_like(bounds.half_width)
    state = torch.empty(bounds.estimate.shape, dtype=torch.uint8)
    known = _nothing_known(q, kv_start, kv_len)
    native.load().tighten(
        share(q.contiguous()), share(keys), share(kv_start), share(kv_len), share(block_table), *_shared(bounds),
        share(cut.contiguous()), retire, share(estimate), share(half_width), share(state), share(known),
        native.num_threads(), native.isa,
    )  # fmt: skip
    return _summarize(kv_start, kv_len, softmax_scale, estimate, half_width, state, known, retire)


def count_tiers(
    bounds: Bounds,
    unread: PerQueryHead,
    exact: PerQueryHead,
    frame_len: int,
    coded: Bool[Tensor, "batch num_kv_heads sketched"] | None = None,
) -> Int[Tensor, "batch num_kv_heads 4"]:
    """What a step under given cuts would read; see louver.kernels.reference.count_tiers."""
    counts = torch.empty(*bounds.undecided.shape[:2], len(TIER_COUNTS), dtype=torch.int64)
    native.load().count_tiers(
        *_shared(bounds), share(unread.contiguous()), share(exact.contiguous()), frame_len,
        None if coded is None else share(coded.view(torch.uint8)), share(counts), native.num_threads(), native.isa,
    )  # fmt: skip
    return counts


def _nothing_known(q: Query, kv_start: PerRow, kv_len: PerRow) -> Float[Tensor, "batch num_q_heads longest"]:
    longest = int((kv_len - kv_start).max()) if q.shape[0] else 0
    return torch.full((*q.shape[:2], max(0, longest)), -torch.inf)


def _shared(bounds: Bounds) -> tuple:
    """The parts of bounds that every op reads, as the extension takes them."""
    parts = (bounds.estimate, bounds.half_width, bounds.undecided.view(torch.uint8))
    return tuple(share(x.contiguous()) for x in parts)


def _summarize(
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    estimate: Float[Tensor, "batch num_q_heads sketched"],
    half_width: Float[Tensor, "batch num_q_heads sketched"],
    state: Tensor,
    known: Float[Tensor, "batch num_q_heads longest"],
    retire: bool,
) -> BoundSummary:
    """Histograms; state is uint8 [batch, num_kv_heads or num_q_heads, sketched]: 0 decided or absent, 1 undecided, 2 retired."""
    lead = estimate.shape[:2]
    masses = [torch.empty(*lead, BINS) for _ in range(2)]
    counts = [torch.empty(*lead, BINS, dtype=torch.int32) for _ in range(2)]
    decided_mass, best_lower, shift = torch.empty(3, *lead).unbind()
    summary = BoundSummary(
        edges=torch.empty(*lead, BINS + 1),
        upper_count=counts[0],
        lower_count=counts[1],
        upper_mass=masses[0],
        lower_mass=masses[1],
        decided_mass=decided_mass,
        best_lower=best_lower,
        shift=shift,
        num_keys=(kv_len - kv_start).clamp_min(0),
        softmax_scale=softmax_scale,
        retired_mass=torch.empty(lead) if retire else None,
    )
    native.load().summarize(
        share(kv_start), share(kv_len), softmax_scale, share(estimate), share(half_width), share(state), share(known),
        _shared_summary(summary), native.num_threads(), native.isa,
    )  # fmt: skip
    return summary


def _shared_summary(summary: BoundSummary) -> list:
    return [share(getattr(summary, name)) for name in SUMMARY]
