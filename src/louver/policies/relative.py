"""relative:N: the keys whose logit lies within N nats of the best.

A key N nats below the best has e^-N of its weight, so N = 9.2 keeps every key with at least a ten-thousandth of it, however many
there are. The first look finds the keys that may be the best (their upper bound reaches the best lower bound), their scores settle
what the best is, and the threshold follows. Nothing above it is lost.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from louver.errors import PolicyError
from louver.geometry.rounding import UNIT
from louver.policies.base import BasePolicy, number
from louver.protocols import BoundSummary, Cuts


@dataclass(frozen=True, kw_only=True)
class Relative(BasePolicy):
    """Keep the keys within a distance of the best logit."""

    name: ClassVar[str] = "relative"
    drops: ClassVar[bool] = True
    nats: float  # below the best logit; changes results

    def check(self) -> None:
        """A distance."""
        if not 0 <= self.nats < math.inf:
            raise PolicyError(f"relative:{self.nats} is not a distance in nats; wanted a finite number, 0 or more")

    def argument(self) -> str:
        """The distance."""
        return number(self.nats)

    @property
    def looks(self) -> int:
        """What may be the best, then what lies within reach of it."""
        return 3

    def cuts(self, summary: BoundSummary) -> Cuts:
        """best_lower is the best score less its rounding once the candidates were scored; tau is rounded down."""
        distance = self.nats / summary.softmax_scale
        tau = summary.best_lower - distance
        tau = tau - 4 * UNIT * (summary.best_lower.abs() + distance).nan_to_num(posinf=0.0)
        return Cuts(unread=tau, fine=summary.best_lower, exact=tau)
