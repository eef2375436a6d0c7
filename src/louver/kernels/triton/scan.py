"""The scan: stream the sketched keys once and leave a 16-bit upper bound of every score behind.

The query is rounded: p = fp16(q s) per block, with s the frame's scale, so that the inner loop is codes times p on the tensor
cores, a code being the significand of a subnormal float16 (no conversion). Per key

    estimate = q . center - 8 sum(p) + sum(code p),        |score - estimate| <= sum_slices |q|_slice radius + slack,

and ``slack`` (geometry/rounding.py: rounded_query_slack) covers the rounding of p, of the tensor core's sum and of the rest.
``reach`` keeps what a later kernel needs to take the half-width apart again, per block and query head, in nats: one factor per
radius code, what a code of 0 stands for (the slack and the least radii), and the largest half-width of the block.
"""

# pyright: reportGeneralTypeIssues=false
# What a jitted function returns is not known to a type checker.

import triton
import triton.language as tl

from louver.kernels.triton.common import (
    BELOW,
    RANK_BINS,
    SIGNED,
    STEPS,
    frame_channels,
    nibble,
    radius_codes,
)
from louver.sketch import layout

NO_BOUND = tl.constexpr(layout.NO_BOUND)
SAMPLE = 32  # blocks whose centers place the grid


