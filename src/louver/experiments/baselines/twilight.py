"""Twilight: the smallest set of keys whose estimated attention adds up to p, estimated from keys in 4 bits.

Source: Lin et al., Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning, arXiv 2502.02770: a base selector with a
generous budget (here Quest's pages), then top-p over weights that a 4-bit copy of the keys gives (a scale and a zero per key and
head). The estimate has no bound, so neither has what is left out. Guarantee: none. Cost: boxes, the 4-bit keys of the base selection, and
the tokens kept.
"""

import torch
from torch import Tensor

from louver.errors import PolicyError
from louver.experiments.baselines.quest import Quest
from louver.experiments.baselines.selecting import HeadMask, RowMask
from louver.shapes import Query, group_heads

LEVELS = 15  # steps of a 4-bit code


class Twilight(Quest):
    """Attends the keys with the largest estimated weights until these add up to ``p``, within the base selection.

    Args:
        p: share of the estimated attention; 1 keeps the whole base selection.
        budget: of the base selection (a share of the tokens, or a number of them); 1 leaves nothing out beforehand.
    """

    def __init__(self, p: float = 0.95, *, budget: float | int = 1.0, reserve_tokens: int = 0) -> None:
        super().__init__(budget, reserve_tokens=reserve_tokens)
        if not 0 < p <= 1:
            raise PolicyError(f"p={p}; wanted a share of the attention, above 0 and up to 1")
        self.p = p
        self._base_tokens: Tensor | None = None

    def select(self, q: Query, valid: RowMask, softmax_scale: float) -> HeadMask:
        """As many keys as each head needs."""
        everything = valid[:, None].expand(-1, q.shape[1], -1)
        base = everything if self.budget == 1 else super().select(q, valid, softmax_scale) & everything
        self._base_tokens = group_heads(base, self.store.keys.shape[1]).any(2).sum(-1)
        estimate = group_heads(q.float(), self.store.keys.shape[1]) @ four_bits(self.store.keys.float()).mT
        return top_p(estimate.flatten(1, 2).masked_fill(~base, -torch.inf) * softmax_scale, self.p)

    def index_bytes(self, valid: RowMask) -> Tensor:
        """The boxes, where there is a base selection, and its keys' codes with two 16-bit numbers each."""
        boxes = 0 if self.budget == 1 else super().index_bytes(valid)
        assert self._base_tokens is not None
        return boxes + self._base_tokens * (self.store.keys.shape[3] // 2 + 4)


def four_bits(keys: Tensor) -> Tensor:
    """Keys as 4-bit codes with a scale and a zero per key give them back."""
    low, high = keys.amin(-1, keepdim=True), keys.amax(-1, keepdim=True)
    scale = ((high - low) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return ((keys - low) / scale).round() * scale + low


def top_p(logits: Tensor, p: float) -> Tensor:
    """Bool, the smallest set of each line's largest weights that adds up to p; all finite ones for p = 1."""
    if p == 1:
        return logits > -torch.inf
    weights, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = weights.cumsum(-1) - weights
    return torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before < p) & (logits > -torch.inf)
