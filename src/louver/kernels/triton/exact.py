"""Exact attention over listed tokens and the open block, split over programs; and the rank-th best score among them.

Sums of one split, in units of e^peak (nats): weights, floors of the true weights, surplus x |v|, surplus, weight x |v|; and the mass
of what a threshold rejected, in units of e^low.
"""

# pyright: reportGeneralTypeIssues=false
# A jitted function that returns a tuple has no type a checker could know.

import triton
import triton.language as tl

from louver.kernels.triton.common import (
    DECIDED,
    EXACT,
    LISTED,
    LN2,
    LOG2E,
    RANK_BINS,
    RANK_CODES,
    RANKED,
    STEPS,
    exp,
    take_turn,
    token_offset,
)


@triton.jit
def _place(counters, num_blocks, kv_start, kv_len, pid, row, room, L: tl.constexpr):
    """How many tokens are listed and where the unlisted rest begins; all of them are the rest where the list overflowed."""
    length = tl.load(kv_len + row) - tl.load(kv_start + row)
    listed = tl.load(counters)
    overflow = listed > room
    listed = tl.where(overflow, 0, listed)
    rest = tl.where(overflow, 0, tl.load(num_blocks + row) * L)
    return listed, rest, listed + length - rest, overflow


@triton.jit
def _scores(x, x_abs, k, at, d, k_dim, inside, slack_share, D: tl.constexpr, KIND: tl.constexpr):
    """Scores [tokens, heads] of gathered keys, and how far rounding can have moved them."""
    key = tl.load(k + at[:, None] + d[None, :] * k_dim, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(KIND)
    scores = tl.dot(key, x, input_precision="ieee")
    slack = tl.dot(tl.abs(key), x_abs, input_precision="ieee") * slack_share + 2.0**-60
    return scores, slack


@triton.jit
def rank_kernel(
    q, k, v, table, k_page, k_head, k_token, k_dim, v_page, v_head, v_token, v_dim, table_stride, page_len,
    listed, list_scores, list_slacks, counters, cuts, low, tau, rank_hist, num_blocks, kv_start, kv_len,
    num_kv_heads, room, scored, scale, slack_share, share, tolerance, count,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
    NUM_COUNTERS: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Score the list; the last program of a KV head raises tau to its rank-th best score, less rounding."""
    pid = tl.program_id(0)
    row = pid // num_kv_heads
    mine = counters + pid * NUM_COUNTERS
    g = tl.arange(0, GP)
    real = g < G
    d = tl.arange(0, DP)
    start = tl.load(kv_start + row)
    num_listed, rest, total, overflow = _place(mine + LISTED, num_blocks, kv_start, kv_len, pid, row, room, L)
    x = tl.load(q + (pid * G + g)[None, :] * D + d[:, None], mask=real[None, :] & (d < D)[:, None], other=0.0)
    x_abs = tl.abs(x)
    origin = tl.load(low + pid * G + g, mask=real, other=0.0)
    cut = tl.load(cuts + (pid * G + g) * 2, mask=real, other=0)
    each = tl.cdiv(tl.cdiv(total, BLOCK), tl.num_programs(1)) * BLOCK
    begin = tl.program_id(1) * each
    if not overflow:
        for i in range(begin, tl.minimum(begin + each, total), BLOCK):
            index = i + tl.arange(0, BLOCK)
            inside = index < tl.minimum(begin + each, total)
            entry = tl.load(listed + pid.to(tl.int64) * room + index, mask=inside & (index < num_listed), other=0)
            token = tl.where(index < num_listed, entry & (DECIDED - 1), rest + index - num_listed)
            token = start + tl.where(inside, token, 0)
            at = token_offset(
                table, row, pid % num_kv_heads, token, k_page, k_head, k_token, table_stride, page_len, PAGED
            )
            scores, slack = _scores(x, x_abs, k, at, d, k_dim, inside, slack_share, D, x.dtype)
            place = tl.where(index < num_listed, index, room + index - num_listed)  # the open block's behind the list's
            held = (inside & (place < scored))[:, None] & real[None, :]
            kept_at = (pid.to(tl.int64) * scored + place)[:, None] * G + g[None, :]
            tl.store(list_scores + kept_at, scores, mask=held)
            tl.store(list_slacks + kept_at, slack, mask=held)
            logit = (scores - slack) * scale
            position = (logit - origin[None, :]) * STEPS - (tl.abs(logit) + tl.abs(origin)[None, :]) * (
                2.0**-20 * STEPS
            )
            place = tl.floor((tl.floor(position) - cut[None, :].to(tl.float32)) / RANK_CODES)
            counts = inside[:, None] & real[None, :] & (place >= 0)
            place = tl.minimum(tl.maximum(place, 0.0), RANK_BINS - 1.0).to(tl.int32)
            tl.atomic_add(rank_hist + (pid * G + g)[None, :] * RANK_BINS + place, 1, mask=counts, sem="relaxed")
    tl.debug_barrier()
    done = tl.atomic_add(mine + RANKED, 1, sem="acq_rel")
    if done == tl.num_programs(1) - 1:
        length = (tl.load(kv_len + row) - start).to(tl.int64)
        need = tl.maximum((length * share - tolerance + ((1 << 40) - 1)) >> 40, count).to(tl.int32)
        bins = tl.arange(0, RANK_BINS)
        at = (pid * G + g)[:, None] * RANK_BINS + bins[None, :]
        counted = tl.load(rank_hist + at, mask=real[:, None], other=0, cache_modifier=".cg")
        found = tl.sum(counted, 1)
        above = found[:, None] - tl.cumsum(counted, 1) + counted
        best = tl.sum((above >= need).to(tl.int32), 1) - 1
        nth = origin + (cut + best * RANK_CODES).to(tl.float32) / STEPS
        nth = nth / scale - tl.abs(nth / scale) * 2.0**-20
        old = tl.load(tau + pid * G + g, mask=real, other=0.0)
        new = tl.where(best >= 0, tl.maximum(nth, old), old)
        tl.store(tau + pid * G + g, tl.where(overflow, -float("inf"), new), mask=real)


@triton.jit
def exact_kernel(
    q, k, v, table, k_page, k_head, k_token, k_dim, v_page, v_head, v_token, v_dim, table_stride, page_len,
    listed, list_scores, list_slacks, counters, low, tau, num_blocks, kv_start, kv_len, part_out, part_sums, mask, idle,
    num_kv_heads, room, scored, scale, slack_share, weight_slack, mask_stride,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
    NUM_COUNTERS: tl.constexpr, PAGED: tl.constexpr, DROP: tl.constexpr, RECORD: tl.constexpr,
    RANKED_BEFORE: tl.constexpr, AGAIN: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        take_turn()
    pid = tl.program_id(0)
    if AGAIN:  # noqa: SIM102 - decided as this is compiled; the next only as it runs
        if tl.load(idle + pid) != 0:
            return
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    row = pid // num_kv_heads
    mine = counters + pid * NUM_COUNTERS
    g = tl.arange(0, GP)
    real = g < G
    d = tl.arange(0, DP)
    start = tl.load(kv_start + row)
    num_listed, rest, total, overflow = _place(mine + LISTED, num_blocks, kv_start, kv_len, pid, row, room, L)
    x = tl.load(q + (pid * G + g)[None, :] * D + d[:, None], mask=real[None, :] & (d < D)[:, None], other=0.0)
    x_abs = tl.abs(x)
    threshold = tl.load(tau + pid * G + g, mask=real, other=0.0)
    origin = tl.load(low + pid * G + g, mask=real, other=0.0)
    lift: tl.constexpr = 15.0 if v.dtype.element_ty == tl.float16 else 0.0  # keeps small float16 weights from underflow
    tiny: tl.constexpr = 2.0**-24 if v.dtype.element_ty == tl.float16 else 2.0**-120  # underflow of a weight
    peak = tl.full((GP,), -float("inf"), tl.float32)
    weights = tl.zeros((GP,), tl.float32)
    floors = tl.zeros((GP,), tl.float32)
    surplus = tl.zeros((GP,), tl.float32)
    surplus_value = tl.zeros((GP,), tl.float32)
    reach = tl.zeros((GP,), tl.float32)
    rejected = tl.zeros((GP,), tl.float32)
    out = tl.zeros((GP, DP), tl.float32)
    num_exact = 0
    each = tl.cdiv(tl.cdiv(total, BLOCK), splits) * BLOCK
    begin = split * each
    end = tl.minimum(begin + each, total)
    for i in range(begin, end, BLOCK):
        index = i + tl.arange(0, BLOCK)
        inside = index < end
        is_listed = index < num_listed
        entry = tl.load(listed + pid.to(tl.int64) * room + index, mask=inside & is_listed, other=DECIDED)
        token = tl.where(is_listed, entry & (DECIDED - 1), rest + index - num_listed)
        token = start + tl.where(inside, token, 0)
        # Left by whoever ranked or weighed the list; of an overflow, and of what its places don't hold, nobody did.
        if RANKED_BEFORE and (not overflow) and total - num_listed <= 2 * L:
            place = tl.where(is_listed, index, room + index - num_listed)
            kept_at = (pid.to(tl.int64) * scored + place)[:, None] * G + g[None, :]
            scores = tl.load(list_scores + kept_at, mask=inside[:, None] & real[None, :], other=0.0)
            slack = tl.load(list_slacks + kept_at, mask=inside[:, None] & real[None, :], other=0.0)
        else:
            at = token_offset(
                table, row, pid % num_kv_heads, token, k_page, k_head, k_token, table_stride, page_len, PAGED
            )
            scores, slack = _scores(x, x_abs, k, at, d, k_dim, inside, slack_share, D, x.dtype)
        keep = inside[:, None] & real[None, :]
        if DROP:
            undecided = (entry & DECIDED) == 0
            fails = keep & undecided[:, None] & (scores + slack < threshold[None, :])
            ceiling = (scores + slack) * scale - origin[None, :]
            rejected += tl.sum(tl.where(fails, exp(ceiling + tl.abs(scores * scale) * 2.0**-20) * 1.001, 0.0), 0)
            keep = keep & (fails == 0)
        else:
            # A record shows who is exact: everyone listed, for every head of the group.
            fails = keep & False
        if RECORD:
            tl.store(
                mask + (pid * G + g).to(tl.int64)[None, :] * mask_stride + token[:, None], keep.to(tl.int8), mask=keep
            )
        kept = tl.max(keep.to(tl.int32), 1) > 0
        num_exact += tl.sum((kept & (token < start + tl.load(num_blocks + row) * L)).to(tl.int32), 0)
        at = token_offset(table, row, pid % num_kv_heads, token, v_page, v_head, v_token, table_stride, page_len, PAGED)
        value = tl.load(v + at[:, None] + d[None, :] * v_dim, mask=kept[:, None] & (d < D)[None, :], other=0.0)
        logit = tl.where(keep, scores * scale, -float("inf"))
        higher = tl.maximum(peak, tl.max(logit, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp2((logit - shift[None, :]) * LOG2E + lift).to(v.dtype.element_ty)
        a = weight.to(tl.float32)
        fade = tl.where(peak == -float("inf"), 0.0, exp(peak - shift))
        norm = tl.sqrt(tl.sum(value.to(tl.float32) * value.to(tl.float32), 1)) * 1.00001
        off = slack * scale + weight_slack + (tl.abs(scores * scale) + tl.abs(shift)[None, :]) * 2.0**-22
        grow = tl.where(keep, exp(off), 1.0)
        extra = tl.where(keep, a * (grow - 1.0) + tiny, 0.0)
        weights = weights * fade + tl.sum(a, 0)
        floors = floors * fade + tl.sum(tl.maximum(a - tiny, 0.0) / grow, 0)
        surplus = surplus * fade + tl.sum(extra, 0)
        surplus_value = surplus_value * fade + tl.sum(extra * norm[:, None], 0)
        reach = reach * fade + tl.sum(a * norm[:, None], 0)
        out = out * fade[:, None] + tl.dot(tl.trans(weight), value, input_precision="ieee")
        peak = higher
    if DROP:
        tl.atomic_add(mine + EXACT, num_exact, sem="relaxed")
    at = ((pid * G + g) * splits + split).to(tl.int64)
    tl.store(part_out + at[:, None] * D + d[None, :], out, mask=real[:, None] & (d < D)[None, :])
    tl.store(part_sums + at * 8, peak - lift * LN2, mask=real)
    tl.store(part_sums + at * 8 + 1, weights, mask=real)
    tl.store(part_sums + at * 8 + 2, floors, mask=real)
    tl.store(part_sums + at * 8 + 3, surplus_value, mask=real)
    tl.store(part_sums + at * 8 + 4, surplus, mask=real)
    tl.store(part_sums + at * 8 + 5, reach, mask=real)
    tl.store(part_sums + at * 8 + 6, rejected, mask=real)
