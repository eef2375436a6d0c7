"""A layer that overlooks chosen keys: what a false negative does, made to order.

The prompt is read with every key in sight, as any method that prunes decode steps reads it; decode steps do not see the keys hidden from
them, in this layer and all its heads. Guarantee: none, that is the point. Cost: that of dense attention.
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from louver.errors import ShapeError
from louver.experiments.baselines.selecting import HeadMask, RowMask, Selecting
from louver.shapes import Query


class Hidden(Selecting):
    """Attends everything but what is hidden.

    Args:
        hidden: bool [batch, steps, prompt_len], the prompt's keys that each decode step overlooks. The first step is that of the
            prompt's last token; steps after the last one listed overlook what that one does.
    """

    def __init__(self, hidden: Bool[Tensor, "batch steps prompt_len"]) -> None:
        super().__init__()
        if hidden.dim() != 3 or hidden.dtype != torch.bool or not hidden.shape[1]:
            raise ShapeError(f"hidden is {hidden.dtype} {tuple(hidden.shape)}; wanted bool [batch, steps, prompt_len]")
        self.hidden = hidden

    def select(self, q: Query, valid: RowMask, softmax_scale: float) -> HeadMask:
        """The same keys for every head."""
        step = min(self.kv_len - self.hidden.shape[2], self.hidden.shape[1] - 1)
        hidden = self.hidden[:, max(0, step)].to(q.device)
        seen = torch.ones_like(valid)
        seen[:, : hidden.shape[1]] = ~hidden[:, : self.kv_len]
        return seen[:, None].expand(-1, q.shape[1], -1)
