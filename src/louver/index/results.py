"""What a search returns: a ragged selection with its evidence."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from louver.kernels.reference.search import score
from louver.shapes import Keys, Query


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Keys per query head, in compressed sparse rows: row i = batch * num_q_heads + head holds indices[indptr[i]:indptr[i+1]].

    Indices are ascending token positions (int64), scores their exact scores (float32).
    """

    indptr: Int[Tensor, " rows_plus_1"]
    indices: Int[Tensor, " selected"]
    scores: Float[Tensor, " selected"]
    num_scanned: Int[Tensor, "batch num_kv_heads"]  # keys read in full because no bound ruled them out
    num_keys: Int[Tensor, " batch"]  # valid keys per row
    num_q_heads: int

    @classmethod
    def of_mask(
        cls,
        selected: Bool[Tensor, "batch num_q_heads kv_len"],
        q: Query,
        keys: Keys,
        num_scanned: Int[Tensor, "batch num_kv_heads"],
        num_keys: Int[Tensor, " batch"],
    ) -> "Selection":
        """The selection a dense mask over token positions stands for, its keys scored."""
        flat = selected.flatten(0, 1)
        indptr = torch.nn.functional.pad(flat.sum(-1).cumsum(0), (1, 0))
        indices = flat.nonzero()[:, 1]
        return cls(
            indptr=indptr,
            indices=indices,
            scores=score(q, keys, indptr, indices),
            num_scanned=num_scanned,
            num_keys=num_keys,
            num_q_heads=q.shape[1],
        )

    def row(self, batch: int, head: int) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """Token positions and scores selected for one query head."""
        i = batch * self.num_q_heads + head
        span = slice(int(self.indptr[i]), int(self.indptr[i + 1]))
        return self.indices[span], self.scores[span]

    def mask(self, kv_len: int) -> Bool[Tensor, "batch num_q_heads kv_len"]:
        """The selection as a dense mask over token positions."""
        rows = self.indptr.numel() - 1
        out = torch.zeros(rows, kv_len, dtype=torch.bool, device=self.indices.device)
        row = torch.arange(rows, device=out.device).repeat_interleave(self.indptr.diff())
        out[row, self.indices] = True
        return out.unflatten(0, (-1, self.num_q_heads))

    @property
    def selected_fraction(self) -> float:
        """Keys selected over valid keys, averaged over query heads."""
        return self.indices.numel() / max(1, int(self.num_keys.sum()) * self.num_q_heads)

    @property
    def scanned_fraction(self) -> float:
        """Keys read in full over valid keys, averaged over KV heads."""
        return int(self.num_scanned.sum()) / max(1, int(self.num_keys.sum()) * self.num_scanned.shape[1])
