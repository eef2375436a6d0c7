"""H2O: recent tokens, and the heavy hitters: those that received the most attention so far. What is evicted never comes back.

Source: Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv 2306.14048; half of
the budget recent, half heavy hitters, the attention of the prompt's queries included. Attention is added up per KV head over its group
of query heads (the paper has no groups). Guarantee: none. Cost: the tokens kept.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from louver.experiments.baselines.selecting import HeadMask, RowMask, Selecting, Weights, check_budget, num_kept, top
from louver.experiments.baselines.window import prompt_attention
from louver.shapes import PerRow, Query, group_heads


class H2O(Selecting):
    """Attends ``budget`` tokens (a share of the tokens, or a number of them) per KV head.

    A truncation forgets tokens and the attention they received, not the attention they paid, and brings nothing back that was evicted.
    """

    def __init__(self, budget: float | int, *, reserve_tokens: int = 0) -> None:
        super().__init__(reserve_tokens=reserve_tokens)
        self.budget = check_budget(budget)
        self.received: Tensor | None = None  # float32 [batch, num_kv_heads, tokens]
        self.kept: Tensor | None = None  # bool, the same

    def observe(self, queries: Tensor, kv_start: PerRow | None, softmax_scale: float) -> None:
        """Add up the attention that the prompt's queries [batch, num_q_heads, q_len, head_dim] pay."""
        super().observe(queries, kv_start, softmax_scale)
        self._grow()
        self.learn(prompt_attention(queries, self.store.keys, self._valid(), softmax_scale))

    def select(self, q: Query, valid: RowMask, softmax_scale: float) -> HeadMask:
        """Evict down to the budget, the new token included."""
        received, kept = self._grow()
        length = valid.sum(-1)[:, None]
        count = num_kept(self.budget, length).expand(kept.shape[:2])
        place = valid.cumsum(-1) - 1
        recent = (valid & (place >= length - (count[:, :1] + 1) // 2))[:, None] & kept
        heavy = received.masked_fill(recent | ~kept | ~valid[:, None], -torch.inf)
        self.kept = recent | top(heavy, count - recent.sum(-1))
        return self.kept.repeat_interleave(q.shape[1] // kept.shape[1], 1)

    def learn(self, weights: Weights) -> None:
        """Add attention to what each token received."""
        received, _ = self._grow()
        self.received = received + group_heads(weights, received.shape[1]).sum(2)

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on."""
        super().truncate(kv_len)
        if self.received is not None and self.kept is not None:
            self.received, self.kept = self.received[..., :kv_len], self.kept[..., :kv_len]

    def select_batch(self, ids: Tensor) -> None:
        """Rearrange, repeat or drop rows: row i becomes the old row ids[i]."""
        super().select_batch(ids)
        if self.received is not None and self.kept is not None:
            self.received, self.kept = self.received[ids], self.kept[ids]

    def _grow(self) -> tuple[Tensor, Tensor]:
        """Both tables at the present length: a new token is kept, and has received nothing."""
        lead, length = self.store.keys.shape[:2], len(self.store)
        if self.received is None or self.kept is None:
            self.received = torch.zeros(*lead, 0, device=self.store.keys.device)
            self.kept = self.received.bool()
        missing = (0, length - self.kept.shape[-1])
        self.received, self.kept = pad(self.received, missing), pad(self.kept, missing, value=True)
        return self.received, self.kept
