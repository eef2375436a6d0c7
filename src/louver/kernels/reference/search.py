"""search: every key above tau, in CSR form; score: exact scores of given keys."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.geometry.rounding import score_slack
from louver.kernels.reference.bounds import bounds
from louver.kernels.reference.paging import contiguous
from louver.kernels.reference.rows import exact_scores, row_lengths, to_rows, to_tokens, valid_rows
from louver.shapes import Cache, Keys, PerQueryHead, PerRow, Query
from louver.sketch.layout import Sketch

Csr = tuple[Int[Tensor, " rows_plus_1"], Int[Tensor, " selected"], Float[Tensor, " selected"]]


def search(
    q: Query,
    tau: PerQueryHead,
    keys: Cache,
    sketch: Sketch,
    kv_start: PerRow,
    kv_len: PerRow,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> tuple[Csr, Int[Tensor, "batch num_kv_heads"]]:
    """Every key whose real score is at least tau, and none whose real score is below it by more than the rounding slack.

    Returns (indptr int64, indices int64, scores float32) over rows batch * num_q_heads, indices being ascending token positions,
    and the number of keys of closed blocks that were read in full per KV head (unions over a GQA group).
    """
    keys = contiguous(keys, block_table)
    found = bounds(q, keys, sketch, kv_start, kv_len, 1.0)
    length, longest = row_lengths(kv_start, kv_len)
    group_size = q.shape[1] // keys.shape[1]
    scores, absolute = exact_scores(q, to_rows(keys, kv_start, length, longest))
    candidate = valid_rows(length, longest).expand(-1, q.shape[1], -1).clone()
    sketched = found.undecided.shape[2]
    ruled_out = found.undecided.repeat_interleave(group_size, 1) & (found.upper < tau[..., None])
    candidate[..., :sketched] &= ~ruled_out
    selected = candidate & ~(scores + score_slack(absolute, q.shape[2]) < tau[..., None])

    closed = torch.arange(longest, device=q.device) < (sketch.num_blocks * sketch.config.frame_len)[:, None]
    scanned = (candidate.unflatten(1, (-1, group_size)).any(2) & closed[:, None]).sum(-1)
    return _csr(to_tokens(selected, kv_start, keys.shape[2]), q, keys), scanned


def score(q: Query, keys: Keys, indptr: Int[Tensor, " rows_plus_1"], indices: Int[Tensor, " selected"]) -> Tensor:
    """Exact scores (float32) of the keys a CSR selection names."""
    rows = csr_rows(indptr, indices.numel())
    batch, head = rows // q.shape[1], rows % q.shape[1]
    picked = keys[batch, head // (q.shape[1] // keys.shape[1]), indices]
    return (q.float()[batch, head] * picked.float()).sum(-1)


def csr_rows(indptr: Int[Tensor, " rows_plus_1"], num_selected: int) -> Int[Tensor, " selected"]:
    """The row each entry of a CSR selection belongs to."""
    rows = torch.arange(indptr.numel() - 1, device=indptr.device)
    return rows.repeat_interleave(indptr.diff(), output_size=num_selected)


def _csr(selected: Tensor, q: Query, keys: Keys) -> Csr:
    flat = selected.flatten(0, 1)
    indptr = torch.nn.functional.pad(flat.sum(-1).cumsum(0), (1, 0))
    indices = flat.nonzero()[:, 1]
    return indptr, indices, score(q, keys, indptr, indices)
