"""LouverAttention: one layer's cache, its index and its policy, behind the LayerAttention seam."""

import torch
from torch import Tensor

from louver.attention.dense import attend_everything
from louver.attention.on_store import OnStore
from louver.attention.sparse import attend
from louver.errors import PolicyError
from louver.index.ball import BallIndex
from louver.index.flat import FlatIndex
from louver.index.sketch import SketchIndex
from louver.kernels import resolve_backend
from louver.policies.base import Dense
from louver.policies.spec import parse
from louver.protocols import AttendResult, KeyIndex, Policy
from louver.shapes import PerRow, Query, check_query
from louver.sketch.layout import SketchConfig

INDEXES = ("sketch", "flat", "ball")


class LouverAttention(OnStore):
    """Serves the decode steps of one layer from a sketch of its cache.

    Args:
        policy: what a step keeps; a specification or a policy. Changes results, within its certificate.
        index: "sketch", or "flat" or "ball" for retrieval without a sketch. Speed only.
        config: how the cache is sketched. Speed only.
        backend: which kernels; "auto" is the fastest the device has. Speed only.
        reserve_tokens: allocate this many tokens at once. Speed only.
    """

    def __init__(
        self,
        policy: str | Policy = "exact:0.01",
        *,
        index: str = "sketch",
        config: SketchConfig | None = None,
        backend: str = "auto",
        reserve_tokens: int = 0,
    ) -> None:
        super().__init__(reserve_tokens=reserve_tokens)
        self.policy = parse(policy)
        resolve_backend(backend)
        self.index: KeyIndex
        if index == "sketch":
            self.index = SketchIndex(self.store, config=config, backend=backend)
        elif index == "flat":
            self.index = FlatIndex(self.store)
        elif index == "ball":
            self.index = BallIndex(self.store)
        else:
            raise PolicyError(f"index={index!r} is unknown; wanted one of {', '.join(INDEXES)}")

    def observe(self, queries: Tensor, kv_start: PerRow | None, softmax_scale: float) -> None:
        """See the prompt's queries [batch, num_q_heads, q_len, head_dim]: the first ones set the metric; then encode."""
        self._align(kv_start)
        if isinstance(self.policy, Dense):
            return
        if isinstance(self.index, SketchIndex):
            position = torch.arange(self.kv_len - queries.shape[2], self.kv_len, device=queries.device)
            self.index.fix_metric(queries, position >= self.store.kv_start[:, None])
        self.index.refresh()

    def attend(self, q: Query, softmax_scale: float, kv_start: PerRow | None = None) -> AttendResult:
        """Attention of q [batch, num_q_heads, head_dim] over the tokens held, by this layer's policy."""
        self._align(kv_start)
        if isinstance(self.policy, Dense):
            check_query(q, self.store.keys)
            values = self.store.values
            assert values is not None
            return attend_everything(q, self.store, values, softmax_scale, self.record)
        return attend(
            q, self.index, policy=self.policy, softmax_scale=softmax_scale, keep_best=True, record=self.record
        )

    def _align(self, kv_start: PerRow | None) -> None:
        if kv_start is not None:
            self.store.kv_start = kv_start

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on."""
        self.index.truncate(kv_len)

    def select_batch(self, ids: Tensor) -> None:
        """Rearrange, repeat or drop rows: row i becomes the old row ids[i]."""
        self.index.select_batch(ids)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held, by name, room to grow included."""
        return {"keys_values": self.store.memory_bytes(), "index": self.index.memory_bytes()}
