"""From what was weighed to a threshold, in the looks of a step (looks.py): a program per query head, between two lists.

What is asked for is any of: the need highest scores (COUNTED), everything within ``nats`` of the best (NEAR), all but a share of the mass
(MASS: U <= ratio K, for the mass U of the ceilings of what is dropped and K of the floors of what is kept), everything from a given score
(GIVEN). Each has a threshold under which it misses nothing, so the lowest serves all of them.
"""

import triton
import triton.language as tl

from louver.kernels.triton.common import (
    BELOW,
    BIN_CODES,
    BINS,
    CROWDED,
    LISTED,
    STEPS,
    WEIGHED,
    exp,
    take_turn,
    token_offset,
)

NOTHING = tl.constexpr(65536)  # a cut that no code reaches
UNSEEN = tl.constexpr(0.8)  # of the mass that may be dropped may belong to keys that are never scored
EARLY = tl.constexpr(32)  # keys scored to find out what the best is


@triton.jit
def _from_scan(hist, base, mass_below, pid, stride, HELD: tl.constexpr, BASED: tl.constexpr):
    """The scan's histogram of upper bounds: counts, first codes of its bins, and a bound of their mass and of the mass under them."""
    bins = tl.arange(0, HELD)
    number = tl.load(hist + pid * stride + bins)
    code = bins * BIN_CODES
    under = 0.0
    if BASED:
        code += tl.load(base + pid)
        under += tl.load(mass_below + pid * 2)
    top = tl.where(bins == HELD - 1, NOTHING, code + BIN_CODES).to(tl.float32) / STEPS
    return number, code, number.to(tl.float32) * exp(top - BELOW), under


@triton.jit
def _highest(code, mass, under, limit):
    """The highest code under which the mass is at most ``limit``, 0 where even what lies under all bins is more."""
    fits = (under + tl.cumsum(mass, 0) - mass) * 1.001 <= limit
    cut = tl.max(tl.where(fits, code, 0), 0)
    return tl.where((under + tl.sum(mass, 0)) * 1.001 <= limit, NOTHING - 1, cut)


@triton.jit
def _code_of(tau, origin, scale):
    """A code that every key whose upper bound reaches tau has or exceeds."""
    position = (tau * scale - origin) * STEPS - (tl.abs(tau * scale) + tl.abs(origin)) * (2.0**-20 * STEPS)
    position = tl.where(position == position, position, 0.0)
    return tl.minimum(tl.maximum(tl.floor(position), 0.0), NOTHING - 1.0).to(tl.int32)


@triton.jit
def _needed(length, share, tolerance, count):
    return tl.maximum((length.to(tl.int64) * share - tolerance + ((1 << 40) - 1)) >> 40, count).to(tl.int32)


@triton.jit
def _crowded(number, closed, FIFTHS: tl.constexpr):
    """Whether a head needs so many fifths of its keys."""
    return (number * 5 >= closed * FIFTHS) & (closed > 0)


