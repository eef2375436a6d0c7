"""Subspaces: head_dim split into disjoint slices, whose scores add up to the score.

q . k = sum_s q_s . k_s for any split of the channels; a rotation R first changes nothing, as (R q) . (R k) = q . k. Which split
is taken changes speed, never results.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.errors import PolicyError
from louver.geometry.bounds import slice_lengths

Slicing = Literal["contiguous", "interleaved", "random", "rotated"]
ROTATION_ERROR = 2.0**-21  # relative to |q| |k|: two roundings to float32, and a rotation orthogonal to 2^-40


@dataclass(frozen=True, kw_only=True)
class Subspaces:
    """A split of head_dim in ``count`` slices of ``width`` slots. Slots left over hold channel head_dim, which is zero."""

    channels: Int[Tensor, "count width"]
    rotation: Float[Tensor, "head_dim head_dim"] | None = None  # float64

    @property
    def count(self) -> int:
        """Number of slices."""
        return self.channels.shape[0]

    @property
    def width(self) -> int:
        """Slots of a slice."""
        return self.channels.shape[1]

    @property
    def rounding(self) -> float:
        """Error of the sum of the slices' scores relative to |q| |k|; zero where channels are only rearranged."""
        return 0.0 if self.rotation is None else ROTATION_ERROR

    def split(self, x: Float[Tensor, "*shape head_dim"]) -> Float[Tensor, "*shape count width"]:
        """The slices of finite vectors, in float32."""
        if self.rotation is not None:
            x = (x.double() @ self.rotation.to(x.device).mT).float()
        padded = torch.nn.functional.pad(x.float(), (0, 1))
        return padded[..., self.channels.to(x.device)]


def subspaces(head_dim: int, count: int, slicing: Slicing = "contiguous", seed: int = 0) -> Subspaces:
    """Split head_dim channels in count slices: neighbours together, every count-th, at random, or after a random rotation.

    Example:
        >>> subspaces(6, 2, "interleaved").channels
        tensor([[0, 2, 4],
                [1, 3, 5]])

    Raises:
        PolicyError: more slices than channels, or an unknown slicing.
    """
    if not 1 <= count <= head_dim:
        raise PolicyError(f"subspaces={count}; wanted 1 to head_dim={head_dim}")
    if slicing not in get_args(Slicing):
        raise PolicyError(f"slicing={slicing!r} is unknown; wanted one of {', '.join(get_args(Slicing))}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(head_dim)
    if slicing == "interleaved":
        parts = [order[i::count] for i in range(count)]
    else:
        order = torch.randperm(head_dim, generator=generator) if slicing == "random" else order
        lengths = slice_lengths(head_dim, -(-head_dim // count))
        if len(lengths) != count:  # count does not divide evenly: as even as it goes
            base, extra = divmod(head_dim, count)
            lengths = [base + (i < extra) for i in range(count)]
        parts = list(order.split(lengths))
    width = max(len(p) for p in parts)
    channels = torch.full((count, width), head_dim)
    for i, part in enumerate(parts):
        channels[i, : len(part)] = part
    rotation = None
    if slicing == "rotated":
        rotation = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)).Q
    return Subspaces(channels=channels, rotation=rotation)
