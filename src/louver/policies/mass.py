"""mass:EPS: drop keys, but certify that at most EPS of the softmax mass is dropped.

Three looks. The bounds of all keys bound the total mass from both sides: keys above the threshold that even the largest possible
total would ask for are read in any case, so they are scored first. Their scores give a far better total, and with it the
threshold below which upper bounds sum to little enough. What reaches that is scored too, and the last look drops what turned out to
be light. With U the mass of the ceilings of what is dropped and K that of the floors of what is kept, the share dropped is at
most U / (K + U) (docs/guarantee.md, 7), and U <= EPS / (1 - EPS) K is what every look solves for.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from louver.errors import PolicyError
from louver.geometry.rounding import UNIT
from louver.policies.base import BasePolicy, number
from louver.protocols import BoundSummary, Cuts, Guarantee
from louver.shapes import PerQueryHead

UNSEEN = 0.8  # of the share may be spent on keys that are never scored, the rest on keys whose score is known
SAFETY = 1e-3  # left unused, for rounding: of the histograms here, and of the certificate


@dataclass(frozen=True, kw_only=True)
class Mass(BasePolicy):
    """Drop keys that provably share at most ``dropped_mass`` of the softmax mass of their query head."""

    name: ClassVar[str] = "mass"
    drops: ClassVar[bool] = True
    guarantee: ClassVar[Guarantee] = "certified"
    dropped_mass: float  # at most, per query head; changes results

    def check(self) -> None:
        """A share of the mass that can be dropped, and not all of it."""
        if not 0 < self.dropped_mass < 1:
            raise PolicyError(f"mass:{self.dropped_mass} is not a share of the mass; wanted above 0 and below 1")

    def argument(self) -> str:
        """The share of the mass."""
        return number(self.dropped_mass)

    @property
    def looks(self) -> int:
        """All bounds; the scores of the best; the scores of all that may be needed."""
        return 3

    def cuts(self, summary: BoundSummary) -> Cuts:
        """The highest threshold that certifiably drops little enough; ``fine`` is one that no total could raise it above."""
        n = summary.num_keys[:, None]
        share = self.dropped_mass * (UNSEEN if summary.retired_mass is None else 1.0)
        ratio = share / (1 - share) * (1 - SAFETY - 4 * UNIT * n).clamp_min(0.5)
        tau = _highest_edge(summary, ratio, summary.lower_mass)
        return Cuts(unread=tau, fine=_highest_edge(summary, ratio, summary.upper_mass), exact=tau)


def _highest_edge(summary: BoundSummary, ratio: Tensor, kept_mass: Tensor) -> PerQueryHead:
    """The highest edge under which the upper mass, and what was retired, is at most ratio times what is kept above it."""
    none = summary.decided_mass[..., None] * 0
    retired = none if summary.retired_mass is None else summary.retired_mass[..., None]
    below = retired + torch.cat([summary.upper_mass.flip(-1).cumsum(-1).flip(-1), none], -1)
    kept = summary.decided_mass[..., None] + torch.cat([none, kept_mass.cumsum(-1)], -1)
    too_much = ~(below <= ratio[..., None] * kept)
    # The condition holds from some edge on; NaN (an overflowed sum) holds nowhere but at the end, where nothing more is dropped.
    bins = summary.edges.shape[-1] - 1
    return summary.edges.gather(-1, too_much.sum(-1, keepdim=True).clamp_max(bins))[..., 0]