@triton.jit
def first_kernel(
    q, k, v, table, k_page, k_head, k_token, k_dim, v_page, v_head, v_token, v_dim, table_stride, page_len,
    hist, base, mass_below, low, given, cuts, before, counters, ceilings, floors, best, num_blocks, kv_start, kv_len,
    num_kv_heads, hist_stride, sinks, recent, scale, slack_share, ratio, share, tolerance, count,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, HELD: tl.constexpr, BASED: tl.constexpr,
    BLOCK: tl.constexpr, NUM_COUNTERS: tl.constexpr, PAGED: tl.constexpr, COUNTED: tl.constexpr, NEAR: tl.constexpr, MASS: tl.constexpr, GIVEN: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """What to score first: keys that no outcome could rule out, or that settle what the best is. Clears what weighing counts into.

    Nothing rests on the choice: the second look's threshold is one whatever was scored. Where three fifths of the keys are needed in any
    case, no more is looked at: as a rule four fifths are in the end.
    """
    if OVERLAPS:
        take_turn()
    pid = tl.program_id(0)
    kv = pid // G
    row = kv // num_kv_heads
    grid = tl.arange(0, BINS)
    tl.store(ceilings + pid * BINS + grid, tl.zeros((BINS,), tl.int32))
    tl.store(floors + pid * BINS + grid, tl.zeros((BINS,), tl.int32))
    tl.store(best + pid, -(1 << 30))
    origin = tl.load(low + pid)
    start = tl.load(kv_start + row)
    length = tl.load(kv_len + row) - start
    number, code, mass, under = _from_scan(hist, base, mass_below, pid, hist_stride, HELD, BASED)
    above = tl.sum(number, 0) - tl.cumsum(number, 0) + number
    cut = NOTHING + 0
    if COUNTED:
        need = _needed(length, share, tolerance, count)
        cut = tl.minimum(cut, tl.max(tl.where(above >= need, code, tl.min(code, 0)), 0))
    if NEAR:
        cut = tl.minimum(cut, tl.max(tl.where(above >= EARLY, code, tl.min(code, 0)), 0))
    if MASS:
        # With the mass of what is attended in any case: the open block, sinks and recent tokens.
        closed = tl.load(num_blocks + row) * L
        tail = tl.maximum(tl.minimum(closed, length - recent), 0)
        head = tl.minimum(sinks, tail)
        total = head + length - tail
        d = tl.arange(0, DP)
        x = tl.load(q + pid * D + d, mask=d < D, other=0.0).to(tl.float32)
        decided = tl.zeros((BLOCK,), tl.float32)
        for i in range(0, total, BLOCK):
            index = i + tl.arange(0, BLOCK)
            inside = index < total
            token = start + tl.where(index < head, index, tail + index - head)
            token = tl.where(inside, token, start)
            at = token_offset(
                table, row, kv % num_kv_heads, token, k_page, k_head, k_token, table_stride, page_len, PAGED
            )
            key = tl.load(k + at[:, None] + d[None, :] * k_dim, mask=inside[:, None] & (d < D)[None, :], other=0.0)
            product = key.to(tl.float32) * x[None, :]
            logit = (tl.sum(product, 1) + tl.sum(tl.abs(product), 1) * slack_share) * scale - origin - BELOW
            decided += tl.where(inside, exp(tl.minimum(logit, 80.0)), 0.0)
        over = tl.sum(mass, 0) - tl.cumsum(mass, 0) + mass + tl.sum(decided, 0)
        fits = (under + tl.cumsum(mass, 0) - mass) * 1.001 <= ratio * UNSEEN * over
        cut = tl.minimum(cut, tl.max(tl.where(fits, code, tl.min(code, 0)), 0))
        if _crowded(tl.sum(tl.where(code >= cut, number, 0), 0), closed, 3):
            tl.store(counters + kv * NUM_COUNTERS + CROWDED, 1)
    if GIVEN:
        cut = tl.minimum(cut, _code_of(tl.load(given + pid), origin, scale))
    tl.store(before + pid, NOTHING)
    tl.store(cuts + pid * 2, tl.minimum(cut, NOTHING - 1))
    tl.store(cuts + pid * 2 + 1, tl.minimum(cut, NOTHING - 1))


@triton.jit
def second_kernel(
    hist, base, mass_below, low, given, cuts, before, counters, floors, best, sums, num_blocks, kv_start, kv_len,
    num_kv_heads, hist_stride, scale, nats, ratio, share, tolerance, count,
    G: tl.constexpr, L: tl.constexpr, HELD: tl.constexpr, BASED: tl.constexpr, SPLITS: tl.constexpr, NUM_COUNTERS: tl.constexpr,
    COUNTED: tl.constexpr, NEAR: tl.constexpr, MASS: tl.constexpr, GIVEN: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Lower the cuts to where nothing that is asked for can lie below them, now that the best keys are scored."""
    if OVERLAPS:
        take_turn()
    pid = tl.program_id(0)
    kv = pid // G
    row = kv // num_kv_heads
    origin = tl.load(low + pid)
    old = tl.load(cuts + pid * 2)
    cut = old
    if COUNTED:
        bins = tl.arange(0, BINS)
        number = tl.load(floors + pid * BINS + bins)
        above = tl.sum(number, 0) - tl.cumsum(number, 0) + number
        need = _needed(tl.load(kv_len + row) - tl.load(kv_start + row), share, tolerance, count)
        cut = tl.minimum(cut, tl.max(tl.where(above >= need, bins, 0), 0) * BIN_CODES)
    if NEAR:
        lowest = tl.load(best + pid).to(tl.float32)
        lowest -= tl.abs(lowest) * 2.0**-22 + nats * STEPS + 2.0
        cut = tl.minimum(cut, tl.minimum(tl.maximum(lowest, 0.0), NOTHING - 1.0).to(tl.int32))
    if MASS:
        split = tl.arange(0, SPLITS)
        kept = tl.sum(tl.load(sums + pid * 2 * SPLITS + split), 0)
        number, code, mass, under = _from_scan(hist, base, mass_below, pid, hist_stride, HELD, BASED)
        limit = ratio * UNSEEN * kept
        cut = tl.minimum(cut, tl.where(limit == limit, _highest(code, mass, under, limit), 0))
        if _crowded(tl.sum(tl.where(code >= cut, number, 0), 0), tl.load(num_blocks + row) * L, 4):
            tl.store(counters + kv * NUM_COUNTERS + CROWDED, 1)
    if GIVEN:
        cut = tl.minimum(cut, _code_of(tl.load(given + pid), origin, scale))
    mine = counters + kv * NUM_COUNTERS
    tl.store(before + pid, old)
    tl.store(cuts + pid * 2, cut)
    tl.store(cuts + pid * 2 + 1, cut)
    if pid % G == 0:
        tl.store(mine + WEIGHED, tl.load(mine + LISTED))


@triton.jit
def last_kernel(
    low, given, cuts, counters, ceilings, floors, best, sums, below, tau, promised, num_blocks, kv_start, kv_len,
    num_kv_heads, room, scale, nats, ratio, share, tolerance, count,
    G: tl.constexpr, L: tl.constexpr, SPLITS: tl.constexpr, NUM_COUNTERS: tl.constexpr,
    COUNTED: tl.constexpr, NEAR: tl.constexpr, MASS: tl.constexpr, GIVEN: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Every key that may be asked for is scored: tau = what a score must reach to be kept, promised = what no lost key's score reaches.

    A KV head is to be attended densely where the share of the mass can't be met, where four fifths of its keys are needed for it, where its
    list overflowed, and where the row is longer than its sketch by more than the list has places for. Under MASS dense.py does that, and
    the kernels until then find an empty list; without it the list is declared too long, and they do it themselves.
    """
    if OVERLAPS:
        take_turn()
    pid = tl.program_id(0)
    kv = pid // G
    row = kv // num_kv_heads
    mine = counters + kv * NUM_COUNTERS
    origin = tl.load(low + pid)
    length = tl.load(kv_len + row) - tl.load(kv_start + row)
    closed = tl.load(num_blocks + row) * L
    listed = tl.load(mine + LISTED)
    dense = (listed > room) | (length - closed > 2 * L)
    bins = tl.arange(0, BINS)
    lowest = float("inf")  # codes
    if COUNTED:
        number = tl.load(floors + pid * BINS + bins)
        above = tl.sum(number, 0) - tl.cumsum(number, 0) + number
        need = _needed(length, share, tolerance, count)
        lowest = tl.minimum(lowest, (tl.max(tl.where(above >= need, bins, 0), 0) * BIN_CODES).to(tl.float32))
    if NEAR:
        near = tl.load(best + pid).to(tl.float32)
        lowest = tl.minimum(lowest, near - tl.abs(near) * 2.0**-22 - nats * STEPS)
    if MASS:
        split = tl.arange(0, 2 * SPLITS)
        kept = tl.sum(tl.load(sums + pid * 2 * SPLITS + split), 0)
        # What is kept is what was scored less what is dropped of it: U + D <= ratio (K - D).
        margin = tl.maximum(1 - (tl.abs(origin) + 64) * 2.0**-20, 0.5)
        limit = (ratio * margin * kept - tl.load(below + pid) * 1.002) / (1 + ratio)
        # Under a bin, not up to it less its own: a mass far above the others would swallow them in the difference.
        number = tl.load(ceilings + pid * BINS + bins - 1, mask=bins > 0, other=0)
        under = tl.cumsum(number.to(tl.float32) * exp(bins.to(tl.float32) * (BIN_CODES / STEPS) - BELOW), 0)
        cut = tl.min(tl.where(under * 1.001 <= limit, BINS, bins), 0) - 1
        lowest = tl.minimum(lowest, (cut * BIN_CODES).to(tl.float32))
        dense = dense | (cut < 0) | (limit == float("inf")) | _crowded(listed, closed, 4)
        dense = dense | (tl.load(mine + CROWDED) != 0)
    logit = origin + tl.minimum(lowest, 1e9) / STEPS
    score = (logit - (tl.abs(logit) + tl.abs(origin)) * 2.0**-18) / scale
    score -= tl.abs(score) * 2.0**-20
    if COUNTED or MASS:
        score = tl.where(lowest > 0, score, -float("inf"))
    score = tl.where(lowest < float("inf"), score, lowest)
    if GIVEN:
        score = tl.minimum(score, tl.load(given + pid))
    cut = tl.load(cuts + pid * 2)
    logit = origin + cut.to(tl.float32) / STEPS
    bound = (logit + (tl.abs(logit) + tl.abs(origin)) * 2.0**-22) / scale
    bound = tl.where(cut == 0, -float("inf"), bound)
    dense = dense | (score != score)
    if dense:
        if MASS:
            tl.store(mine + CROWDED, 1)
            tl.store(mine + LISTED, 0)
        else:
            tl.store(mine + LISTED, room + 1)
    tl.store(tau + pid, tl.where(dense, -float("inf"), score))
    tl.store(promised + pid, tl.where(dense, -float("inf"), tl.maximum(score, bound)))
