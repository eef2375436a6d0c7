"""settle: the cheapest cuts, in bytes, whose certificate is about what was asked, by the histograms.

Nothing rests on them: a certificate is computed from what was done. They say where to spend (docs/guarantee.md, 8).
"""

import torch
from torch import Tensor

from louver.kernels.ops import Bounds
from louver.kernels.reference.terms import error_terms
from louver.protocols import Cuts
from louver.shapes import PerQueryHead, Query
from louver.sketch.layout import Sketch


def settle(out: Query, sketch: Sketch, bounds: Bounds, allowed: PerQueryHead) -> Cuts:
    """The cheapest cuts whose terms sum to at most ``allowed`` (in the values' norm), for a step whose output is about ``out``.

    Exact above edge i, coarse from i to edge j, unread below: with C(i) the coarse terms below i, and D(j) what the terms below j
    grow by when they are unread, C(i) + D(j) <= allowed Z(i) is asked, Z(i) being the smallest total mass. A head with allowed =
    +inf is not asked, and what is returned for it means nothing.
    """
    summary, terms = bounds.summary, error_terms(out, sketch, bounds)
    exact, coarse = terms.exact_bytes, terms.coarse_bytes
    total = summary.decided_mass[..., None] + _above(terms.mass) + _below(summary.lower_mass)
    room = allowed[..., None] * total - _below(terms.coarse)
    grown = _below((terms.unread - terms.coarse).clamp_min(0))  # descends with j
    bins = grown.shape[-1] - 1
    # The first j, at or below i, with D(j) <= room(i); grown ascends when flipped.
    fitting = torch.searchsorted(grown.flip(-1).contiguous(), room.contiguous(), right=True)
    last = torch.arange(bins + 1, device=room.device)
    unread_from = torch.maximum(bins + 1 - fitting, last)
    count = _above(summary.upper_count.to(torch.int64))
    num_read = count.gather(-1, unread_from.clamp_max(bins))
    cost = count * (exact - coarse) + num_read * coarse
    cost = torch.where((room >= 0) & (fitting > 0), cost, torch.iinfo(torch.int64).max)
    cost[..., bins] = count[..., bins] * exact  # everything exact always does
    best = cost.argmin(-1, keepdim=True)
    chosen = summary.edges.gather(-1, best)[..., 0]
    read = summary.edges.gather(-1, unread_from.gather(-1, best).clamp_max(bins))[..., 0]
    return Cuts(unread=torch.minimum(read, chosen), fine=chosen, exact=chosen)


def _above(histogram: Tensor) -> Tensor:
    """Sum of the bins before edge i, for every edge."""
    return torch.nn.functional.pad(histogram.cumsum(-1), (1, 0))


def _below(histogram: Tensor) -> Tensor:
    """Sum of the bins from edge i on, for every edge."""
    return torch.nn.functional.pad(histogram.flip(-1).cumsum(-1).flip(-1), (0, 1))
