"""error:EPS: drop nothing, and be exact enough that the certificate proves a relative error of at most EPS.

A first look attends the ``base`` share exactly and leaves unread what has little mass. Its certificate shows what each key adds to the
bound (docs/guarantee.md, 8); the histograms of those terms by upper bound give the cheapest pair of thresholds, in bytes, whose
remaining terms sum to what was asked. The step is then attended again, reading only what the first look has not read. Where the
certificate still exceeds EPS |out|, every key of that head is exact, and the certificate is 0.
"""

from dataclasses import dataclass
from typing import ClassVar

from louver.errors import PolicyError
from louver.kernels.reference.resolve import resolve
from louver.policies.base import BasePolicy, number
from louver.protocols import BoundSummary, CutRule, Cuts, Guarantee

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
