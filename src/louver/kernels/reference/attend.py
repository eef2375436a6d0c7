"""attend_dense, attend_selection and attend_tiers: softmax attention over everything, over a selection, and in tiers."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from louver.geometry.rounding import norm_above, score_slack
from louver.kernels.ops import Bounds, TierOutput
from louver.kernels.reference.certificate import Tiers, certify, dropped_mass
from louver.kernels.reference.paging import contiguous
from louver.kernels.reference.product import matmul
from louver.kernels.reference.rows import exact_scores, row_lengths, to_rows, to_tokens, valid_rows
from louver.kernels.reference.search import csr_rows, score
from louver.protocols import COUNTS, Cuts
from louver.shapes import Cache, Keys, PerQueryHead, PerRow, Query, Values
from louver.sketch.encode import decode_frames
from louver.sketch.layout import Sketch, unpack_nibbles


def attend_dense(
    q: Query,
    keys: Cache,
    values: Cache,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> tuple[Query, PerQueryHead]:
    """softmax(softmax_scale q K^T) V over the valid tokens of each row, accumulated in float32; out in q's dtype, and lse."""
    length, longest = row_lengths(kv_start, kv_len)
    k, v = (to_rows(contiguous(x, block_table), kv_start, length, longest) for x in (keys, values))
    scores, _ = exact_scores(q, k)
    logits = torch.where(valid_rows(length, longest), scores * softmax_scale, -torch.inf)
    peak = logits.amax(-1) if longest else logits.new_full(logits.shape[:2], -torch.inf)
    weights = torch.exp(logits - torch.where(torch.isneginf(peak), 0.0, peak)[..., None])
    total = weights.sum(-1)
    out = matmul(weights.unflatten(1, (k.shape[1], -1)), v.float()).flatten(1, 2)
    out = out / torch.where(total > 0, total, 1.0)[..., None]  # not by e^lse, which is coarse where logits are large
    return out.to(q.dtype), peak + total.log()


def attend_selection(
    q: Query,
    keys: Keys,
    values: Values,
    indptr: Int[Tensor, " rows_plus_1"],
    indices: Int[Tensor, " selected"],
    softmax_scale: float,
) -> tuple[Query, PerQueryHead]:
    """Exact attention over the keys a CSR selection names, one row per (batch, query head); an empty row gives 0 and -inf."""
    rows = csr_rows(indptr, indices.numel())
    logits = score(q, keys, indptr, indices) * softmax_scale
    num_rows = indptr.numel() - 1
    peak = logits.new_full((num_rows,), -torch.inf).scatter_reduce(0, rows, logits, "amax")
    weights = torch.exp(logits - torch.where(torch.isneginf(peak), 0.0, peak)[rows])
    total = logits.new_zeros(num_rows).index_add(0, rows, weights)
    batch, head = rows // q.shape[1], rows % q.shape[1]
    picked = values[batch, head // (q.shape[1] // keys.shape[1]), indices].float()
    summed = picked.new_zeros(num_rows, values.shape[3]).index_add(0, rows, weights[:, None] * picked)
    out = summed / torch.where(total > 0, total, 1.0)[:, None]
    lse = torch.where(total > 0, peak + total.log(), -torch.inf)
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:2])


