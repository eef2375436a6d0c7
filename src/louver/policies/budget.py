"""budget:F: the share F of the keys with the largest scores; like topk, with K growing with the context."""

from dataclasses import dataclass
from typing import ClassVar

from louver.policies.base import BasePolicy, check_fraction, number
from louver.protocols import CutRule


@dataclass(frozen=True, kw_only=True)
class Budget(BasePolicy):
    """Keep the ceil(fraction * valid keys) largest scores of each query head, exactly."""

    name: ClassVar[str] = "budget"
    drops: ClassVar[bool] = True
    fraction: float  # of the row's valid keys; changes results

    def check(self) -> None:
        """A share of the keys."""
        check_fraction(self.name, self.fraction)

    def argument(self) -> str:
        """The share."""
        return number(self.fraction)

    def rule(self) -> CutRule:
        """A share of the keys."""
        return CutRule(drop=True, share=self.fraction)
