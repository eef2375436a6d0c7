"""Balls: a group of keys as a center and a radius. q . k <= q . c + |q| r for every k with |k - c| <= r, and >= q . c - |q| r.

Centers and radii are float16, radii rounded up around the center as it is stored, so a ball holds its keys in real arithmetic.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.geometry.bounds import sliced_norms
from louver.geometry.rounding import norm_above

LARGEST_NORM = 30000.0  # keys beyond it are left out of every enclosure: 2 x this fits a float16 radius
NORM_ERROR = 2.0**-40  # relative error of a float64 norm, with much room


@dataclass(frozen=True, kw_only=True)
class Balls:
    """One ball per group."""

    center: Float[Tensor, "*lead groups width"]  # float16, or keys in their own type
    radius: Float[Tensor, "*lead groups"]  # float16

    @classmethod
    def fit(
        cls, points: Float[Tensor, "*lead n width"], center: Tensor, group: Int[Tensor, "*lead n"], keep: Tensor
    ) -> "Balls":
        """The smallest balls about the centers [*lead, groups, width] that hold the points; only where keep [*lead, n]."""
        away = points.double() - center.double().gather(-2, group[..., None].expand(points.shape))
        norms = away.square().sum(-1).sqrt() * (1 + NORM_ERROR) * keep
        radius = norms.new_zeros(center.shape[:-1]).scatter_reduce(-1, group, norms, "amax")
        return cls(center=center, radius=round_up_float16(radius))

    def half_width(self, q: Float[Tensor, "*lead rows width"]) -> Float[Tensor, "*lead rows groups"]:
        """|q| r: how far a member's score can lie from q . center, before rounding."""
        return query_norm(q)[..., None] * self.radius.float()[..., None, :]

    def reach(self) -> Float[Tensor, "*lead groups"]:
        """At least the norm of anything inside, for the rounding of bounds."""
        return (norm_above(self.center.float()) + self.radius.float()) * (1 + 1e-5)


def query_norm(q: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape"]:
    """Norms that neither under- nor overflow where the squares would."""
    return sliced_norms(q, torch.ones_like(q), q.shape[-1])[..., 0]


def group_means(
    points: Float[Tensor, "*lead n width"], group: Int[Tensor, "*lead n"], num_groups: int, keep: Tensor
) -> Float[Tensor, "*lead groups width"]:
    """Mean of each group's points, zero for a group without any; float32."""
    shape = (*points.shape[:-2], num_groups)
    count = points.new_zeros(shape).scatter_add(-1, group, keep.to(points.dtype))
    wide = group[..., None].expand(points.shape)
    total = points.new_zeros(*shape, points.shape[-1]).scatter_add(-2, wide, points * keep[..., None])
    return total / count.clamp_min(1)[..., None]


def round_up_float16(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The smallest float16 not below x >= 0 (float64)."""
    y = x.half()
    above = (y.view(torch.int16) + 1).view(torch.float16)
    return torch.where(y.double() < x, above, y)