def attend_tiers(
    q: Query,
    keys: Cache,
    values: Cache,
    sketch: Sketch,
    bounds: Bounds,
    cuts: Cuts,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    drop: bool,
    record: bool = False,
    block_table: Int[Tensor, "batch pages"] | None = None,
    before: tuple[TierOutput, Bool[Tensor, "batch num_kv_heads"]] | None = None,
) -> TierOutput:
    """One decode step: every key in the tier its upper bound puts it in, with the certificate (docs/guarantee.md, 7-9).

    drop: keys that are not exact are left out (retrieval) instead of keeping their estimated weight; see Cuts for which those
    are. record: fill exact_mask. before: a step with the same arguments but other cuts, and the KV heads whose cuts changed since:
    the others' results may be taken from it (speed only).
    Decided keys are always exact. What one head of a GQA group reads serves the whole group, but in retrieval each head
    keeps its own selection.
    """
    sketch = sketch.by_row()
    keys, values = contiguous(keys, block_table), contiguous(values, block_table)
    length, longest = row_lengths(kv_start, kv_len)
    k, v = (to_rows(x, kv_start, length, longest).float() for x in (keys, values))
    group_size = q.shape[1] // k.shape[1]
    scores, absolute = exact_scores(q, k)
    slack = score_slack(absolute, q.shape[2])

    def widen(x: Tensor, fill: float | bool) -> Tensor:
        return torch.nn.functional.pad(x, (0, longest - x.shape[-1]), value=fill)

    undecided = widen(bounds.undecided, False)  # batch kv_heads longest
    decided = valid_rows(length, longest) & ~undecided
    per_head = undecided.repeat_interleave(group_size, 1)
    upper = widen(bounds.upper, -torch.inf)

    def reaches(cut: Tensor) -> Tensor:
        return per_head & ~(upper < cut[..., None])

    def share(mask: Tensor) -> Tensor:
        return mask.unflatten(1, (-1, group_size)).any(2)

    always = decided.repeat_interleave(group_size, 1)
    tau = cuts.exact
    if drop and cuts.rank is not None:
        tau = torch.maximum(tau, nth_best(scores - slack, always | reaches(cuts.fine), cuts.rank))
    above = reaches(cuts.unread if drop and cuts.rank is None else tau)
    if drop:
        if cuts.rank is not None:
            tau = torch.maximum(tau, nth_best(scores - slack, always | above, cuts.rank))
        exact = always | (above & ~(scores + slack < tau[..., None]))
        tau = tau if cuts.rank is not None else torch.maximum(tau, cuts.unread)
        coarse = torch.zeros_like(exact)
    else:
        exact = (share(above) | decided).repeat_interleave(group_size, 1)
        coarse = share(reaches(cuts.unread)).repeat_interleave(group_size, 1) & ~exact
    present = exact if drop else valid_rows(length, longest).expand_as(exact)
    tiers = Tiers(
        exact=exact,
        coarse=coarse,
        present=present,
        score=torch.where(exact, scores, widen(bounds.estimate, 0.0)),
        half_width=torch.where(exact, slack, widen(bounds.half_width, 0.0)),
        values=_mix_values(share(exact), None if drop else share(coarse), v, sketch),
        sketch=sketch,
        exact_norm=norm_above(v),
        softmax_scale=softmax_scale,
    )
    out, lse, certificate, arithmetic = certify(tiers, q.dtype)
    dropped = torch.zeros_like(lse)
    if drop:
        read = share(above).repeat_interleave(group_size, 1)
        ceiling = torch.where(read, torch.minimum(upper, scores + slack), upper)
        left_out = valid_rows(length, longest) & ~exact
        dropped, certificate = dropped_mass(tiers, left_out, ceiling, out, arithmetic)

    frame_len = sketch.config.frame_len
    closed = (torch.arange(longest, device=q.device) < (sketch.num_blocks * frame_len)[:, None])[:, None]
    in_blocks = torch.nn.functional.pad(share(coarse), (0, -longest % frame_len)).unflatten(-1, (-1, frame_len))
    columns = {
        "keys": length[:, None],
        "blocks": sketch.num_blocks[:, None],
        "open": (length - sketch.num_blocks * frame_len)[:, None],
        "scanned": ((share(above) | decided) & closed).sum(-1),
        "exact": (share(exact) & closed).sum(-1),
        "coarse": share(coarse).sum(-1),
        "value_blocks": in_blocks.any(-1).sum(-1),
    }
    counts = torch.stack([columns[name].expand(k.shape[:2]).long() for name in COUNTS], -1)
    mask = to_tokens(exact, kv_start, keys.shape[2]) if record else None
    return TierOutput(
        out=out.to(q.dtype),
        lse=lse,
        certificate=certificate,
        arithmetic_bound=arithmetic,
        dropped_mass_bound=dropped,
        tau=tau,
        counts=counts,
        exact_mask=mask,
    )


def nth_best(floors: Tensor, scored: Tensor, rank: Tensor) -> PerQueryHead:
    """The rank-th largest of the scored keys' floors (score less rounding): no member of the true top can be below it.

    floors [batch, num_q_heads, n], scored bool of that shape, rank int [batch, num_q_heads]; -inf where fewer are scored.
    """
    if not floors.shape[-1]:
        return floors.new_full(floors.shape[:-1], -torch.inf)
    known = torch.nan_to_num(
        torch.where(scored, floors, -torch.inf), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf
    )
    ordered = known.sort(-1, descending=True).values
    nth = ordered.gather(-1, (rank.long() - 1).clamp(0, ordered.shape[-1] - 1)[..., None])[..., 0]
    return torch.where(rank.long() <= ordered.shape[-1], nth, -torch.inf)


def _mix_values(exact: Tensor, coarse: Tensor | None, v: Tensor, sketch: Sketch) -> Float[Tensor, "b h n d"]:
    """What each key's weight is multiplied with: its value, its sketched value (coarse; None: nobody's), or the head's mean value."""
    mixed = sketch.value_mean[:, :, None, : v.shape[3]].expand_as(v)
    frames = sketch.value_frames
    if frames is not None and coarse is not None and v.shape[2]:
        num_blocks = int(sketch.num_blocks.max())
        span = num_blocks * sketch.config.frame_len
        decoded = decode_frames(
            unpack_nibbles(frames.codes[:, :, :num_blocks]),
            frames.frame[:, :, :num_blocks],
            frames.scale[:, :, :num_blocks],
        ).flatten(2, 3)[..., : v.shape[3]]
        head = torch.where(coarse[:, :, :span, None], decoded, mixed[:, :, :span])
        mixed = torch.cat([head, mixed[:, :, span:]], 2)
    return torch.where(exact[..., None], v, mixed)