@triton.jit
def prepare_kernel(
    q, frame, widest, scales, num_blocks, low, hist, rank_hist, counters, finished, below, num_q_heads, capacity,
    scale, hist_size, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SAMPLE: tl.constexpr, NUM_COUNTERS: tl.constexpr,
    RANKED: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Place the grid of one query head, and clear what the other kernels count into."""
    pid = tl.program_id(0)
    row = pid // num_q_heads
    blocks = tl.load(num_blocks + row)
    sample = tl.arange(0, SAMPLE)
    d = tl.arange(0, DP)
    x = tl.load(q + pid * D + d, mask=d < D, other=0.0).to(tl.float32)
    taken = tl.minimum(blocks, SAMPLE)
    b = (sample.to(tl.int64) * blocks) // tl.maximum(taken, 1)
    at = (pid // G).to(tl.int64) * capacity + b
    inside = (sample < taken)[:, None] & (d < D)[None, :]
    widest_of = tl.load(widest + at, mask=sample < taken, other=0).to(tl.int32)
    center, s = frame_channels(frame + at[:, None] * D + d[None, :], widest_of[:, None], scales, inside)
    logit = tl.sum(center * s * x[None, :], 1) * scale
    mean = tl.sum(tl.where(sample < taken, logit, 0.0), 0) / tl.maximum(taken, 1)
    tl.store(low + pid, mean - BELOW)
    bins = tl.arange(0, BINS)
    for i in range(0, hist_size, BINS):
        tl.store(hist + pid * hist_size + i + bins, tl.zeros((BINS,), tl.int32), mask=i + bins < hist_size)
    if RANKED:
        bins = tl.arange(0, RANK_BINS)
        tl.store(rank_hist + pid * RANK_BINS + bins, tl.zeros((RANK_BINS,), tl.int32))
    tl.store(finished + pid, 0)
    tl.store(below + pid, 0.0)
    if pid % G == 0:
        each = tl.arange(0, NUM_COUNTERS)
        tl.store(counters + pid // G * NUM_COUNTERS + each, tl.zeros((NUM_COUNTERS,), tl.int32))


@triton.jit
def _query_part(q, pid, g, word, PART: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    d = 2 * word + (PART % 2) * (D // 2) + PART // 2
    inside = (g < G)[:, None] & (word < D // 4)[None, :]
    return tl.load(q + (pid * G + g)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _frame_part(
    x, frame, widest, scales, weight, pid, at, word,
    PART: tl.constexpr, D: tl.constexpr, FRAME: tl.constexpr, SLICES: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """One quarter of the channels: p, its sum with the center's score, |q s|_1, |q z|_1, and q^2 u with each channel's slice."""
    d = 2 * word + (PART % 2) * (D // 2) + PART // 2
    inside = word < D // 4
    center, s = frame_channels(frame + at + d, widest, scales, inside)
    z = center * s
    p = (x * s[None, :]).to(tl.float16)
    bias = tl.sum(x * z[None, :] - 8.0 * p.to(tl.float32), 1)
    scaled = tl.sum(tl.abs(x * s[None, :]), 1)
    centered = tl.sum(tl.abs(x * z[None, :]), 1)
    if FRAME == 2:
        u = tl.where(inside, 1.0, 0.0)
    else:
        u = tl.load(weight + pid * D + d, mask=inside, other=0.0)
        if FRAME == 1:
            u = u * s
    index = tl.where(d < LONG * (SHORT + 1), d // (SHORT + 1), LONG + (d - LONG * (SHORT + 1)) // SHORT)
    return p, bias, scaled, centered, x * x * u[None, :], tl.minimum(index, SLICES - 1)


@triton.jit
def scan_kernel(
    q, codes, frame, key_scale, radius, radius_least, radius_unit, scales, weight, num_blocks, kv_start, kv_len, low, upper, reach,
    num_kv_heads, capacity, sinks, recent, scale, slack_scaled, slack_centered, slack_fixed, inflation,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, L: tl.constexpr, LP: tl.constexpr,
    FRAME: tl.constexpr, SLICES: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid // num_kv_heads
    length = tl.load(kv_len + row) - tl.load(kv_start + row)
    blocks = tl.load(num_blocks + row)
    g = tl.arange(0, GP)
    t = tl.arange(0, LP)
    word = tl.arange(0, WORDS)
    real = g < G
    origin = tl.load(low + pid * G + g, mask=real, other=0.0)
    x0 = _query_part(q, pid, g, word, 0, G, D)
    x1 = _query_part(q, pid, g, word, 1, G, D)
    x2 = _query_part(q, pid, g, word, 2, G, D)
    x3 = _query_part(q, pid, g, word, 3, G, D)
    each = tl.cdiv(blocks, tl.num_programs(1))
    begin = tl.program_id(1) * each
    for b in tl.range(begin, tl.minimum(begin + each, blocks), num_stages=STAGES):
        block = pid.to(tl.int64) * capacity + b
        c = tl.load(
            codes + (block * L + t)[:, None] * (D // 4) + word[None, :],
            mask=(t < L)[:, None] & (word < D // 4)[None, :],
            other=0,
        )
        at = block * D
        widest = tl.load(key_scale + block).to(tl.int32)
        p0, bias0, s0, z0, n0, i0 = _frame_part(
            x0, frame, widest, scales, weight, pid, at, word, 0, D, FRAME, SLICES, LONG, SHORT
        )
        p1, bias1, s1, z1, n1, i1 = _frame_part(
            x1, frame, widest, scales, weight, pid, at, word, 1, D, FRAME, SLICES, LONG, SHORT
        )
        p2, bias2, s2, z2, n2, i2 = _frame_part(
            x2, frame, widest, scales, weight, pid, at, word, 2, D, FRAME, SLICES, LONG, SHORT
        )
        p3, bias3, s3, z3, n3, i3 = _frame_part(
            x3, frame, widest, scales, weight, pid, at, word, 3, D, FRAME, SLICES, LONG, SHORT
        )
        dots = tl.dot(nibble(c, 0), tl.trans(p0))
        dots = tl.dot(nibble(c, 1), tl.trans(p1), acc=dots)
        dots = tl.dot(nibble(c, 2), tl.trans(p2), acc=dots)
        dots = tl.dot(nibble(c, 3), tl.trans(p3), acc=dots)
        estimate = dots * 16777216.0 + (bias0 + bias1 + bias2 + bias3)[None, :]  # keys, heads

        slack = slack_scaled * (s0 + s1 + s2 + s3) + slack_centered * (z0 + z1 + z2 + z3) + slack_fixed
        bounded = t < L
        out = reach + (block * (SLICES + 2)) * G + g
        width = tl.zeros((LP, GP), tl.float32)
        for s in tl.static_range(SLICES):
            square = tl.sum(tl.where((i0 == s)[None, :], n0, 0.0), 1) + tl.sum(tl.where((i1 == s)[None, :], n1, 0.0), 1)
            square += tl.sum(tl.where((i2 == s)[None, :], n2, 0.0), 1) + tl.sum(
                tl.where((i3 == s)[None, :], n3, 0.0), 1
            )
            norm = tl.sqrt(square) * inflation
            factor = norm * tl.load(radius_unit + block * SLICES + s)
            slack += norm * tl.load(radius_least + block * SLICES + s)
            r = radius_codes(radius, block, t, s, L, SLICES)
            bounded = bounded & (r != NO_BOUND)
            width += r.to(tl.float32)[:, None] * factor[None, :]
            tl.store(out + s * G, factor * scale, mask=real)
        width += slack[None, :]
        upper_score = estimate + width + (tl.abs(estimate) + width) * 2.0**-21
        tl.store(out + SLICES * G, slack * scale, mask=real)
        tl.store(out + (SLICES + 1) * G, tl.max(tl.where(bounded[:, None], width, 0.0), 0) * scale, mask=real)

        logit = upper_score * scale
        position = (logit - origin[None, :]) * STEPS + (tl.abs(logit) + tl.abs(origin)[None, :]) * (2.0**-21 * STEPS)
        code = tl.minimum(tl.maximum(tl.ceil(position) + 1, 0.0), 65535.0)
        finite = tl.min((tl.where(real[None, :], tl.abs(upper_score), 0.0) < float("inf")).to(tl.int32), 1) > 0
        index = b * L + t
        free = bounded & finite & (index >= sinks) & (index < length - recent)
        code = tl.where(free[:, None], code, 65535.0).to(tl.int32)
        tl.store(
            upper + (block * G + g)[None, :] * L + t[:, None],
            (code - SIGNED).to(tl.int16),
            mask=(t < L)[:, None] & real[None, :],
        )
