"""budget:F: the share F of the keys with the largest scores; like topk, with K growing with the context."""

from dataclasses import dataclass
from typing import ClassVar

from louver.policies.base import BasePolicy, check_fraction, edge_above_which, retrieval_cuts, share_of_keys
from louver.protocols import BoundSummary, Cuts


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
        return f"{self.fraction:g}"

    def cuts(self, summary: BoundSummary) -> Cuts:
        """tau below the rank-th largest lower bound, and the rank to settle on among the exact scores."""
        rank = share_of_keys(self.fraction, summary).long()
        return retrieval_cuts(edge_above_which(summary.lower_count, rank, summary.edges), rank)
