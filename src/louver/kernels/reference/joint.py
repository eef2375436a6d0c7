"""The joint maximum: how far weights that lie in known intervals can pull an average, all of them together.

The sum over keys of (largest numerator) / (smallest total) lets each weight be large in the numerator and small in the total at once.
The maximum over one choice of weights w_k in [floor_k, ceiling_k] of

    (sum_k |w_k - a_k| d_k + e) / sum_k w_k

is a fractional programme. For any r >= 0 let F(r) be the maximum over w of numerator - r * total; it falls apart into a maximum per
key, at an end of its interval, because each term is convex in w_k. Then numerator <= r total + F(r), so

    ratio <= r + max(F(r), 0) / sum_k floor_k          for every r,

a bound whatever r is, and the maximum itself once F(r) = 0. Dinkelbach's iteration r <- numerator / total at the maximising w gets
there in a few steps (On Nonlinear Fractional Programming, Management Science 13, 1967). Proof: docs/guarantee.md, 8.
"""

import torch
from jaxtyping import Float
from torch import Tensor

STEPS = 3
WIDER = 2.0**-20  # relative: the float32 roundings of the ends and of the distances, eight at most
ROUNDING = 2.0**-30  # relative: float64 sums of up to 2^22 terms


def joint_maximum(
    weight: Float[Tensor, "batch heads n"],
    floor: Float[Tensor, "batch heads n"],
    ceiling: Float[Tensor, "batch heads n"],
    distance: Float[Tensor, "batch heads n"],
    extra: Float[Tensor, "batch heads"],
) -> Float[Tensor, "batch heads"]:
    """At least the largest ratio; distance is 0 for keys that add nothing to the numerator, and ``extra`` is e. NaN if unknown."""
    a, d = weight.double(), distance.double() * (1 + WIDER)
    low, high = floor.double() * (1 - WIDER), ceiling.double() * (1 + WIDER)
    up, down = (high - a).clamp_min(0) * d, (a - low).clamp_min(0) * d
    e, least = extra.double() * (1 + WIDER), low.sum(-1)
    rate = torch.zeros_like(e)
    for _ in range(STEPS):
        rises = up - rate[..., None] * high > down - rate[..., None] * low
        rate = (torch.where(rises, up, down).sum(-1) + e) / torch.where(rises, high, low).sum(-1)
    gain = torch.maximum(up - rate[..., None] * high, down - rate[..., None] * low)
    magnitude = torch.maximum(up, down).sum(-1) + rate * high.sum(-1) + e
    excess = (gain.sum(-1) + e + ROUNDING * magnitude).clamp_min(0)
    return ((rate + excess / least) * (1 + WIDER)).float()
