"""Bounds on a score from an enclosure: the mathematics every index shares.

Ball: every k with |k - c| <= r has q . c - |q| r <= q . k <= q . c + |q| r (Cauchy-Schwarz), and the bound is attained.
Disjoint slices of the head dimension add: q . k = sum_s q_s . k_s <= sum_s (q_s . c_s + |q_s| r_s).
"""

import torch
from jaxtyping import Float
from torch import Tensor


def slice_lengths(head_dim: int, slice_dims: int) -> list[int]:
    """Split head_dim channels into contiguous slices of at most slice_dims, as even as they go."""
    count = -(-head_dim // slice_dims)
    base, extra = divmod(head_dim, count)
    return [base + (i < extra) for i in range(count)]


def sliced_norms(
    x: Float[Tensor, "*#shape head_dim"], weight: Float[Tensor, "*#shape head_dim"], slice_dims: int
) -> Float[Tensor, "*broadcast slices"]:
    """sqrt(sum of x_d^2 weight_d) over each slice, safe from under- and overflow of the squares of x.

    The scale that keeps the squares in range is the slice's own: one for all of x would let a slice that is small beside
    another vanish, and its bound with it.
    """
    lengths = slice_lengths(x.shape[-1], slice_dims)
    norms = []
    for part, part_weight in zip(x.split(lengths, -1), weight.split(lengths, -1), strict=True):
        peak = part.abs().amax(-1, keepdim=True)
        peak = torch.where(peak > 0, peak, 1.0)
        norms.append(((part / peak).square() * part_weight).sum(-1).sqrt() * peak[..., 0])
    return torch.stack(norms, -1)
