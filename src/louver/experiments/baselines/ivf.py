"""An inverted file in torch: keys in clusters, the best clusters searched. For the GPU, and for many rows at once.

Source: Jégou et al., Product Quantization for Nearest Neighbor Search, 2011, as in faiss' IndexIVFFlat with inner products: a query compares
itself with every cluster's center, scores the keys of the nearest clusters and returns the best. 4 sqrt(n) clusters, and as many probed
as hold twice the budget on average. Keys that come later join the nearest cluster. Guarantee: none: a key in a cluster that is not
probed is lost, whatever its score. Cost: the centers, the probed keys, and the values of the keys returned.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from louver.errors import PolicyError
from louver.experiments.baselines.selecting import HeadMask, RowMask, Selecting, check_budget, num_kept, top
from louver.shapes import Query, group_heads

ROUNDS = 8  # of k-means
PROBED = 2.0  # times the budget, the keys that probed clusters hold on average


class TorchIvf(Selecting):
    """Attends the ``budget`` (a share of the tokens, or a number of them) best keys of the clusters nearest to each query head."""

    def __init__(self, budget: float | int) -> None:
        super().__init__()
        self.budget = check_budget(budget)
        self._centers: Tensor | None = None  # [batch, num_kv_heads, clusters, head_dim]
        self._member: Tensor | None = None  # int64 [batch, num_kv_heads, tokens], the cluster of each
        self._extra: Tensor | None = None  # keys scored in the last step beyond those attended, per row and KV head

    @classmethod
    def factory(cls, spec: str) -> Callable[[int], "TorchIvf"]:
        """layer_idx -> TorchIvf, from ``torch-ivf:BUDGET``."""
        try:
            budget = float(spec.partition(":")[2])
        except ValueError:
            raise PolicyError(f"{spec!r} can't be read; wanted torch-ivf:BUDGET") from None
        cls(budget)  # what is wrong is said now
        return lambda layer_idx: cls(budget)

    def select(self, q: Query, valid: RowMask, softmax_scale: float) -> HeadMask:
        """The best of what the probed clusters hold."""
        keys = self.store.keys.float()
        group = q.shape[1] // keys.shape[1]
        centers, member = self._clusters(keys, valid)
        count = num_kept(self.budget, valid.sum(-1))[:, None].expand(q.shape[:2])
        near = group_heads(q.float(), keys.shape[1]) @ centers.mT  # batch num_kv_heads group clusters
        probed = top(near.flatten(1, 2), torch.full_like(count, self._num_probed(centers.shape[2], keys.shape[2])))
        listed = probed.gather(-1, member.repeat_interleave(group, 1)) & valid[:, None]
        scores = (group_heads(q.float(), keys.shape[1]) @ keys.mT).flatten(1, 2)
        kept = top(scores.masked_fill(~listed, -torch.inf), count)
        together = (group_heads(mask, keys.shape[1]).any(2).sum(-1) for mask in (listed, kept))
        scanned, attended = together
        self._extra = scanned - attended
        return kept

    def index_bytes(self, valid: RowMask) -> Tensor:
        """The centers, and the keys that were scored and not attended."""
        assert self._centers is not None and self._extra is not None
        row = 2 * self._centers.shape[3]
        return row * (self._centers.shape[2] + self._extra)

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on."""
        super().truncate(kv_len)
        self._member = None if self._member is None else self._member[..., :kv_len]

    def select_batch(self, ids: Tensor) -> None:
        """Rearrange, repeat or drop rows: row i becomes the old row ids[i]."""
        super().select_batch(ids)
        if self._centers is not None and self._member is not None:
            self._centers, self._member = self._centers[ids], self._member[ids]

    def _num_probed(self, num_clusters: int, kv_len: int) -> int:
        share = self.budget if self.budget <= 1 else self.budget / kv_len
        return num_clusters if share == 1 else min(num_clusters, max(1, round(PROBED * share * num_clusters)))

    def _clusters(self, keys: Tensor, valid: RowMask) -> tuple[Tensor, Tensor]:
        if self._centers is None or self._member is None:
            self._centers, self._member = k_means(keys, valid, max(1, int(4 * keys.shape[2] ** 0.5)))
        known = self._member.shape[2]
        if known < keys.shape[2]:
            self._member = torch.cat([self._member, nearest(keys[:, :, known:], self._centers)], 2)
        return self._centers, self._member


def k_means(keys: Tensor, valid: RowMask, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Centers [batch, heads, clusters, head_dim], evenly spread keys to begin with, and the cluster of each key."""
    batch, heads, kv_len = keys.shape[:3]
    num_clusters = min(num_clusters, kv_len)
    centers = keys[:, :, torch.linspace(0, kv_len - 1, num_clusters, device=keys.device).long()].clone()
    weight = valid[:, None].to(keys.dtype).expand(batch, heads, kv_len)
    for _ in range(ROUNDS):
        member = nearest(keys, centers)
        sums = torch.zeros_like(centers).scatter_add_(2, member[..., None].expand_as(keys), keys * weight[..., None])
        sizes = torch.zeros(batch, heads, num_clusters, device=keys.device).scatter_add_(2, member, weight)
        centers = torch.where(sizes[..., None] > 0, sums / sizes.clamp(min=1)[..., None], centers)
    return centers, nearest(keys, centers)


def nearest(keys: Tensor, centers: Tensor) -> Tensor:
    """The nearest center of each key, int64 [batch, heads, kv_len]."""
    return (keys @ centers.mT - centers.square().sum(-1)[:, :, None] / 2).argmax(-1)
