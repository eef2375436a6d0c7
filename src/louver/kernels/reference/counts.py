"""count_tiers: what a step under given cuts would read of the sketched keys, without reading it."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from louver.kernels.ops import Bounds
from louver.shapes import PerQueryHead

TIER_COUNTS = ("undecided", "exact", "coarse", "value_blocks")


def count_tiers(
    bounds: Bounds,
    unread: PerQueryHead,
    exact: PerQueryHead,
    frame_len: int,
    coded: Bool[Tensor, "batch num_kv_heads sketched"] | None = None,
) -> Int[Tensor, "batch num_kv_heads 4"]:
    """Keys per KV head, int64, in the order of TIER_COUNTS: undecided; exact; coarse; and the blocks that hold a coarse one.

    Exact: the upper bound reaches ``exact`` for some head of the group. Coarse: not exact, and it reaches ``unread`` for some
    head. coded: set to True for the coarse keys, in place.
    """
    num_kv_heads = bounds.undecided.shape[1]

    def reached(cut: Tensor) -> Tensor:
        above = ~(bounds.upper < cut[..., None])
        return above.unflatten(1, (num_kv_heads, -1)).any(2) & bounds.undecided

    is_exact = reached(exact)
    coarse = reached(unread) & ~is_exact
    if coded is not None:
        coded |= coarse
    blocks = coarse.unflatten(-1, (-1, frame_len)).any(-1)
    return torch.stack([x.sum(-1) for x in (bounds.undecided, is_exact, coarse, blocks)], -1)
