"""FlatIndex: score every key. The truth other indexes are tested against, and the right choice for short contexts.

Guarantee: exact. Cost: kv_len * head_dim per query head; nothing to build, nothing to store.
"""

from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from louver.geometry.rounding import score_slack
from louver.index.results import Selection
from louver.kernels.reference.bounds import summarize
from louver.kernels.reference.rows import exact_scores, row_lengths, to_rows, to_tokens, valid_rows
from louver.kv.device import DeviceStore
from louver.protocols import BoundSummary, Guarantee, KVStore
from louver.shapes import Keys, PerQueryHead, PerRow, Query, Values, check_query, check_tau


class FlatIndex:
    """No index at all: a search reads every key."""

    guarantee: ClassVar[Guarantee] = "exact"

    def __init__(self, store: KVStore) -> None:
        self.store = store
        self.backend = "reference"

    @classmethod
    def build(
        cls, keys: Keys, values: Values | None = None, *, kv_start: PerRow | None = None, kv_len: PerRow | None = None
    ) -> "FlatIndex":
        """An index over keys [batch, num_kv_heads, kv_len, head_dim], without a copy; row i holds kv_start[i] .. kv_len[i].

        Example:
            >>> index = FlatIndex.build(torch.eye(4).reshape(1, 1, 4, 4))
            >>> index.search(torch.tensor([[[3.0, 2.0, 1.0, 0.0]]]), torch.tensor([[2.0]])).row(0, 0)
            (tensor([0, 1]), tensor([3., 2.]))
        """
        return cls(DeviceStore.wrap(keys, values, kv_start, kv_len))

    def refresh(self) -> None:
        """Nothing to do: a flat index holds nothing of its own."""

    def search(self, q: Query, tau: PerQueryHead) -> Selection:
        """Every key whose real score reaches tau [batch, num_q_heads]; extras only within the rounding slack."""
        keys = self.store.keys
        check_query(q, keys)
        check_tau(tau, q)
        length, longest = row_lengths(self.store.kv_start, self.store.kv_len)
        scores, absolute = exact_scores(q, to_rows(keys, self.store.kv_start, length, longest))
        above = valid_rows(length, longest) & ~(scores + score_slack(absolute, q.shape[2]) < tau[..., None])
        mask = to_tokens(above, self.store.kv_start, keys.shape[2])
        return Selection.of_mask(mask, q, keys, length[:, None].expand(-1, keys.shape[1]).long(), length)

    def summarize(self, q: Query, softmax_scale: float, sinks: int = 0, recent: int = 0) -> BoundSummary:
        """Bounds that are the scores themselves, give or take their rounding."""
        check_query(q, self.store.keys)
        length, longest = row_lengths(self.store.kv_start, self.store.kv_len)
        scores, absolute = exact_scores(q, to_rows(self.store.keys, self.store.kv_start, length, longest))
        index = torch.arange(longest, device=q.device)
        free = ((index >= sinks) & (index < (length - recent)[:, None]))[:, None] & torch.isfinite(scores)
        slack = score_slack(absolute, q.shape[2])
        decided = valid_rows(length, longest) & ~free
        return summarize(scores, slack, free, scores - slack, decided, length, softmax_scale)

    @property
    def bytes_per_search(self) -> Int[Tensor, "batch num_kv_heads"]:
        """Bytes of the index that a search reads: none, there is none."""
        keys = self.store.keys
        return torch.zeros(keys.shape[:2], dtype=torch.int64, device=keys.device)

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on."""
        self.store.truncate(kv_len)

    def select_batch(self, ids: Tensor) -> None:
        """Row i becomes a copy of row ids[i]."""
        self.store.select_batch(ids)

    def memory_bytes(self) -> int:
        """Bytes the index adds to the cache: none."""
        return 0
