"""SnapKV: the last queries of the prompt vote on which of its tokens to keep; what is decoded later is kept as well.

Source: Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469; a window of 32 queries, votes smoothed by
an average over 5 tokens, the window itself always kept. Votes are added up per KV head over its group of query heads.
Guarantee: none. Cost: the tokens kept.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from louver.experiments.baselines.selecting import HeadMask, RowMask, Selecting, check_budget, num_kept, top
from louver.experiments.baselines.window import prompt_attention
from louver.shapes import PerRow, Query, group_heads

WINDOW = 32
KERNEL = 5


class SnapKV(Selecting):
    """Keeps ``budget`` tokens of the prompt (a share of its tokens, or a number of them) per KV head."""

    def __init__(self, budget: float | int, *, window: int = WINDOW, reserve_tokens: int = 0) -> None:
        super().__init__(reserve_tokens=reserve_tokens)
        self.budget, self.window = check_budget(budget), window
        self._queries: Tensor | None = None  # of the last tokens of the prompt so far
        self._prompt_len = 0
        self._kept: Tensor | None = None  # bool [batch, num_kv_heads, prompt tokens]; None: still to be voted on

    def observe(self, queries: Tensor, kv_start: PerRow | None, softmax_scale: float) -> None:
        """Remember the last queries of the prompt, which may come in several parts."""
        super().observe(queries, kv_start, softmax_scale)
        goes_on = self._queries is not None and self._prompt_len == self.kv_len - queries.shape[2]
        seen = torch.cat([self._queries, queries], 2) if goes_on and self._queries is not None else queries
        self._queries, self._prompt_len, self._kept = seen[:, :, -self.window :], self.kv_len, None

    def select(self, q: Query, valid: RowMask, softmax_scale: float) -> HeadMask:
        """What the votes left of the prompt, and everything after it."""
        if self._queries is None:
            return valid[:, None].expand(-1, q.shape[1], -1)
        if self._kept is None:
            self._kept = self._vote(self._queries, valid[:, : self._prompt_len], softmax_scale)
        kept = pad(self._kept, (0, len(self.store) - self._kept.shape[-1]), value=True)
        return kept.repeat_interleave(q.shape[1] // kept.shape[1], 1)

    def _vote(self, queries: Tensor, valid: RowMask, softmax_scale: float) -> Tensor:
        keys = self.store.keys[:, :, : self._prompt_len]
        votes = group_heads(prompt_attention(queries, keys, valid, softmax_scale), keys.shape[1]).sum(2)
        votes = avg_pool1d(votes, KERNEL, stride=1, padding=KERNEL // 2)
        place = torch.arange(keys.shape[2], device=keys.device) >= keys.shape[2] - queries.shape[2]
        count = num_kept(self.budget, valid.sum(-1))[:, None].expand(votes.shape[:2])
        return top(votes.masked_fill(place, torch.inf).masked_fill(~valid[:, None], -torch.inf), count)

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on; the votes stand."""
        super().truncate(kv_len)
        self._prompt_len = min(self._prompt_len, kv_len)
        if self._kept is not None:
            self._kept = self._kept[..., :kv_len]

    def select_batch(self, ids: Tensor) -> None:
        """Rearrange, repeat or drop rows: row i becomes the old row ids[i]."""
        super().select_batch(ids)
        self._queries = None if self._queries is None else self._queries[ids]
        self._kept = None if self._kept is None else self._kept[ids]
