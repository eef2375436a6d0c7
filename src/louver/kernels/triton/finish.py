"""The last kernel of a step: merge the splits, and turn their sums into the certificate and its companions."""

import triton
import triton.language as tl

from louver.kernels.triton.common import (
    BELOW,
    COARSE,
    EXACT,
    LISTED,
    LN2,
    SPREAD,
    STEPS,
    VALUE_BLOCKS,
    exp,
)


@triton.jit
def _times(x, scale):
    return tl.where(x == 0, 0.0, x * scale)


@triton.jit
def finish_kernel(
    exact_out, exact_sums, tier_out, tier_sums, low, cuts, tau, below, mean, counters, num_blocks, kv_start, kv_len,
    out, evidence, counts, num_q_heads, num_kv_heads, room, accumulation, out_unit,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, EXACTS: tl.constexpr, TIERS: tl.constexpr,
    NUM_COUNTERS: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    kv = pid // G
    row = kv // num_kv_heads
    d = tl.arange(0, DP)
    channel = d < D
    mine = counters + kv * NUM_COUNTERS
    listed = tl.load(mine + LISTED)
    overflow = listed > room
    origin = tl.load(low + pid)
    length = tl.load(kv_len + row) - tl.load(kv_start + row)

    s = tl.arange(0, EXACTS)
    sums = exact_sums + (pid * EXACTS + s) * 8
    peaks = tl.load(sums)
    # Units of everything below: e^shift.
    shift = tl.max(peaks, 0)
    if not DROP:
        unit = origin + tl.load(cuts + pid * 2).to(tl.float32) / STEPS - 15.0 * LN2
        p = tl.arange(0, TIERS)
        tiers = tier_sums + (pid * TIERS + p) * 8
        sketched = tl.where(overflow, 0.0, tl.sum(tl.load(tiers), 0))
        shift = tl.maximum(shift, tl.where(sketched > 0, unit, -float("inf")))
    nothing = shift == -float("inf")
    shift = tl.where(nothing, 0.0, shift)
    scale = tl.where(peaks == -float("inf"), 0.0, exp(peaks - shift))
    total = tl.sum(tl.load(sums + 1) * scale, 0)
    floors = tl.sum(tl.load(sums + 2) * scale, 0)
    surplus_value = tl.sum(tl.load(sums + 3) * scale, 0)
    surplus = tl.sum(tl.load(sums + 4) * scale, 0)
    reach = tl.sum(tl.load(sums + 5) * scale, 0)
    parts = tl.load(exact_out + (pid * EXACTS + s)[:, None] * D + d[None, :], mask=channel[None, :], other=0.0)
    merged = tl.sum(parts * scale[:, None], 0)
    m = tl.load(mean + kv * D + d, mask=channel, other=0.0)
    certificate = 0.0
    coarse_spread = 0.0
    coarse_surplus = 0.0
    if not DROP:
        # Where no key was sketched `unit` may lie far above all: nothing times e^(unit - shift), which may be infinite, is nothing.
        scale = tl.where(overflow, 0.0, exp(unit - shift))
        unread = _times(tl.sum(tl.load(tiers + 2), 0), scale)
        coarse_surplus = _times(tl.sum(tl.load(tiers + 3), 0), scale)
        coarse_spread = _times(tl.sum(tl.load(tiers + 4), 0) + tl.sum(tl.load(tiers + 5), 0), scale)
        reach += tl.where(overflow, 0.0, _times(tl.sum(tl.load(tiers + 6), 0), scale))
        total += _times(sketched, scale)
        floors += _times(tl.sum(tl.load(tiers + 1), 0), scale)
        parts = tl.load(tier_out + (pid * TIERS + p)[:, None] * D + d[None, :], mask=channel[None, :], other=0.0)
        merged += tl.where(overflow, 0.0, tl.where(sketched == 0, 0.0, tl.sum(parts, 0) * scale) + unread * m)
        coarse_surplus = tl.where(overflow, 0.0, coarse_surplus)
        coarse_spread = tl.where(overflow, 0.0, coarse_spread)
    safe = tl.where(total > 0, total, 1.0)
    o = merged / safe
    lse = tl.where(total > 0, shift + tl.log(safe), -float("inf"))
    tl.store(out + pid * D + d, o.to(out.dtype.element_ty), mask=channel)

    floors = tl.where(total > 0, floors * (1 - 2.0**-12), 1.0)
    norm = tl.sqrt(tl.sum(o * o, 0)) * 1.0001
    away = tl.sqrt(tl.sum(tl.where(channel, (m - o) * (m - o), 0.0), 0)) * 1.0001
    furthest = tl.sqrt(tl.sum(m * m, 0)) * 1.0001
    arithmetic = (surplus_value + surplus * norm) * 1.001 / floors
    # Sums: exact values are bounded by `reach`, sketched ones by spread and mean.
    arithmetic += accumulation * (reach / safe + 2 * norm + 2 * furthest + 1e-30)
    arithmetic += out_unit * norm + tl.sqrt(D * 1.0) * 2.0**-24
    dropped = 0.0
    if DROP:
        # The mass left out: bounded through the histogram under the cut, and known for what was scored and rejected.
        rejected = tl.sum(tl.load(sums + 6), 0)
        under = tl.load(below + pid)
        rounding = 0.001 + tl.abs(origin) * 2.0**-21  # of what is added to logarithms, here and of ``kept``
        left = tl.where(overflow | (under == 0), -float("inf"), tl.log(under) + origin + BELOW + rounding)
        loss = tl.where(rejected > 0, tl.log(rejected) + origin + rounding, -float("inf"))
        top = tl.maximum(left, loss)
        both = top + tl.log(exp(left - top) + exp(loss - top)) + 0.001
        both = tl.where(top == -float("inf"), top, tl.where(top == float("inf"), top, both))
        gap = tl.where(total > 0, shift + tl.log(floors) - tl.abs(shift) * 2.0**-22, -float("inf")) - both
        gap = tl.where(gap > 80, 80.0, gap)  # NaN stays NaN
        dropped = tl.where(both == -float("inf"), 0.0, 1.0 / (1.0 + exp(gap)))
        dropped = tl.where(nothing & (both > -float("inf")), 1.0, dropped)
        spread = tl.load(mine + SPREAD).to(tl.float32, bitcast=True)
        certificate = tl.where(dropped == 0, 0.0, dropped * (spread + away) * 1.001)
    else:
        certificate = (coarse_spread + coarse_surplus * (away + arithmetic)) * 1.001 / floors
    rows = tl.num_programs(0)
    tl.store(evidence + pid, lse)
    # Of an output that is not finite nothing is known; NaN compares with nothing.
    tl.store(evidence + rows + pid, tl.where(certificate == certificate, certificate, float("inf")))
    tl.store(evidence + 2 * rows + pid, tl.where(arithmetic == arithmetic, arithmetic, float("inf")))
    tl.store(evidence + 3 * rows + pid, tl.where(dropped == dropped, dropped, 1.0))
    tl.store(evidence + 4 * rows + pid, tl.where(overflow & (not DROP), -float("inf"), tl.load(tau + pid)))
    if pid % G == 0:
        blocks = tl.load(num_blocks + row)
        table = counts + kv * 7
        scanned = tl.where(overflow, blocks * L, listed)
        kept_closed = scanned
        if DROP:
            kept_closed = tl.load(mine + EXACT)
        tl.store(table, length.to(tl.int64))
        tl.store(table + 1, blocks.to(tl.int64))
        tl.store(table + 2, (length - blocks * L).to(tl.int64))
        tl.store(table + 3, scanned.to(tl.int64))
        tl.store(table + 4, kept_closed.to(tl.int64))
        tl.store(table + 5, tl.where(overflow, 0, tl.load(mine + COARSE)).to(tl.int64))
        tl.store(table + 6, tl.where(overflow, 0, tl.load(mine + VALUE_BLOCKS)).to(tl.int64))
