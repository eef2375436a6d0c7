"""exact:F: drop nothing, and be exact where the bounds say it may matter.

Per query head the share F of the keys with the highest upper bounds is attended exactly. All other keys keep the weight
their sketch gives them and a sketched value; where the bounds prove that a set of keys shares less than ``unread_mass`` of the
total, not even that is read and they keep the head's mean value. What the step promises: no key whose true score reaches
the reported tau is inexact (tau = the threshold on the upper bound), and the certificate.
"""

from dataclasses import dataclass
from typing import ClassVar

from louver.errors import PolicyError
from louver.policies.base import BasePolicy, check_fraction, number
from louver.protocols import CutRule, Guarantee


@dataclass(frozen=True, kw_only=True)
class ExactFraction(BasePolicy):
    """Exact for the keys with the highest upper bounds, sketched for the rest."""

    name: ClassVar[str] = "exact"
    drops: ClassVar[bool] = False
    guarantee: ClassVar[Guarantee] = "certified"
    fraction: float  # of the row's valid keys, exact per query head; changes results
    unread_mass: float = 0.1  # share of the mass whose values may go unread; changes results

    def check(self) -> None:
        """Shares."""
        check_fraction(self.name, self.fraction)
        if not 0 <= self.unread_mass < 1:
            raise PolicyError(
                f"unread_mass={self.unread_mass} is not a share of the mass; wanted at least 0 and below 1"
            )

    def argument(self) -> str:
        """The share of exact keys."""
        return number(self.fraction)

    @property
    def spec(self) -> str:
        """The canonical specification; ``unread`` is named where it is not the default."""
        head, *rest = super().spec.split("+")
        if self.unread_mass != type(self).unread_mass:
            head += "+unread:" + number(self.unread_mass)
        return "+".join([head, *rest])

    def rule(self) -> CutRule:
        """The share that is exact, and the mass whose values may go unread."""
        return CutRule(drop=False, share=self.fraction, unread_mass=self.unread_mass)
