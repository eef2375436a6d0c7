"""What every baseline that picks keys has in common: attention over a mask of the keys held, and an account of what was read.

A subclass says which keys a step attends; those are attended exactly, all others are dropped. Guarantee: none, so the certificate
is infinite and tau says nothing. A budget is a share of a row's tokens up to 1 (1: all of them, which is dense attention), and a
number of tokens above.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from louver.attention.dense import plain_stats, valid_tokens
from louver.attention.on_store import OnStore
from louver.errors import PolicyError
from louver.protocols import AttendResult, Guarantee, StepStats
from louver.shapes import PerRow, Query, check_query, group_heads

HeadMask = Bool[Tensor, "batch num_q_heads kv_len"]
RowMask = Bool[Tensor, "batch kv_len"]
Weights = Float[Tensor, "batch num_q_heads kv_len"]


def check_budget(budget: float | int) -> float | int:
    """The budget; raises a PolicyError unless it is a positive share, or a whole number of tokens."""
    if not 0 < budget < math.inf or (budget > 1 and budget != int(budget)):
        raise PolicyError(f"budget={budget} is neither a share of the tokens (up to 1) nor a number of them")
    return budget


def num_kept(budget: float | int, num_tokens: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Tokens a budget allows of num_tokens, at least one where there are any."""
    if budget > 1:
        return num_tokens.clamp(max=int(budget))
    return (budget * num_tokens.double()).ceil().long().clamp(min=1).minimum(num_tokens)


def top(scores: Float[Tensor, "*lead kv_len"], count: Int[Tensor, "*lead"]) -> Bool[Tensor, "*lead kv_len"]:
    """The count largest scores of each line; equal ones by position, -inf never."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    )
    return (rank < count[..., None]) & (scores > -torch.inf)


class Selecting(OnStore, ABC):
    """A LayerAttention that attends a selection of its tokens."""

    guarantee: ClassVar[Guarantee] = "none"

    @abstractmethod
    def select(self, q: Query, valid: RowMask, softmax_scale: float) -> HeadMask:
        """The keys this step attends."""

    def index_bytes(self, valid: RowMask) -> Int[Tensor, "batch num_kv_heads"]:
        """Bytes a step reads to make its choice, per row and KV head; none for a choice made without looking."""
        return torch.zeros(valid.shape[0], self.store.keys.shape[1], dtype=torch.int64, device=valid.device)

    def compared(self, valid: RowMask) -> Int[Tensor, "batch num_kv_heads"]:
        """Keys scored in full to make the choice, those it takes apart; none for a choice made without full keys."""
        return torch.zeros(valid.shape[0], self.store.keys.shape[1], dtype=torch.int64, device=valid.device)

    def learn(self, weights: Weights) -> None:
        """See the attention a step paid; for those that go by it."""

    def observe(self, queries: Tensor, kv_start: PerRow | None, softmax_scale: float) -> None:
        """Note the padding of the rows; for those that look at a prompt, the place to do so."""
        self._align(kv_start)

    def attend(self, q: Query, softmax_scale: float, kv_start: PerRow | None = None) -> AttendResult:
        """Softmax attention of q [batch, num_q_heads, head_dim] over the selected keys alone."""
        check_query(q, self.store.keys)
        self._align(kv_start)
        valid = self._valid()
        mask = self.select(q, valid, softmax_scale) & valid[:, None]
        keys, values = self.store.keys.float(), self.store.values
        assert values is not None
        logits = (group_heads(q.float(), keys.shape[1]) @ keys.mT).flatten(1, 2) * softmax_scale
        logits = logits.masked_fill(~mask, -torch.inf)
        weights = torch.nan_to_num(logits.softmax(-1))  # of no key at all: nothing
        self.learn(weights)
        out = (group_heads(weights, keys.shape[1]) @ values.float()).flatten(1, 2).to(q.dtype)
        nothing = torch.zeros(q.shape[:2], device=q.device)
        return AttendResult(
            out=out,
            lse=logits.logsumexp(-1),
            stats=self._stats(mask, valid),
            certificate=nothing + torch.inf,
            arithmetic_bound=nothing,
            dropped_mass_bound=nothing + 1,
            tau=nothing + torch.inf,
            exact_mask=mask if self.record else None,
        )

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on."""
        self.store.truncate(kv_len)

    def select_batch(self, ids: Tensor) -> None:
        """Rearrange, repeat or drop rows: row i becomes the old row ids[i]."""
        self.store.select_batch(ids)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held, by name; what is dropped is kept here all the same, for a truncation to bring back."""
        return {"keys_values": self.store.memory_bytes(), "index": 0}

    def _align(self, kv_start: PerRow | None) -> None:
        if kv_start is not None:
            self.store.kv_start = kv_start

    def _valid(self) -> RowMask:
        return valid_tokens(self.store.kv_start, self.store.kv_len, len(self.store))

    def _stats(self, mask: HeadMask, valid: RowMask) -> StepStats:
        together = group_heads(mask, self.store.keys.shape[1]).any(2).sum(-1)
        num_keys = valid.sum(-1)[:, None].expand_as(together).contiguous()
        scanned = torch.maximum(together, self.compared(valid)).minimum(num_keys)
        stats = plain_stats(num_keys, scanned, together, self.store.keys.shape[3])
        return replace(stats, index_bytes=self.index_bytes(valid))
