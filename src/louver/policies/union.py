"""A|B: every key that A or B keeps, such as ``topk:20|mass:0.01``: few keys where attention is sharp, enough where it is not.

Each member's threshold promises that nothing above it is lost; the lower of the two promises both. A key may be kept that neither
asks for by itself where a member's own last selection, of exactly K keys say, is finer than the histograms' bins.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from louver.errors import PolicyError
from louver.policies.base import BasePolicy
from louver.protocols import BoundSummary, CutRule, Cuts, Guarantee, Policy, Sample


@dataclass(frozen=True, kw_only=True)
class Union(BasePolicy):
    """What at least one member keeps. sinks and recent are the largest of the members'."""

    name: ClassVar[str] = "union"
    members: tuple[Policy, ...]

    def check(self) -> None:
        """Members that can be joined: thresholds of one kind, and one sample at most."""
        if len(self.members) < 2:
            raise PolicyError("a union needs two policies, such as 'topk:20|mass:0.01'")
        for member in self.members:
            if member.spec.split(":")[0] in ("dense", "error") or "/" in member.spec:
                raise PolicyError(f"{member.spec!r} can't be part of a union: it is no threshold to take the lower of")
        if len({member.drops for member in self.members}) > 1:
            raise PolicyError(f"{self.spec!r} joins a policy that drops keys with one that drops nothing")
        if len({member.sample for member in self.members} - {None}) > 1:
            raise PolicyError(f"{self.spec!r} asks for two different samples; give both the same size and seed")

    @property
    def drops(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - the members'
        """As the members do."""
        return self.members[0].drops

    @property
    def guarantee(self) -> Guarantee:  # pyright: ignore[reportIncompatibleVariableOverride] - the members'
        """The best of the members': what one proves is true of more keys as well."""
        found = {member.guarantee for member in self.members}
        return "certified" if "certified" in found else "exact" if "exact" in found else "none"

    @property
    def looks(self) -> int:
        """As many as any member; counted keys (topk, budget) need scores, too."""
        counted = any(
            (rule := member.rule()) is not None and member.drops and rule.tau is None for member in self.members
        )
        return max(3 if counted else 1, *(member.looks for member in self.members))

    def rule(self) -> CutRule | None:
        """The members' rules in one, where all have one of the same kind: what the one keeps, or the other, is what the larger asks for."""
        rules = [rule for member in self.members if (rule := member.rule()) is not None]
        taus = [rule.tau for rule in rules if rule.tau is not None]
        if len(rules) < len(self.members) or len(taus) not in (0, len(rules)):
            return None
        return CutRule(
            drop=self.drops,
            share=max(rule.share for rule in rules),
            count=max(rule.count for rule in rules),
            tau=min(taus) if taus else None,
            unread_mass=min(rule.unread_mass for rule in rules),
        )

    @property
    def sample(self) -> Sample | None:
        """The sample a member asks for."""
        return next((member.sample for member in self.members if member.sample), None)

    @property
    def spec(self) -> str:
        """The members' specifications."""
        return "|".join(member.spec for member in self.members)

    def cuts(self, summary: BoundSummary) -> Cuts:
        """The lowest of the members' thresholds."""
        if self.rule() is not None:
            return super().cuts(summary)
        found = [member.cuts(summary) for member in self.members]

        def lowest(name: str) -> torch.Tensor:
            return torch.stack([getattr(cuts, name) for cuts in found]).amin(0)

        return Cuts(unread=lowest("unread"), fine=lowest("fine"), exact=lowest("exact"))


def most(members: Sequence[Policy]) -> dict[str, int]:
    """The most sinks and recent tokens any member asks for, as keyword arguments."""
    return {name: max(getattr(m, name) for m in members) for name in ("sinks", "recent")}


def weakest(guarantees: Iterable[Guarantee]) -> Guarantee:
    """What is true whichever of them applies."""
    found = set(guarantees)
    return "none" if "none" in found else "certified" if "certified" in found else "exact"
