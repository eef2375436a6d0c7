"""error:EPS: drop nothing, and be exact enough that the certificate proves a relative error of at most EPS.

A first look attends the ``base`` share exactly and leaves unread what has little mass. Its certificate shows what each key adds to the
bound (docs/guarantee.md, 8); the histograms of those terms by upper bound give the cheapest pair of thresholds, in bytes, whose
remaining terms sum to what was asked. The step is then attended again, reading only what the first look has not read. Where the
certificate still exceeds EPS |out|, every key of that head is exact, and the certificate is 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from louver.errors import PolicyError
from louver.kernels.ops import ErrorTerms
from louver.kernels.reference.resolve import resolve
from louver.policies.base import BasePolicy, number
from louver.protocols import BoundSummary, CutRule, Cuts, Guarantee
from louver.shapes import PerQueryHead

BASE_SHARE = 0.002  # exact at the first look
BASE_UNREAD = 0.2  # share of the mass whose values may go unread at the first look
FIRST = CutRule(drop=False, share=BASE_SHARE, unread_mass=BASE_UNREAD)


@dataclass(frozen=True, kw_only=True)
class OutputError(BasePolicy):
    """Certify |o - out| <= error |out| for every query head, arithmetic aside, at the least bytes."""

    name: ClassVar[str] = "error"
    drops: ClassVar[bool] = False
    guarantee: ClassVar[Guarantee] = "certified"
    error: float  # certificate over the norm of the output, at most; changes results

    def check(self) -> None:
        """A relative error."""
        if not 0 < self.error < 1:
            raise PolicyError(f"error:{self.error} is not a relative error to ask for; wanted above 0 and below 1")

    def argument(self) -> str:
        """The relative error."""
        return number(self.error)

    def cuts(self, summary: BoundSummary) -> Cuts:
        """The first look: a small share exact, and what has little mass unread."""
        return resolve(FIRST, summary)

    def settle(self, summary: BoundSummary, terms: ErrorTerms, allowed: PerQueryHead) -> Cuts:
        """The cheapest cuts whose terms sum to at most ``allowed`` (in the values' norm), by the histograms.

        Exact above edge i, coarse from i to edge j, unread below: with C(i) the coarse terms below i, and D(j) what the terms below j
        grow by when they are unread, C(i) + D(j) <= allowed Z(i) is asked, Z(i) being the smallest total mass.
        """
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
