"""Between two passes of a step under ``error:EPS``: lower a query head's cuts to where its certificate meets what was asked.

The terms of a certificate (docs/guarantee.md, 8) are modelled, not summed key by key: a key in a bin of the histogram weighs what its
bound says, less the mean half-width of the keys the last pass attended through the sketch; its value is as far off as theirs were on
average. What the model misses is a factor, certificate over prediction, and the next pass measures it anew. Nothing rests on any of
it: every pass has a certificate of its own, and who misses at the end is exact everywhere.
"""

import triton
import triton.language as tl

from louver.kernels.triton.common import BELOW, BIN_CODES, LISTED, STEPS, exp

LEAST = tl.constexpr(2.0**-100)


@triton.jit
def settle_kernel(
    hist, base, mass_below, mean, out, evidence, tier_sums, low, num_blocks, counters, bounds_above, grown_below, cuts, tau, idle, crowded,
    num_kv_heads, hist_stride, error, aim, scale, exact_bytes, coarse_bytes,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, TIERS: tl.constexpr, TP: tl.constexpr,
    NUM_COUNTERS: tl.constexpr, HELD: tl.constexpr, BASED: tl.constexpr,
):  # fmt: skip
    """Lower the cuts of a head whose certificate exceeds error |out| less arithmetic, and say that its KV head must be attended again.

    ``aim``: share of what is allowed to aim at; at 0 everything is exact for whoever misses. A KV head that listed four fifths of its
    keys, or needs as many by the model, is exact everywhere, too: it would read as much as dense attention. Exact everywhere is
    ``crowded``: such a KV head is attended densely at the end, and not again before.
    """
    pid = tl.program_id(0)
    kv = pid // G
    heads = tl.num_programs(0)
    d = tl.arange(0, DP)
    o = tl.load(out + pid * D + d, mask=d < D, other=0.0).to(tl.float32)
    m = tl.load(mean + kv * D + d, mask=d < D, other=0.0)
    away = tl.sqrt(tl.sum(tl.where(d < D, (m - o) * (m - o), 0.0), 0))
    lse = tl.load(evidence + pid)
    certificate = tl.load(evidence + heads + pid)
    allowed = error * tl.sqrt(tl.sum(o * o, 0)) * (1 - 2.0**-12) - tl.load(evidence + 2 * heads + pid)
    allowed = tl.where(allowed > 0, allowed, 0.0)  # also of NaN
    closed = tl.load(num_blocks + kv // num_kv_heads) * L
    full = (tl.load(counters + kv * NUM_COUNTERS + LISTED) * 5 >= closed * 4) & (closed > 0)
    met = certificate <= allowed
    cut = tl.load(cuts + pid * 2)
    if full | ((met == 0) & ((aim * allowed == 0) | (cut == 0))):
        tl.store(crowded + kv, 1)
    elif (met == 0) & (tl.load(crowded + kv) == 0):
        unread = tl.load(cuts + pid * 2 + 1)
        p = tl.arange(0, TP)
        sums = tier_sums + (pid * TIERS + p) * 8
        weights = tl.maximum(tl.sum(tl.load(sums, mask=p < TIERS, other=0.0), 0), LEAST)
        surplus = tl.sum(tl.load(sums + 3, mask=p < TIERS, other=0.0), 0)
        spread = tl.sum(tl.load(sums + 4, mask=p < TIERS, other=0.0), 0) / tl.maximum(surplus, LEAST)
        apart = tl.sum(tl.load(sums + 6, mask=p < TIERS, other=0.0), 0) / weights
        coded = tl.minimum(tl.maximum(apart - spread, 0.0), spread)  # how far a sketched value is off
        growth = surplus / weights

        bins = tl.arange(0, HELD)
        number = tl.load(hist + pid * hist_stride + bins)
        code = bins * BIN_CODES
        origin = tl.load(low + pid) - lse
        share = 0.0  # of the weights, of the keys under all bins
        if BASED:
            code += tl.load(base + pid)
            share += tl.load(mass_below + pid * 2) * exp(tl.minimum(origin + BELOW, 60.0)) / (1.0 + growth)
        coarse_below = share * (growth * (spread + away) + coded)
        more_below = share * (spread - coded)
        logit = origin + (code.to(tl.float32) + 0.5 * BIN_CODES) / STEPS
        shares = number.to(tl.float32) * exp(tl.minimum(logit, 60.0)) / (1.0 + growth)
        coarse = shares * (growth * (spread + away) + coded)
        more = shares * (spread - coded)
        predicted = coarse_below + tl.sum(tl.where(code < cut, coarse, 0.0), 0)
        predicted += more_below + tl.sum(tl.where(code < unread, more, 0.0), 0)
        factor = tl.minimum(tl.maximum(certificate / tl.maximum(predicted, LEAST), 2.0**-20), 2.0**20)
        room = aim * allowed / factor - coarse_below - (tl.cumsum(coarse, 0) - coarse)

        # The last bin edge j, at or below i, under which values may go unread within room(i): found by bisection.
        above = tl.sum(number, 0) - tl.cumsum(number, 0) + number
        tl.store(bounds_above + pid * HELD + bins, above)
        tl.store(grown_below + pid * HELD + bins, more_below + tl.cumsum(more, 0) - more)
        tl.debug_barrier()
        edge = tl.zeros((HELD,), tl.int32)
        step = HELD // 2
        while step > 0:
            further = tl.minimum(edge + step, HELD - 1)
            grown = tl.load(grown_below + pid * HELD + further, cache_modifier=".cg")
            edge = tl.where((edge + step <= bins) & (grown <= room), further, edge)
            step = step // 2
        read = tl.load(bounds_above + pid * HELD + edge, cache_modifier=".cg").to(tl.float32)
        cost = above.to(tl.float32) * (exact_bytes - coarse_bytes) + read * coarse_bytes
        best = tl.argmin(tl.where(room >= 0, cost, float("inf")), 0)
        fits = tl.max((room >= 0).to(tl.int32), 0) > 0  # or everything must be exact
        chosen = tl.where(fits, tl.minimum(cut, tl.sum(tl.where(bins == best, code, 0), 0)), 0)
        at = tl.sum(tl.where(bins == best, edge, 0), 0)
        edge_code = tl.sum(tl.where(bins == at, code, 0), 0)
        edge_code = tl.where(
            (at == 0) & (more_below > tl.max(tl.where(bins == best, room, -float("inf")), 0)), 0, edge_code
        )
        unread = tl.minimum(tl.minimum(unread, edge_code), chosen)
        bound = (tl.load(low + pid) + chosen.to(tl.float32) / STEPS) / scale
        tl.store(cuts + pid * 2, chosen)
        tl.store(cuts + pid * 2 + 1, unread)
        tl.store(tau + pid, tl.where(chosen == 0, -float("inf"), bound + tl.abs(bound) * 2.0**-20))
        needed = tl.sum(tl.where(code >= chosen, number, 0), 0)
        if (chosen == 0) | ((needed * 5 >= closed * 4) & (closed > 0)):
            tl.store(crowded + kv, 1)
        else:
            tl.store(idle + kv, 0)
