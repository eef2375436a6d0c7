"""Retrieval through any KeyIndex: bounds -> tau -> search -> exact attention over what was found.

The sketch has a fused path of its own (kernels attend_tiers); this one serves every other index, with nothing but the seam.
"""

from dataclasses import replace

import torch
from torch import Tensor

from louver.attention.arithmetic import attention_arithmetic, largest_norm, logit_error
from louver.attention.asked import asked_mass, everything_where
from louver.attention.dense import plain_stats
from louver.errors import PolicyError
from louver.geometry.rounding import gamma, norm_above, score_slack
from louver.kernels import get_ops
from louver.kernels.reference.attend import nth_best
from louver.kernels.reference.sample import sample_scores
from louver.kernels.reference.search import csr_rows, score
from louver.kernels.reference.step import keep_the_best
from louver.protocols import AttendResult, BoundSummary, Cuts, KeyIndex, Policy, SelectionLike, StepStats
from louver.shapes import Keys, Query, Values


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
    if policy.sample is not None:
        sample = sample_scores(q, keys, store.kv_start, store.kv_len, policy.sample)
        summary = replace(summary, sample=sample)
    cuts = policy.cuts(summary)
    cuts = keep_the_best(cuts, summary) if keep_best else cuts
    position = torch.arange(keys.shape[2], device=q.device)
    valid = ((position >= store.kv_start[:, None]) & (position < store.kv_len[:, None]))[:, None]
    forced = (position < store.kv_start[:, None] + policy.sinks) | (position >= store.kv_len[:, None] - policy.recent)

    def attend_above(cuts: Cuts) -> tuple[SelectionLike, Tensor, Tensor, Tensor, Tensor, Tensor]:
        found, mask, tau = _select(index, q, cuts.exact, cuts.fine, cuts.rank)
        mask = (mask | forced[:, None]) & valid
        flat = mask.flatten(0, 1)
        indptr = torch.nn.functional.pad(flat.sum(-1).cumsum(0), (1, 0))
        out, lse = get_ops("reference").attend_selection(q, keys, values, indptr, flat.nonzero()[:, 1], scale)
        floor = lse.double() - logit_error(q, keys, scale, valid[:, 0]) - lse.abs() * 2.0**-22 - 1e-5
        floor = floor - gamma(mask.sum(-1).double() + 8)
        share = _dropped_share(valid.sum(-1) - mask.sum(-1), tau, floor, summary)
        return found, mask, tau, out, lse, share

    found, mask, tau, out, lse, share = attend_above(cuts)
    asked = asked_mass(policy)
    if asked is not None and bool((failed := ~(share <= asked)).any()):
        found, mask, tau, out, lse, share = attend_above(everything_where(failed, cuts))

    group_size = q.shape[1] // keys.shape[1]
    arithmetic = attention_arithmetic(q, keys, values, scale, mask.sum(-1), valid[:, 0], out)
    left_out = valid.sum(-1) - mask.sum(-1)
    # A convex combination of values is no longer than the longest of them.
    largest = largest_norm(values, group_size, valid[:, 0])
    reach = largest + torch.minimum(largest, norm_above(out.float()) + arithmetic)
    certificate = torch.where(left_out > 0, (share * reach * (1 + 1e-5)).nan_to_num(torch.inf, posinf=torch.inf), 0.0)
    return AttendResult(
        out=out,
        lse=lse,
        stats=_stats(found, mask, valid, index, group_size),
        certificate=certificate,
        arithmetic_bound=arithmetic,
        dropped_mass_bound=share,
        tau=tau,
        exact_mask=mask if record else None,
    )


def _dropped_share(left_out: Tensor, tau: Tensor, floor: Tensor, summary: BoundSummary) -> Tensor:
    """At most the share of the mass that was left out: count [batch, num_q_heads], all below tau, with log kept mass >= floor.

    Every key left out scores below tau, so their mass is at most left_out e^(scale tau). Those whose bin lies below tau weigh no
    more than that bin's upper mass, too.
    """
    scale = summary.softmax_scale
    below = summary.edges[..., :-1] <= tau[..., None]
    mass = (
        torch.where(below, summary.upper_mass.double(), 0.0).sum(-1)
        * (1 + gamma(summary.num_keys.double() + 8))[:, None]
    )
    mass = mass * (1 + 1e-5) + left_out * 2.0**-120  # exponentials, and what underflowed
    others = (left_out - torch.where(below, summary.upper_count, 0).sum(-1)).clamp_min(0).double()
    by_bins = torch.logaddexp(mass.log() + summary.shift.double(), others.log() + tau.double() * scale)
    by_bins = by_bins + 1e-4 + summary.shift.double().abs() * 2.0**-20
    plain = tau.double() * scale + left_out.clamp_min(1).double().log()
    ceiling = torch.where(torch.isfinite(by_bins), torch.minimum(plain, by_bins), plain)
    share = (torch.sigmoid(ceiling - floor).float() * (1 + 1e-5) + 2.0**-125).clamp_max(1.0)
    return torch.where(left_out > 0, torch.where(torch.isnan(share), 1.0, share), 0.0)


def _select(
    index: KeyIndex, q: Query, tau: Tensor, fine: Tensor, rank: Tensor | None
) -> tuple[SelectionLike, Tensor, Tensor]:
    """Search; with a rank, first above ``fine``, then above the rank-th best score found there. The mask, and its tau."""
    keys = index.store.keys
    if rank is not None:
        scores, slack, mask = _scores(q, keys, index.search(q, fine))
        tau = torch.maximum(tau, nth_best(scores - slack, mask, rank))
    found = index.search(q, tau)
    scores, slack, mask = _scores(q, keys, found)
    if rank is not None:
        tau = torch.maximum(tau, nth_best(scores - slack, mask, rank))
        mask = mask & ~(scores + slack < tau[..., None])
    return found, mask, tau


def _scores(q: Query, keys: Keys, found: SelectionLike) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, their slack and the mask of a selection, dense over [batch, num_q_heads, kv_len]."""
    rows = csr_rows(found.indptr, found.indices.numel())
    absolute = score(q.abs(), keys.abs(), found.indptr, found.indices)
    mask = torch.zeros(found.indptr.numel() - 1, keys.shape[2], dtype=torch.bool, device=q.device)
    scores, slack = (torch.zeros(mask.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    mask[rows, found.indices] = True
    scores[rows, found.indices] = found.scores
    slack[rows, found.indices] = score_slack(absolute, q.shape[2])
    shape = (*q.shape[:2], keys.shape[2])
    return scores.reshape(shape), slack.reshape(shape), mask.reshape(shape)


def _stats(found: SelectionLike, mask: Tensor, valid: Tensor, index: KeyIndex, group_size: int) -> StepStats:
    num_keys = valid.sum(-1).expand_as(found.num_scanned).long().contiguous()
    num_exact = mask.unflatten(1, (-1, group_size)).any(2).sum(-1)
    num_scanned = torch.maximum(found.num_scanned.long(), num_exact)
    stats = plain_stats(num_keys, num_scanned, num_exact, index.store.keys.shape[3])
    return replace(stats, index_bytes=index.bytes_per_search)
