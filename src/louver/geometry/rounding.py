"""Rounding: every slack Louver adds so that a bound computed in floating point is still a bound. Nothing else rounds.

Standard model (Higham, Accuracy and Stability of Numerical Algorithms, ch. 3): a float32 operation returns the exact result
times (1 + e), |e| <= u = 2^-24, and a sum or dot product of n terms in any order, with or without fused multiply-add, has an
error of at most gamma(n) = n u / (1 - n u) times the sum of absolute values. An operation whose result underflows is off by
2^-126 more at most, even where subnormals are flushed to zero; ABSOLUTE covers the sum of all of those. docs/guarantee.md,
section 4, proves each constant, for head_dim up to 4,096.
"""

from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

UNIT = 2.0**-24  # unit roundoff of float32
ABSOLUTE = 2.0**-96  # covers underflow in any of the sums below
SAFETY = 1.001  # covers the rounding of the slack's own computation, itself a sum of a few thousand positive terms
LARGEST_SUM = 2.0**126  # no partial sum overflows where the absolute terms add up to less

UNIT_OF = {torch.float32: UNIT, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@overload
def gamma(n: int, unit: float = UNIT) -> float: ...
@overload
def gamma(n: Tensor, unit: float = UNIT) -> Tensor: ...
def gamma(n: int | Tensor, unit: float = UNIT) -> float | Tensor:
    """Relative error of a sum of n terms, or of a chain of n operations (Higham 3.1)."""
    return n * unit / (1 - n * unit)


def score_slack(absolute_score: Float[Tensor, "*shape"], head_dim: int) -> Float[Tensor, "*shape"]:
    """Largest error of a float32 dot product over head_dim terms, given the dot product of the absolute values.

    Covers one more rounding, that of adding the slack to the score. +inf where the dot product may have overflowed. Source:
    Higham, (3.5). Shape and unit (score) are those of the input.
    """
    slack = SAFETY * gamma(head_dim + 1) * absolute_score + ABSOLUTE
    return torch.where(absolute_score < LARGEST_SUM, slack, torch.inf)


def estimate_slack(frame_reach: Float[Tensor, "*shape"], head_dim: int) -> Float[Tensor, "*shape"]:
    """Largest error of an estimated score q . (center + code - 8) scale in float32.

    frame_reach is sum_d |q_d| (|center_d| + 8) scale_d, at least the sum of absolute terms any code can give. One rounding
    builds each decoded channel, head_dim more the dot product.
    """
    return SAFETY * gamma(head_dim + 4) * frame_reach + ABSOLUTE


def radius_inflation(head_dim: int) -> float:
    """Factor that makes query norm x radius, computed in float32, at least the real product (docs/guarantee.md, 4)."""
    return 1 + SAFETY * gamma(head_dim + 18)


def logit_slack(magnitude: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Error in nats of fl(exp(scale * score - shift)), given |scale * score| + |shift| (nats).

    Four roundings of the argument (scale itself is rounded too) and a fifth for second-order terms, and an exponential good to
    2^-22 (two float32 ulps; torch and SLEEF promise one), doubled.
    """
    return 5 * UNIT * magnitude + 2.0**-21


def sum_inflation(num_terms: int) -> float:
    """Factor that makes a computed sum of non-negative float32 terms, each rounded up to eight times, at least its real value."""
    return 1 / (1 - SAFETY * gamma(num_terms + 8))


def norm_above(x: Float[Tensor, "*shape dims"]) -> Float[Tensor, "*shape"]:
    """At least the Euclidean norm over the last axis of float32 vectors; +inf where a square overflows."""
    dims = x.shape[-1]
    return x.norm(dim=-1) * (1 + SAFETY * gamma(dims + 8)) + dims**0.5 * 2.0**-62


def round_up_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The smallest float32 not below x (float64)."""
    y = x.to(torch.float32)
    return torch.where(y.double() < x, torch.nextafter(y, torch.full_like(y, torch.inf)), y)


def round_down_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The largest float32 not above x (float64)."""
    return -round_up_float32(-x)
