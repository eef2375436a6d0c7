"""Score what a look at the bounds listed, in the looks of a step (looks.py): list it, weigh it.

Logits here are in nats above the origin of a query head's grid (common.py). A scored key's real score lies within its slack of the
computed one, so its floor and its ceiling are known: floors add up to a lower bound of the total mass, ceilings fill a histogram.
"""

import triton
import triton.language as tl

from louver.kernels.triton.common import (
    ALWAYS,
    BELOW,
    BIN_CODES,
    BINS,
    CROWDED,
    DECIDED,
    LISTED,
    LOG2E,
    SIGNED,
    SPREAD,
    STEPS,
    WEIGHED,
    exp,
    take_turn,
    token_offset,
)

HIGHEST = tl.constexpr(1e9)  # codes: far beyond any grid, and a whole number of 32 bits


@triton.jit
def list_new_kernel(
    upper, value_spread, num_blocks, cuts, before, listed, counters, below, num_kv_heads, capacity, room,
    G: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, CHUNK: tl.constexpr, NUM_COUNTERS: tl.constexpr, LAST: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """List every key that reaches the cut of some head of its group, and reached none of the cuts ``before``.

    LAST: below = mass bound, in units of e^(low + BELOW), of the keys that no head's cut lists.
    """
    if OVERLAPS:
        take_turn()
    pid = tl.program_id(0)
    blocks = tl.load(num_blocks + pid // num_kv_heads)
    chunk = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    t = tl.arange(0, LP)
    block = pid.to(tl.int64) * capacity + chunk
    inside = (chunk < blocks)[:, None] & (t < L)[None, :]
    mine = counters + pid * NUM_COUNTERS
    if (tl.program_id(1) * CHUNK < blocks) & (tl.load(mine + CROWDED) == 0):  # or everything is attended
        reaches = tl.zeros((CHUNK, LP), tl.int32)
        earlier = tl.zeros((CHUNK, LP), tl.int32)
        decided = tl.zeros((CHUNK, LP), tl.int32)
        for g in tl.static_range(G):
            at = (block * G + g)[:, None] * L + t[None, :]
            code = tl.load(upper + at, mask=inside, other=-32768).to(tl.int32) + SIGNED
            reaches = reaches | (code >= tl.load(cuts + (pid * G + g) * 2)).to(tl.int32)
            earlier = earlier | (code >= tl.load(before + pid * G + g)).to(tl.int32)
            if g == 0:
                decided = (code == ALWAYS).to(tl.int32)
        if LAST:
            for g in tl.static_range(G):
                at = (block * G + g)[:, None] * L + t[None, :]
                unseen = inside & (reaches == 0)
                code = tl.load(upper + at, mask=unseen, other=-32768).to(tl.int32) + SIGNED
                mass = tl.where(unseen, tl.exp2((code.to(tl.float32) * (1.0 / STEPS) - BELOW) * LOG2E), 0.0)
                tl.atomic_add(below + pid * G + g, tl.sum(tl.sum(mass, 1), 0), sem="relaxed")
            spread = tl.max(tl.load(value_spread + block, mask=chunk < blocks, other=0.0), 0)
            tl.atomic_max(mine + SPREAD, spread.to(tl.int32, bitcast=True), sem="relaxed")
        flat: tl.constexpr = CHUNK * LP
        new = tl.reshape(tl.where(inside & (earlier == 0), reaches, 0), (flat,))
        entry = tl.reshape((chunk[:, None] * L + t[None, :]) | (decided * DECIDED), (flat,))
        number = tl.sum(new, 0)
        if number > 0:
            where = tl.atomic_add(mine + LISTED, number, sem="relaxed") + tl.cumsum(new, 0) - new
            tl.store(listed + pid.to(tl.int64) * room + where, entry, mask=(new > 0) & (where < room))


@triton.jit
def weigh_kernel(
    q, k, v, table, k_page, k_head, k_token, k_dim, v_page, v_head, v_token, v_dim, table_stride, page_len,
    listed, list_scores, list_slacks, counters, low, ceilings, floors, best, sums, num_blocks, kv_start, kv_len,
    num_kv_heads, room, scale, slack_share, weight_slack,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
    NUM_COUNTERS: tl.constexpr, PAGED: tl.constexpr, LAST: tl.constexpr, COUNTED: tl.constexpr, NEAR: tl.constexpr,
    MASS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Score what was listed since the last look (and, at first, the open block), leave scores and slacks, and weigh them.

    sums[head, look, split] = sum of e^(floor - BELOW); ceilings[head] counts undecided keys by ceiling, floors[head] all by floor, in bins of
    BIN_CODES; best[head] = the highest floor, in codes.
    """
    if OVERLAPS:
        take_turn()
    pid = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    row = pid // num_kv_heads
    mine = counters + pid * NUM_COUNTERS
    g = tl.arange(0, GP)
    real = g < G
    d = tl.arange(0, DP)
    start = tl.load(kv_start + row)
    closed = tl.load(num_blocks + row) * L
    length = tl.load(kv_len + row) - start
    held = tl.load(mine + LISTED)
    first = 0
    total = held
    if LAST:
        first = tl.load(mine + WEIGHED)
    else:
        total = held + length - closed
    x = tl.load(q + (pid * G + g)[None, :] * D + d[:, None], mask=real[None, :] & (d < D)[:, None], other=0.0)
    x_abs = tl.abs(x)
    origin = tl.load(low + pid * G + g, mask=real, other=0.0)
    each = tl.cdiv(tl.cdiv(total - first, BLOCK), splits) * BLOCK
    begin = first + split * each
    end = tl.minimum(begin + each, total)
    mass = tl.zeros((GP,), tl.float32)
    highest = tl.full((GP,), -HIGHEST, tl.float32)
    if (held <= room) & (length - closed <= 2 * L) & (tl.load(mine + CROWDED) == 0):
        for i in range(begin, end, BLOCK):
            index = i + tl.arange(0, BLOCK)
            inside = index < end
            is_listed = index < held
            entry = tl.load(listed + pid.to(tl.int64) * room + index, mask=inside & is_listed, other=DECIDED)
            token = tl.where(is_listed, entry & (DECIDED - 1), closed + index - held)
            token = start + tl.where(inside, token, 0)
            at = token_offset(
                table, row, pid % num_kv_heads, token, k_page, k_head, k_token, table_stride, page_len, PAGED
            )
            key = tl.load(k + at[:, None] + d[None, :] * k_dim, mask=inside[:, None] & (d < D)[None, :], other=0.0)
            key = key.to(x.dtype)
            scores = tl.dot(key, x, input_precision="ieee")
            slack = tl.dot(tl.abs(key), x_abs, input_precision="ieee") * slack_share + 2.0**-60
            keep = inside[:, None] & real[None, :]
            place = tl.where(is_listed, index, room + index - held)
            kept_at = (pid.to(tl.int64) * (room + 2 * L) + place)[:, None] * G + g[None, :]
            tl.store(list_scores + kept_at, scores, mask=keep)
            tl.store(list_slacks + kept_at, slack, mask=keep)
            margin = (tl.abs(scores * scale) + tl.abs(origin)[None, :]) * 2.0**-20
            floor = (scores - slack) * scale - margin - origin[None, :]
            if MASS:
                # Less what the attention to come allows for its own rounding; beyond the grid's end a floor may be lower.
                weight = exp(tl.minimum(floor - (2 * weight_slack + BELOW), 60.0))
                weight = tl.where(floor == floor, weight, float("nan"))
                mass += tl.sum(tl.where(keep, weight, 0.0), 0)
                ceiling = ((scores + slack) * scale + margin - origin[None, :]) * (STEPS / BIN_CODES)
                bin = tl.minimum(tl.maximum(tl.floor(ceiling), 0.0), BINS - 1.0).to(tl.int32)
                counts = keep & ((entry & DECIDED) == 0)[:, None]
                tl.atomic_add(ceilings + (pid * G + g)[None, :] * BINS + bin, 1, mask=counts, sem="relaxed")
            if COUNTED:
                bin = tl.floor(floor * (STEPS / BIN_CODES))
                counts = keep & (bin >= 0)
                bin = tl.minimum(tl.maximum(bin, 0.0), BINS - 1.0).to(tl.int32)
                tl.atomic_add(floors + (pid * G + g)[None, :] * BINS + bin, 1, mask=counts, sem="relaxed")
            if NEAR:
                codes = tl.minimum(tl.floor(floor * STEPS), HIGHEST)
                highest = tl.maximum(highest, tl.max(tl.where(keep & (codes == codes), codes, -HIGHEST), 0))
    if MASS:
        at = (pid * G + g) * 2 * splits + split
        if LAST:
            at += splits
        tl.store(sums + at, mass, mask=real)
    if NEAR:
        tl.atomic_max(best + pid * G + g, tl.maximum(highest, -HIGHEST).to(tl.int32), mask=real, sem="relaxed")
