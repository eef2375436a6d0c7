"""fixed:X: every key with score q . k >= X, however many there are."""

import math
from dataclasses import dataclass
from typing import ClassVar

from louver.errors import PolicyError
from louver.policies.base import BasePolicy, number
from louver.protocols import CutRule

LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127


@dataclass(frozen=True, kw_only=True)
class Fixed(BasePolicy):
    """Keep the keys whose score reaches a constant."""

    name: ClassVar[str] = "fixed"
    drops: ClassVar[bool] = True
    tau: float  # score units (q . k before the softmax scale); changes results

    def check(self) -> None:
        """NaN would lose every key."""
        if math.isnan(self.tau):
            raise PolicyError("fixed:nan would lose every key; wanted a number")

    def argument(self) -> str:
        """The threshold."""
        return number(self.tau)

    def rule(self) -> CutRule:
        """The same threshold for every head. One that float32 can't hold is infinite there: no finite score or bound reaches it, or all do."""
        beyond = abs(self.tau) > LARGEST_FLOAT32
        return CutRule(drop=True, tau=math.copysign(math.inf, self.tau) if beyond else self.tau)
