"""Boxes: a group of keys as a middle and a half-width per channel. q . k <= q . m + sum_d |q_d| h_d, the bound inside Quest.

Source: Tang et al., Quest, arXiv 2406.10774. Both parts are float16, half-widths rounded up about the middle as it is stored.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.geometry.ball import NORM_ERROR, round_up_float16
from louver.geometry.rounding import norm_above


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """One box per group."""

    center: Float[Tensor, "*lead groups width"]  # float16
    half: Float[Tensor, "*lead groups width"]  # float16

    @classmethod
    def fit(
        cls, points: Float[Tensor, "*lead n width"], center: Tensor, group: Int[Tensor, "*lead n"], keep: Tensor
    ) -> "Boxes":
        """The smallest boxes that hold the points where keep [*lead, n]; ``center`` says only how many groups there are."""
        wide = group[..., None].expand(points.shape)
        x = points.double()
        low = torch.where(keep[..., None], x, torch.inf)
        high = torch.where(keep[..., None], x, -torch.inf)
        empty = center.double()
        low = torch.full_like(empty, torch.inf).scatter_reduce(-2, wide, low, "amin")
        high = torch.full_like(empty, -torch.inf).scatter_reduce(-2, wide, high, "amax")
        low, high = (torch.where(torch.isfinite(y), y, 0.0) for y in (low, high))
        middle = ((low + high) / 2).half()
        half = torch.maximum(high - middle.double(), middle.double() - low) * (1 + NORM_ERROR)
        return cls(center=middle, half=round_up_float16(half))

    def half_width(self, q: Float[Tensor, "*lead rows width"]) -> Float[Tensor, "*lead rows groups"]:
        """sum_d |q_d| h_d: how far a member's score can lie from q . center, before rounding."""
        return q.abs() @ self.half.float().mT

    def reach(self) -> Float[Tensor, "*lead groups"]:
        """At least the norm of anything inside, for the rounding of bounds."""
        return norm_above(self.center.float().abs() + self.half.float()) * (1 + 1e-5)
