"""A/B/C: a policy per KV head, such as ``exact:0.01/exact:0.01/exact:0.05``: heads differ in what they need.

The heads of a layer are shared out evenly and in order, so with as many policies as KV heads each GQA group has its own. Every
member's promise holds for its heads.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from louver.errors import PolicyError
from louver.policies.base import BasePolicy
from louver.policies.union import weakest
from louver.protocols import BoundSummary, Cuts, Guarantee, Policy


@dataclass(frozen=True, kw_only=True)
class PerHead(BasePolicy):
    """A member for each part of the heads. sinks and recent are the largest of the members'."""

    name: ClassVar[str] = "per-head"
    members: tuple[Policy, ...]

    def check(self) -> None:
        """Members that all drop, or all drop nothing, and that look once."""
        if len({member.drops for member in self.members}) > 1:
            raise PolicyError(f"{self.spec!r} joins a policy that drops keys with one that drops nothing")
        for member in self.members:
            if member.looks > 1 or member.sample or member.rule() is None:
                raise PolicyError(
                    f"{member.spec!r} can't be given to single heads; wanted exact:F, fixed:X, topk:K or budget:F"
                )

    @property
    def drops(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - the members'
        """As the members do."""
        return self.members[0].drops

    @property
    def guarantee(self) -> Guarantee:  # pyright: ignore[reportIncompatibleVariableOverride] - the members'
        """The weakest of the members': it must be true of every head."""
        return weakest(member.guarantee for member in self.members)

    @property
    def spec(self) -> str:
        """The members' specifications."""
        return "/".join(member.spec for member in self.members)

    def cuts(self, summary: BoundSummary) -> Cuts:
        """Each head's own member's."""
        found = [member.cuts(summary) for member in self.members]
        num_heads = summary.shift.shape[1]
        if num_heads % len(found):
            raise PolicyError(
                f"{self.spec!r} gives {len(found)} policies to {num_heads} heads; wanted a divisor of their number"
            )
        owner = torch.arange(num_heads, device=summary.shift.device) // (num_heads // len(found))

        def chosen(name: str) -> Tensor:
            return torch.stack([getattr(cuts, name) for cuts in found]).gather(0, owner.expand_as(summary.shift)[None])[
                0
            ]

        rank = chosen("rank") if all(cuts.rank is not None for cuts in found) else None
        if rank is None and any(cuts.rank is not None for cuts in found):
            raise PolicyError(
                f"{self.spec!r} joins counted keys with a fixed threshold; give every head the one or the other"
            )
        return Cuts(unread=chosen("unread"), fine=chosen("fine"), exact=chosen("exact"), rank=rank)
