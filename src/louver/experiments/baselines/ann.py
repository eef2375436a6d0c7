"""Nearest-neighbour indexes of faiss over the keys, by inner product: HNSW, IVF, PQ and LSH behind one adapter.

Sources: HNSW, Malkov and Yashunin, arXiv 1603.09320; IVF and PQ, Jégou et al., Product Quantization for Nearest Neighbor Search, 2011; LSH,
random rotations and Hamming distance (faiss IndexLSH), which knows angles only; all as in faiss (Douze et al., arXiv 2401.08281). They return
k keys that are probably near, never all above a threshold. Guarantee: none.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from louver.errors import PolicyError
from louver.experiments.baselines.selecting import HeadMask, RowMask, Selecting, check_budget, num_kept
from louver.shapes import Query

KINDS = ("hnsw", "ivf", "pq", "lsh")


@dataclass(frozen=True, kw_only=True)
class AnnOptions:
    """How an index is built and searched. Every field changes results."""

    kind: str
    neighbors: int = 32  # hnsw: M, links per key
    ef_construction: int = 80  # hnsw
    ef_search: int = 128  # hnsw; at least k is used, or k could not be returned
    num_lists: int = 0  # ivf; 0: the square root of the number of keys, times 4
    num_probes: int = 16  # ivf: lists that a search looks into
    num_codes: int = 16  # pq: bytes per key
    bits_per_channel: int = 4  # lsh
    rescored: int = 1  # pq, lsh: candidates per key wanted, of which the best by true score are taken

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PolicyError(f"kind={self.kind!r} is unknown; wanted one of {', '.join(KINDS)}")


class AnnIndex:
    """A faiss index over keys [n, head_dim], and what a search in it costs."""

    def __init__(self, keys: Tensor, options: AnnOptions) -> None:
        self.options, self.head_dim, self.num_keys = options, keys.shape[1], keys.shape[0]
        data = _numpy(keys)
        self.index = _empty(options, self.head_dim, self.num_keys)
        if not self.index.is_trained:
            self.index.train(data)
        self.index.add(data)

    def add(self, keys: Tensor) -> None:
        """Take in more keys [n, head_dim]; what was learnt from the first ones stays."""
        self.index.add(_numpy(keys))
        self.num_keys += keys.shape[0]

    def search(self, q: Tensor, k: int) -> Tensor:
        """Up to k ids for each of q [m, head_dim]: int64 [m, k], -1 where the index found fewer."""
        if self.options.kind == "hnsw":
            self.index.hnsw.efSearch = max(self.options.ef_search, k)
        if self.options.kind == "ivf":
            self.index.nprobe = self.options.num_probes
        return torch.from_numpy(self.index.search(_numpy(q), k)[1]).to(q.device)

    def search_rescored(self, q: Tensor, k: int, keys: Tensor) -> Tensor:
        """As search, from ``rescored`` times as many candidates by their true scores with keys [n, head_dim]."""
        wide = min(self.options.rescored * k, self.num_keys)
        found = self.search(q, wide)
        if wide == k:
            return found
        scores = (q.float()[:, None] @ keys.float()[found.clamp(min=0)].mT)[:, 0].masked_fill(found < 0, -torch.inf)
        return found.gather(1, scores.topk(k).indices)

    def cost(self, q: Tensor, k: int) -> tuple[float, float]:
        """Mean keys compared in full, and mean bytes read of the index, per search of q [m, head_dim] for k keys.

        HNSW counts its comparisons (16-bit keys, and the links of each key it visits). IVF reads its centroids and the keys of the
        lists it probes. PQ and LSH read every code, and the keys they score again.
        """
        import faiss

        counted: Any = faiss.cvar
        options, row = self.options, 2 * self.head_dim
        if options.kind == "hnsw":
            counted.hnsw_stats.reset()
            self.search(q, k)
            stats = counted.hnsw_stats
            return stats.ndis / len(q), stats.nhops / len(q) * 2 * options.neighbors * 4
        if options.kind == "ivf":
            counted.indexIVF_stats.reset()
            self.search(q, k)
            return counted.indexIVF_stats.ndis / len(q), float(self.index.nlist * row)
        rescored = min(options.rescored * k, self.num_keys) if options.rescored > 1 else 0
        return float(rescored), float(self.num_keys * self.index.sa_code_size())

    def memory_bytes(self) -> int:
        """Bytes of the index beyond the 16-bit keys themselves."""
        import faiss

        held = faiss.serialize_index(self.index).nbytes
        return held - (4 * self.head_dim * self.num_keys if self.options.kind in ("hnsw", "ivf") else 0)


class Ann(Selecting):
    """Attends the ``budget`` (a share of the tokens, or a number of them) keys that a faiss index returns for each query head."""

    def __init__(self, kind: str, budget: float | int, *, reserve_tokens: int = 0, **options: Any) -> None:
        super().__init__(reserve_tokens=reserve_tokens)
        self.budget, self.options = check_budget(budget), AnnOptions(kind=kind, **options)
        self._indexes: dict[tuple[int, int], AnnIndex] = {}  # by row and KV head
        self._starts: list[int] = []  # of the rows the indexes were built for
        self._asked: Tensor | None = None  # the last query

    def select(self, q: Query, valid: RowMask, softmax_scale: float) -> HeadMask:
        """What the indexes return; a budget of all keys needs no index."""
        batch, num_kv_heads = self.store.keys.shape[:2]
        group = q.shape[1] // num_kv_heads
        mask = torch.zeros(batch, q.shape[1], len(self.store), dtype=torch.bool, device=q.device)
        starts = self.store.kv_start.tolist()
        if starts != self._starts:
            self._indexes, self._starts = {}, starts
        for row, start in enumerate(starts):
            length = len(self.store) - start
            k = int(num_kept(self.budget, torch.tensor(length)))
            if k == length:
                mask[row, :, start:] = True
                continue
            for head in range(num_kv_heads):
                index, mine = self._refreshed(row, head, start), slice(head * group, (head + 1) * group)
                found = index.search_rescored(q[row, mine], k, self.store.keys[row, head, start:])
                mask[row, mine, start:] = _mask(found, length)
        self._asked = q
        return mask

    def index_bytes(self, valid: RowMask) -> Tensor:
        """What all searches of a group read of the index."""
        return self._account(valid, 1)

    def compared(self, valid: RowMask) -> Tensor:
        """Keys that all searches of a group compare, as if no two compared the same."""
        return self._account(valid, 0)

    def _account(self, valid: RowMask, which: int) -> Tensor:
        """One of the figures of ``AnnIndex.cost``, found by searching once more."""
        assert self._asked is not None, "select comes first"
        total = super().compared(valid)
        group = self._asked.shape[1] // total.shape[1]
        for (row, head), index in self._indexes.items():
            k = int(num_kept(self.budget, torch.tensor(index.num_keys)))
            total[row, head] = int(group * index.cost(self._asked[row, head * group : (head + 1) * group], k)[which])
        return total

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on; the indexes are built anew."""
        super().truncate(kv_len)
        self._indexes = {}

    def select_batch(self, ids: Tensor) -> None:
        """Rearrange, repeat or drop rows: row i becomes the old row ids[i]; the indexes are built anew."""
        super().select_batch(ids)
        self._indexes = {}

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held, by name."""
        return super().memory_bytes() | {"index": sum(index.memory_bytes() for index in self._indexes.values())}

    def _refreshed(self, row: int, head: int, start: int) -> AnnIndex:
        """The index of a row and KV head, with the tokens added since it was built."""
        index, keys = self._indexes.get((row, head)), self.store.keys[row, head, start:]
        if index is None:
            index = self._indexes[row, head] = AnnIndex(keys, self.options)
        elif index.num_keys < keys.shape[0]:
            index.add(keys[index.num_keys :])
        index.options = self.options
        return index


def _mask(found: Tensor, length: int) -> Tensor:
    """Bool [m, length] of ids [m, k], where -1 is nothing."""
    mask = torch.zeros(found.shape[0], length + 1, dtype=torch.bool, device=found.device)
    return mask.scatter_(1, torch.where(found < 0, length, found), True)[:, :length]


def _empty(options: AnnOptions, head_dim: int, num_keys: int) -> Any:
    import faiss

    if options.kind == "hnsw":
        index = faiss.IndexHNSWFlat(head_dim, options.neighbors, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = options.ef_construction
        return index
    if options.kind == "ivf":
        lists = min(options.num_lists or max(1, int(4 * num_keys**0.5)), max(1, num_keys // 4))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(head_dim), head_dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe, index.cp.min_points_per_centroid = options.num_probes, 1
        return index
    if options.kind == "pq":
        bits = 8 if num_keys >= 256 else 4
        index = faiss.IndexPQ(head_dim, options.num_codes, bits, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.min_points_per_centroid = 1
        return index
    return faiss.IndexLSH(head_dim, options.bits_per_channel * head_dim)


def _numpy(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().float().cpu().numpy())
