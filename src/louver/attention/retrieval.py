"""Retrieval through any KeyIndex: bounds -> tau -> search -> exact attention over what was found.

The sketch has a fused path of its own (kernels attend_tiers); this one serves every other index, with nothing but the seam.
"""

import torch
from torch import Tensor

from louver.attention.arithmetic import attention_arithmetic
from louver.errors import PolicyError
from louver.geometry.rounding import score_slack
from louver.kernels import get_ops
from louver.kernels.reference.search import csr_rows, score
from louver.protocols import AttendResult, KeyIndex, Policy, SelectionLike, StepStats
from louver.shapes import Query, Values
from louver.sketch.accounting import CACHE_BYTES, dense_bytes


def attend_retrieval(
    q: Query, index: KeyIndex, values: Values, policy: Policy, scale: float, keep_best: bool, record: bool
) -> AttendResult:
    """Attend exactly the keys the policy's threshold selects, and bound the mass of the rest by the threshold itself.

    Raises:
        PolicyError: the policy drops nothing, which only a sketch with values can do.
    """
    if not policy.drops:
        raise PolicyError(
            f"policy {policy.spec!r} drops nothing, so it needs sketched values; "
            f"{type(index).__name__} has none: use SketchIndex, or a retrieval policy such as 'budget:0.05'"
        )
    store, keys = index.store, index.store.keys
    summary = index.summarize(q, scale, policy.sinks, policy.recent)
    cuts = policy.cuts(summary)
    tau = torch.minimum(cuts.exact, summary.best_lower) if keep_best else cuts.exact
    found = index.search(q, tau)
    mask, tau = _final_selection(found, tau, cuts.rank, keys, q)
    position = torch.arange(keys.shape[2], device=q.device)
    valid = ((position >= store.kv_start[:, None]) & (position < store.kv_len[:, None]))[:, None]
    forced = (position < store.kv_start[:, None] + policy.sinks) | (position >= store.kv_len[:, None] - policy.recent)
    mask = (mask | forced[:, None]) & valid

    flat = mask.flatten(0, 1)
    indptr = torch.nn.functional.pad(flat.sum(-1).cumsum(0), (1, 0))
    out, lse = get_ops("reference").attend_selection(q, keys, values, indptr, flat.nonzero()[:, 1], scale)

    left_out = valid.sum(-1) - mask.sum(-1)
    ceiling = tau.double() * scale + left_out.clamp_min(1).double().log()
    share = torch.where(
        left_out > 0, torch.sigmoid(ceiling - lse.double() + 1e-3), 0.0
    ).float()  # 1e-3 nats: arithmetic
    value_norm = torch.where(valid[..., None], values.float(), 0.0).norm(dim=-1)
    group_size = q.shape[1] // keys.shape[1]
    largest = value_norm.amax(-1).repeat_interleave(group_size, 1) * (1 + 1e-5)
    certificate = torch.where(left_out > 0, share * (largest + out.float().norm(dim=-1) * 1.02), 0.0)
    return AttendResult(
        out=out,
        lse=lse,
        stats=_stats(found, mask, valid, index, group_size),
        certificate=certificate,
        arithmetic_bound=attention_arithmetic(q, keys, values, scale, mask.sum(-1)),
        dropped_mass_bound=share,
        tau=tau,
        exact_mask=mask if record else None,
    )


def _final_selection(
    found: SelectionLike, tau: Tensor, rank: Tensor | None, keys: Tensor, q: Query
) -> tuple[Tensor, Tensor]:
    """The mask of what was found, and the threshold it stands for once the rank is settled among the exact scores."""
    kv_len = keys.shape[2]
    rows = csr_rows(found.indptr, found.indices.numel())
    mask = torch.zeros(found.indptr.numel() - 1, kv_len, dtype=torch.bool, device=q.device)
    mask[rows, found.indices] = True
    if rank is not None and kv_len:
        slack = score_slack(score(q.abs(), keys.abs(), found.indptr, found.indices), q.shape[2])
        certain = torch.full(mask.shape, -torch.inf, device=q.device)
        certain[rows, found.indices] = torch.nan_to_num(found.scores - slack, nan=-torch.inf)
        nth = certain.sort(-1, descending=True).values.gather(
            -1, (rank.flatten().long() - 1).clamp(max=kv_len - 1)[:, None]
        )
        nth = torch.where(rank.flatten() <= kv_len, nth[:, 0], -torch.inf)
        mask[rows, found.indices] = ~(found.scores + slack < nth[rows])
        tau = torch.maximum(tau, nth.reshape(tau.shape))
    return mask.reshape(*q.shape[:2], kv_len), tau


def _stats(found: SelectionLike, mask: Tensor, valid: Tensor, index: KeyIndex, group_size: int) -> StepStats:
    num_keys = valid.sum(-1).expand_as(found.num_scanned).long()
    num_exact = mask.unflatten(1, (-1, group_size)).any(2).sum(-1)
    num_scanned = torch.maximum(found.num_scanned.long(), num_exact)
    head_dim = index.store.keys.shape[3]
    heads = num_keys.numel()
    read = (num_scanned + num_exact) * CACHE_BYTES * head_dim + index.memory_bytes() // max(1, heads)
    none = torch.zeros_like(num_keys)
    return StepStats(
        num_keys=num_keys,
        num_scanned=num_scanned,
        num_exact=num_exact,
        num_coarse=none,
        num_unread=none,
        bytes_read=read,
        bytes_dense=dense_bytes(num_keys, head_dim),
    )
