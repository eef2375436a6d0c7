"""SketchIndex: every key as a 4-bit code and a radius, so that its score is known to within a bound without reading it.

Guarantee: exact. A search returns every key whose real score against the stored key reaches tau. Cost: a search streams about
an eighth of the keys' 16-bit bytes and reads in full only the keys the bound can't rule out; appending encodes a block once.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from louver.errors import ShapeError
from louver.geometry.metric import query_weight
from louver.index.results import Selection
from louver.kernels import get_ops, resolve_backend
from louver.kernels.ops import Bounds
from louver.kv.device import DeviceStore, version
from louver.kv.history import history_of
from louver.protocols import BoundSummary, Guarantee, KVStore
from louver.shapes import Keys, PerQueryHead, PerRow, Query, Values, check_query, check_tau
from louver.sketch.accounting import key_block_bytes
from louver.sketch.layout import Sketch, SketchConfig, empty_sketch


class SketchIndex:
    """A sketch of a store's keys (and values), grown by whole blocks and never rebuilt."""

    guarantee: ClassVar[Guarantee] = "exact"

    def __init__(self, store: KVStore, *, config: SketchConfig | None = None, backend: str = "auto") -> None:
        """Index a store. The sketch starts empty; ``refresh`` takes in what the store holds."""
        self.store = store
        self.config = config or SketchConfig()
        self._asked_backend = backend
        self.backend = resolve_backend(backend)
        self.sketch: Sketch | None = None
        self._weight: Tensor | None = None
        self._encoded_start: Tensor | None = None
        self._settled: tuple[Tensor, int, list[int], list[int]] | None = None  # what the host knows of the last refresh
        self._seen = history_of(store).count
        self.prepared: dict[
            Any, Any
        ] = {}  # steps that attention keeps ready (attention/prepared.py); they hold this memory

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"prepared": {}, "_settled": None}  # a copy has memory of its own, written to anew

    @classmethod
    def build(
        cls,
        keys: Keys,
        values: Values | None = None,
        metric_queries: Tensor | None = None,
        *,
        kv_start: PerRow | None = None,
        kv_len: PerRow | None = None,
        config: SketchConfig | None = None,
        backend: str = "auto",
    ) -> "SketchIndex":
        """Sketch keys [batch, num_kv_heads, kv_len, head_dim] and, where given, values of the same shape.

        The tensors are kept, not copied. metric_queries [batch, num_q_heads, q_len, head_dim] are queries like those to come:
        they make bounds tighter and never change a result. Row i holds the tokens kv_start[i] .. kv_len[i] (default: all).

        Raises:
            ShapeError: shapes, dtypes or devices do not fit together.

        Example:
            >>> keys = torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(0))
            >>> index = SketchIndex.build(keys)
            >>> q = keys[:, [0, 0, 1, 1], 7]
            >>> int(index.search(q, torch.full((1, 4), 50.0)).row(0, 0)[0][0])
            7
        """
        index = cls(DeviceStore.wrap(keys, values, kv_start, kv_len), config=config, backend=backend)
        if metric_queries is not None:
            index.fix_metric(metric_queries)
        index.refresh()
        return index

    def fix_metric(self, queries: Tensor, valid: Tensor | None = None) -> None:
        """Take the metric from queries [batch, num_q_heads, q_len, head_dim]; valid bool [batch, q_len] marks real tokens.

        Only before the first block is encoded; afterwards the metric stays, and a call changes nothing.
        """
        if self.sketch is not None and self._weight is not None:
            return
        keys = self.store.keys
        if queries.dim() != 4 or queries.shape[1] % max(1, keys.shape[1]) or queries.shape[3] != keys.shape[3]:
            raise ShapeError(
                f"metric_queries have shape {tuple(queries.shape)}; wanted [batch, num_q_heads, q_len, head_dim] with "
                f"num_q_heads a multiple of {keys.shape[1]} and head_dim={keys.shape[3]}"
            )
        if self.sketch is None or not self.sketch.num_blocks.any():
            self._weight, self.sketch, self._settled = query_weight(queries, keys.shape[1], valid), None, None

    def refresh(self) -> None:
        """Encode the blocks that filled since the last call; the rest of each row stays exact."""
        self._follow()
        start = self.store.kv_start
        keys = self.store.keys
        if not keys.shape[3] or (self.sketch is not None and self._nothing_filled(start, keys.shape[2])):
            return  # nothing was ever appended, or nothing since
        values, end = self.store.values, self.store.kv_len
        sketch = self._ready_sketch(keys, values)
        if self._encoded_start is None or not torch.equal(self._encoded_start, start):
            sketch.num_blocks.zero_()  # blocks count from a row's first valid token
            self._encoded_start = start.clone()
            self.prepared.clear()  # they tell by where rows begin
        blocks = ((end - start) // self.config.frame_len).clamp_min(0)
        if bool((blocks < sketch.num_blocks).any()):
            self._open_from(keys.shape[2])
        if bool((blocks > sketch.num_blocks).any()):
            if values is not None and not sketch.num_blocks.any():
                self._fix_value_mean(sketch, values, start, end)
            self.prepared.clear()  # they would keep what it outgrows
            sketch.reserve(self._blocks_reserved(int(blocks.max())))
            get_ops(self.backend).encode_block(keys, values, sketch, start, end)
        if bool((end == keys.shape[2]).all()):
            self._settled = (start, version(start), start.tolist(), blocks.tolist())

    def _blocks_reserved(self, num_blocks: int) -> int:
        # For as many as the store was asked to: the first block that closes would move all, and end what was captured.
        return max(num_blocks, getattr(self.store, "reserve_tokens", 0) // self.config.frame_len)

    def capacity_for(self, kv_len: int) -> int:
        """Blocks per row the sketch will have room for once rows of kv_len tokens are encoded."""
        num_blocks = self._blocks_reserved(kv_len // self.config.frame_len)
        return num_blocks if self.sketch is None else self.sketch.capacity_for(num_blocks)

    def _follow(self) -> None:
        """Open the blocks whose tokens the store lost, or moved, while the index was not asked."""
        history = history_of(self.store)
        if history.count == self._seen:
            return
        kept, self._seen, self._settled = history.kept_since(self._seen), history.count, None
        self.prepared.clear()
        if kept:
            self._open_from(kept)
        elif kept == 0:  # other rows, perhaps of another shape
            keys = self.store.keys
            if self._weight is not None and self._weight.shape != (*keys.shape[:2], keys.shape[3]):
                self._weight = None
            self.sketch = self._encoded_start = None

    def _open_from(self, kept: int) -> None:
        """Open the blocks that hold a token from position kept on, or past the end of their row."""
        sketch, store = self.sketch, self.store
        if sketch is not None:
            full = ((store.kv_len.clamp(max=kept) - store.kv_start) // self.config.frame_len).clamp_min(0)
            sketch.num_blocks = torch.minimum(sketch.num_blocks, full.to(torch.int32))

    def _nothing_filled(self, start: Tensor, tokens: int) -> bool:
        """Whether the host alone can tell that no block filled since the last refresh: then nobody waits for a GPU."""
        if self._settled is None or self._settled[0] is not start or self._settled[1] != version(start):
            return False
        frame_len = self.config.frame_len
        return all((tokens - s) // frame_len == b for s, b in zip(*self._settled[2:], strict=True))

    def _ready_sketch(self, keys: Tensor, values: Tensor | None) -> Sketch:
        if self.sketch is None:
            self.backend = resolve_backend(self._asked_backend, keys.device)
            config = self.config
            if values is None and config.values:
                config = replace(config, values=False)
            self.sketch = empty_sketch(config, keys.shape[0], keys.shape[1], keys.shape[3], keys.device)
            if self._weight is not None:
                self.sketch.query_weight[..., : keys.shape[3]] = self._weight
        return self.sketch

    @staticmethod
    def _fix_value_mean(sketch: Sketch, values: Tensor, start: Tensor, end: Tensor) -> None:
        position = torch.arange(values.shape[2], device=values.device)
        valid = ((position >= start[:, None]) & (position < end[:, None]))[:, None, :, None]
        clean = torch.nan_to_num(values.float(), nan=0.0, posinf=0.0, neginf=0.0)
        mean = torch.where(valid, clean, 0.0).sum(2) / (end - start).clamp_min(1)[:, None, None]
        sketch.value_mean[..., : values.shape[3]] = mean.clamp(-1e30, 1e30)

    def search(self, q: Query, tau: PerQueryHead) -> Selection:
        """Every key whose real score reaches tau [batch, num_q_heads]; extras only within the rounding slack.

        Raises:
            ShapeError: q is not [batch, num_q_heads, head_dim] for these keys, or tau does not match q.
            NonFiniteError: q is not finite, or tau is NaN.
        """
        keys = self.store.keys
        check_query(q, keys)
        check_tau(tau, q)
        sketch = self._current()
        (indptr, indices, scores), scanned = get_ops(self.backend).search(
            q.resolve_neg(), tau.float(), keys, sketch, self.store.kv_start, self.store.kv_len
        )
        num_keys = (self.store.kv_len - self.store.kv_start).clamp_min(0)
        return Selection(
            indptr=indptr,
            indices=indices,
            scores=scores,
            num_scanned=scanned + (num_keys - sketch.num_blocks * sketch.config.frame_len)[:, None],
            num_keys=num_keys,
            num_q_heads=q.shape[1],
        )

    def bounds(self, q: Query, softmax_scale: float, sinks: int = 0, recent: int = 0) -> Bounds:
        """Bounds of every sketched key, with their summary."""
        check_query(q, self.store.keys)
        q = q.resolve_neg()
        return get_ops(self.backend).bounds(
            q, self.store.keys, self._current(), self.store.kv_start, self.store.kv_len, softmax_scale, sinks, recent
        )

    def summarize(self, q: Query, softmax_scale: float, sinks: int = 0, recent: int = 0) -> BoundSummary:
        """The bounds of this query, for a policy."""
        return self.bounds(q, softmax_scale, sinks, recent).summary

    def _current(self) -> Sketch:
        self._follow()
        if self.sketch is None:
            self.refresh()
        sketch, start = self._ready_sketch(self.store.keys, self.store.values), self.store.kv_start
        if self._encoded_start is not None and not torch.equal(self._encoded_start, start):
            sketch.num_blocks = torch.zeros_like(start)  # until the next refresh every token is open
            self._encoded_start = self._settled = None
            self.prepared.clear()
        return sketch

    def prefix(self, kv_len: int) -> "SketchIndex":
        """The index as it was when every row ended at kv_len: its first blocks, shared and not encoded anew.

        For looking back, as experiments do; the two must not grow apart.
        """
        self._follow()
        keys, values = (None if x is None else x[:, :, :kv_len] for x in (self.store.keys, self.store.values))
        assert keys is not None
        end = self.store.kv_len.clamp(max=kv_len)
        store = DeviceStore.wrap(keys, values, self.store.kv_start, end)
        earlier = SketchIndex(store, config=self.config, backend=self.backend)
        if self.sketch is not None:
            whole = ((end - self.store.kv_start) // self.config.frame_len).clamp_min(0).to(torch.int32)
            earlier.sketch = replace(self.sketch, num_blocks=torch.minimum(self.sketch.num_blocks, whole))
        earlier._weight, earlier._encoded_start = self._weight, self._encoded_start
        return earlier

    def tokens_of(self, row: int, q_len: int) -> "SketchIndex":
        """The last q_len tokens of a row as the rows of an index over the same memory; each row ends with its own token.

        A block that one of these tokens closed is open to the tokens before it: its sketch speaks of what they must not see.
        """
        store, sketch = self.store, self._current()
        keys, values = (
            None if x is None else x[row : row + 1].expand(q_len, -1, -1, -1) for x in (store.keys, store.values)
        )
        assert keys is not None
        start = store.kv_start[row : row + 1].expand(q_len).contiguous()
        behind = torch.arange(q_len - 1, -1, -1, dtype=torch.int32, device=keys.device)
        end = torch.maximum(store.kv_len[row] - behind, start)
        seen = SketchIndex(DeviceStore.wrap(keys, values, start, end), config=self.config, backend=self.backend)
        weight, mean = (x[row : row + 1].repeat(q_len, 1, 1) for x in (sketch.query_weight, sketch.value_mean))
        num_blocks = torch.minimum(sketch.num_blocks[row], (end - start) // self.config.frame_len)
        pages = torch.full((q_len, 1), row, dtype=torch.int32, device=keys.device)
        seen.sketch = replace(sketch, num_blocks=num_blocks, query_weight=weight, value_mean=mean, pages=pages)
        return seen

    @property
    def bytes_per_search(self) -> Int[Tensor, "batch num_kv_heads"]:
        """Bytes of the sketch that one search reads, whatever it finds."""
        sketch = self.sketch
        if sketch is None:
            return torch.zeros(self.store.keys.shape[:2], dtype=torch.int64)
        block = key_block_bytes(sketch.dims, sketch.num_slices, sketch.config.frame_len)
        return (sketch.num_blocks.long() * block)[:, None].expand(-1, self.store.keys.shape[1])

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on; blocks that lose a token open again."""
        self._follow()
        self.store.truncate(kv_len)
        self._seen, self._settled = history_of(self.store).count, None
        self._open_from(kv_len)

    def select_batch(self, ids: Tensor) -> None:
        """Row i becomes a copy of row ids[i]."""
        self._follow()
        self.store.select_batch(ids)
        self._seen, self._settled = history_of(self.store).count, None
        self.prepared.clear()
        if self.sketch is not None:
            self.sketch = self.sketch.select_batch(ids)
        if self._weight is not None:
            self._weight = self._weight[ids]
        if self._encoded_start is not None:
            self._encoded_start = self._encoded_start[ids]

    def memory_bytes(self) -> int:
        """Bytes the index adds to the cache, room to grow included."""
        return 0 if self.sketch is None else self.sketch.memory_bytes()

    def state(self) -> dict[str, Tensor]:
        """The tensors a file needs to go on from here, in the canonical layout; nothing before the first tokens."""
        self._follow()
        if self.sketch is None:
            return {}
        state = self.sketch.trimmed()
        if self._weight is not None:
            state["metric_weight"] = self._weight
        if self._encoded_start is not None:
            state["encoded_start"] = self._encoded_start
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from the tensors of ``state``; the store already holds the tokens they describe."""
        if not state:
            return
        held = {name: x.to(self.store.keys.device, copy=True) for name, x in state.items()}
        self._weight, self._encoded_start = held.pop("metric_weight", None), held.pop("encoded_start", None)
        if "value_codes" not in held:
            self.config = replace(self.config, values=False)
        self.sketch = Sketch(config=self.config, head_dim=self.store.keys.shape[3], **held)
        self.backend = resolve_backend(self._asked_backend, self.store.keys.device)
        self._seen, self._settled = history_of(self.store).count, None
        self.prepared.clear()
