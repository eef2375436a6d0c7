"""topk:K: the K keys with the largest scores.

The K-th largest lower bound is a threshold no member of the true top K can be below, so searching there finds them all;
the exact scores of what was found then settle the K (ties within rounding are kept).
"""

from dataclasses import dataclass
from typing import ClassVar

from louver.errors import PolicyError
from louver.policies.base import BasePolicy
from louver.protocols import CutRule


@dataclass(frozen=True, kw_only=True)
class TopK(BasePolicy):
    """Keep the k largest scores of each query head, exactly."""

    name: ClassVar[str] = "topk"
    drops: ClassVar[bool] = True
    k: int  # keys per query head; changes results

    def check(self) -> None:
        """At least one key."""
        if self.k < 1:
            raise PolicyError(f"topk:{self.k} keeps nothing; wanted at least 1")

    def argument(self) -> str:
        """The number of keys."""
        return str(self.k)

    def rule(self) -> CutRule:
        """k keys, whatever the length."""
        return CutRule(drop=True, count=self.k)
