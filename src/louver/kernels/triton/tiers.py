"""Sorting keys into tiers by their codes: list the exact ones, and (where nothing is dropped) attend the rest through the sketch.

A sketched key's weight is relative to e^(low + cut): no sketched key can reach the cut, so no running maximum is needed, and float16
weights scaled by 2^15 cover 27 nats below it (what is smaller is charged to the certificate).
"""

# pyright: reportGeneralTypeIssues=false
# What a jitted function returns is not known to a type checker.

import triton
import triton.language as tl

from louver.kernels.triton.common import (
    ALWAYS,
    BELOW,
    COARSE,
    DECIDED,
    LISTED,
    LOG2E,
    SIGNED,
    SPREAD,
    STEPS,
    VALUE_BLOCKS,
    frame_channels,
    nibble,
    radius_codes,
)

WEIGHT_SCALE = tl.constexpr(32768.0)
WEIGHT_SLACK = tl.constexpr(2.0**-10)  # nats: rounding a weight to float16, its exponential and its argument


@triton.jit
def list_kernel(
    upper, value_spread, num_blocks, cuts, listed, counters, below, num_kv_heads, capacity, room,
    G: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, CHUNK: tl.constexpr, NUM_COUNTERS: tl.constexpr,
):  # fmt: skip
    """List every key that reaches the cut of some head of its group; below = mass bound of the others, unit e^(low + BELOW)."""
    pid = tl.program_id(0)
    blocks = tl.load(num_blocks + pid // num_kv_heads)
    chunk = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    t = tl.arange(0, LP)
    block = pid.to(tl.int64) * capacity + chunk
    inside = (chunk < blocks)[:, None] & (t < L)[None, :]
    if tl.program_id(1) * CHUNK < blocks:
        reaches = tl.zeros((CHUNK, LP), tl.int32)
        decided = tl.zeros((CHUNK, LP), tl.int32)
        for g in tl.static_range(G):
            code = (
                tl.load(upper + (block * G + g)[:, None] * L + t[None, :], mask=inside, other=-32768).to(tl.int32)
                + SIGNED
            )
            reached = code >= tl.load(cuts + (pid * G + g) * 2)
            reaches = reaches | reached.to(tl.int32)
            mass = tl.where(
                inside & (reached == 0), tl.exp2((code.to(tl.float32) * (1.0 / STEPS) - BELOW) * LOG2E), 0.0
            )
            tl.atomic_add(below + pid * G + g, tl.sum(tl.sum(mass, 1), 0), sem="relaxed")
            if g == 0:
                decided = (code == ALWAYS).to(tl.int32)
        flat: tl.constexpr = CHUNK * LP
        reaches = tl.reshape(tl.where(inside, reaches, 0), (flat,))
        entry = tl.reshape((chunk[:, None] * L + t[None, :]) | (decided * DECIDED), (flat,))
        number = tl.sum(reaches, 0)
        mine = counters + pid * NUM_COUNTERS
        spread = tl.max(tl.load(value_spread + block, mask=chunk < blocks, other=0.0), 0)
        tl.atomic_max(mine + SPREAD, spread.to(tl.int32, bitcast=True), sem="relaxed")
        if number > 0:
            at = tl.atomic_add(mine + LISTED, number, sem="relaxed") + tl.cumsum(reaches, 0) - reaches
            tl.store(listed + pid.to(tl.int64) * room + at, entry, mask=(reaches > 0) & (at < room))


@triton.jit
def _value_part(
    frame, widest, scales, at, word, dots, total, PART: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    d = 2 * word + (PART % 2) * (D // 2) + PART // 2
    inside = word < D // 4
    center, s = frame_channels(frame + at + d, widest, scales, inside)
    return (dots * 16777216.0 + total[:, None] * (center - 8.0)[None, :]) * s[None, :]


@triton.jit
def tiers_kernel(
    upper, reach, radius, value_codes, value_frame, value_scale, value_error, value_spread, scales, num_blocks, low, cuts,
    listed, counters, part_out, part_sums, idle, num_kv_heads, capacity, room,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, L: tl.constexpr, LP: tl.constexpr,
    SLICES: tl.constexpr, NUM_COUNTERS: tl.constexpr, STAGES: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """List the exact keys; attend every other closed key with its estimated weight.

    part_sums[head, split] = weights, floors of the true weights, weights of unread keys, surplus, surplus x spread,
    weight x value error, weight x (spread + error): the terms of the certificate (docs/guarantee.md, 8). AGAIN: only of KV heads that
    are not idle, whose cuts have changed; of the others everything stays.
    """
    pid = tl.program_id(0)
    if AGAIN:  # noqa: SIM102 - decided as this is compiled; the next only as it runs
        if tl.load(idle + pid) != 0:
            return
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    blocks = tl.load(num_blocks + pid // num_kv_heads)
    g = tl.arange(0, GP)
    real = g < G
    t = tl.arange(0, LP)
    word = tl.arange(0, WORDS)
    cut = tl.load(cuts + (pid * G + g) * 2, mask=real, other=65536)
    readable = tl.load(cuts + (pid * G + g) * 2 + 1, mask=real, other=65536)
    # What the codes' own rounding can hide, in nats: two steps, and the allowance the scan made for large logits.
    hidden = (2.0 + 2.0**-9) / STEPS + (tl.abs(tl.load(low + pid * G + g, mask=real, other=0.0)) + 64.0) * 2.0**-19
    mine = counters + pid * NUM_COUNTERS
    out0 = tl.zeros((GP, WORDS), tl.float32)
    out1 = tl.zeros((GP, WORDS), tl.float32)
    out2 = tl.zeros((GP, WORDS), tl.float32)
    out3 = tl.zeros((GP, WORDS), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    floors = tl.zeros((GP,), tl.float32)
    unread = tl.zeros((GP,), tl.float32)
    surplus = tl.zeros((GP,), tl.float32)
    spread = tl.zeros((GP,), tl.float32)
    error = tl.zeros((GP,), tl.float32)
    apart = tl.zeros((GP,), tl.float32)
    num_coarse = 0
    num_blocks_read = 0
    each = tl.cdiv(blocks, splits)
    for b in tl.range(split * each, tl.minimum(split * each + each, blocks), num_stages=STAGES):
        block = pid.to(tl.int64) * capacity + b
        code = (
            tl.load(
                upper + (block * G + g)[None, :] * L + t[:, None], mask=(t < L)[:, None] & real[None, :], other=-32768
            ).to(tl.int32)
            + SIGNED
        )
        exact = tl.max((code >= cut[None, :]).to(tl.int32), 1) * (t < L).to(tl.int32)
        number = tl.sum(exact, 0)
        if number > 0:
            decided = tl.max((code == ALWAYS).to(tl.int32), 1)
            at = tl.atomic_add(mine + LISTED, number, sem="relaxed") + tl.cumsum(exact, 0) - exact
            entry = (b * L + t) | (decided * DECIDED)
            tl.store(listed + pid.to(tl.int64) * room + at, entry, mask=(exact > 0) & (at < room))
        sketched = (t < L) & (exact == 0)
        live = sketched & (tl.max((code >= readable[None, :]).to(tl.int32), 1) > 0)

        factors = reach + block * (SLICES + 2) * G + g
        slack = tl.load(factors + SLICES * G, mask=real, other=0.0)
        width = tl.zeros((LP, GP), tl.float32) + slack[None, :]
        for s in tl.static_range(SLICES):
            r = radius_codes(radius, block, t, s, L, SLICES).to(tl.float32)
            width += r[:, None] * tl.load(factors + s * G, mask=real, other=0.0)[None, :]
        width = width * (1 + 2.0**-17) + hidden[None, :]
        position = (code - cut[None, :]).to(tl.float32) * (1.0 / STEPS)
        weight = tl.exp2((position - width) * LOG2E) * WEIGHT_SCALE
        weight = tl.where(sketched[:, None] & real[None, :] & (code > 0), weight, 0.0).to(tl.float16)
        a = weight.to(tl.float32)
        grow = tl.exp2((width + WEIGHT_SLACK) * LOG2E)
        extra = tl.where(sketched[:, None] & real[None, :], a * (grow - 1.0), 0.0)
        # Below the grid no weight is used, and e^(cut - origin) bounds what is missing; underflow of a weight costs 2^-25.
        lost = tl.where(code > 0, 2.0**-25 * grow, tl.exp2((position + 1.0 / STEPS) * LOG2E) * WEIGHT_SCALE)
        extra += tl.where(sketched[:, None] & real[None, :], lost, 0.0)
        r = tl.load(value_spread + block)
        e = tl.load(value_error + block)
        here = tl.sum(extra, 0)
        surplus += here
        spread += here * r
        lived = tl.sum(tl.where(live[:, None], a, 0.0), 0)
        whole = tl.sum(a, 0)
        total += whole
        skipped = tl.sum(tl.where(live[:, None], 0.0, a), 0)
        unread += skipped
        apart += whole * (r + e)
        error += lived * e + skipped * r
        floors += tl.sum(tl.maximum(a - 2.0**-25, 0.0) / grow, 0)
        number = tl.sum(live.to(tl.int32), 0)
        if number > 0:
            num_coarse += number
            num_blocks_read += 1
            c = tl.load(
                value_codes + (block * L + t)[:, None] * (D // 4) + word[None, :],
                mask=live[:, None] & (word < D // 4)[None, :],
                other=0,
            )
            p = tl.trans(tl.where(live[:, None], weight, 0.0).to(tl.float16))
            vat = block * D
            widest = tl.load(value_scale + block).to(tl.int32)
            out0 += _value_part(value_frame, widest, scales, vat, word, tl.dot(p, nibble(c, 0)), lived, 0, D)
            out1 += _value_part(value_frame, widest, scales, vat, word, tl.dot(p, nibble(c, 1)), lived, 1, D)
            out2 += _value_part(value_frame, widest, scales, vat, word, tl.dot(p, nibble(c, 2)), lived, 2, D)
            out3 += _value_part(value_frame, widest, scales, vat, word, tl.dot(p, nibble(c, 3)), lived, 3, D)
    tl.atomic_add(mine + COARSE, num_coarse, sem="relaxed")
    tl.atomic_add(mine + VALUE_BLOCKS, num_blocks_read, sem="relaxed")
    at = ((pid * G + g) * splits + split).to(tl.int64)
    inside = real[:, None] & (word < D // 4)[None, :]
    o = part_out + at[:, None] * D + 2 * word[None, :]
    tl.store(o, out0, mask=inside)
    tl.store(o + D // 2, out1, mask=inside)
    tl.store(o + 1, out2, mask=inside)
    tl.store(o + D // 2 + 1, out3, mask=inside)
    tl.store(part_sums + at * 8, total, mask=real)
    tl.store(part_sums + at * 8 + 1, floors, mask=real)
    tl.store(part_sums + at * 8 + 2, unread, mask=real)
    tl.store(part_sums + at * 8 + 3, surplus, mask=real)
    tl.store(part_sums + at * 8 + 4, spread, mask=real)
    tl.store(part_sums + at * 8 + 5, error, mask=real)
    tl.store(part_sums + at * 8 + 6, apart, mask=real)
