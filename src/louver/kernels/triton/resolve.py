"""From codes to cuts on the device: histograms of the bounds, and the last program of each head reads its rule off them."""

import triton
import triton.language as tl

from louver.kernels.triton.common import ALWAYS, BELOW, BINS, SIGNED, STEPS


@triton.jit
def resolve_kernel(
    upper, reach, num_blocks, kv_start, kv_len, low, hist, finished, cuts, tau,
    num_kv_heads, capacity, scale, share, tolerance, count, fixed_tau, unread_mass,
    G: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, SLICES: tl.constexpr, CHUNK: tl.constexpr,
    DROP: tl.constexpr, FIXED: tl.constexpr, KEEP_BEST: tl.constexpr,
):  # fmt: skip
    """Count codes into bins; the last program of a query head turns its histogram into cuts.

    ``lower`` counts use the block's largest half-width: looser than a key's own, and sound. cuts[head] = codes from which a key is
    exact, and read; tau = a score no key can reach without being exact.
    """
    pid = tl.program_id(0)
    kv = pid // G
    row = kv // num_kv_heads
    blocks = tl.load(num_blocks + row)
    chunk = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    t = tl.arange(0, LP)
    block = kv.to(tl.int64) * capacity + chunk
    inside = (chunk < blocks)[:, None] & (t < L)[None, :]
    bins = tl.arange(0, BINS)
    if tl.program_id(1) * CHUNK < blocks:
        code = (
            tl.load(upper + (block * G + pid % G)[:, None] * L + t[None, :], mask=inside, other=32767).to(tl.int32)
            + SIGNED
        )
        free = inside & (code != ALWAYS)
        width = tl.load(reach + (block * (SLICES + 2) + SLICES + 1) * G + pid % G, mask=chunk < blocks, other=0.0)
        width = tl.minimum(tl.ceil(2 * STEPS * width * (1 + 2.0**-18)) + 3, 65535.0).to(tl.int32)
        lower = tl.maximum(code - width[:, None], 0)
        flat: tl.constexpr = CHUNK * LP
        counted = tl.histogram(tl.reshape(code >> 5, (flat,)), BINS, mask=tl.reshape(free, (flat,)))
        tl.atomic_add(hist + pid * 2 * BINS + bins, counted, mask=counted > 0, sem="relaxed")
        counted = tl.histogram(tl.reshape(lower >> 5, (flat,)), BINS, mask=tl.reshape(free, (flat,)))
        tl.atomic_add(hist + pid * 2 * BINS + BINS + bins, counted, mask=counted > 0, sem="relaxed")
    tl.debug_barrier()
    done = tl.atomic_add(finished + pid, 1, sem="acq_rel")
    if done == tl.num_programs(1) - 1:
        uppers = tl.load(hist + pid * 2 * BINS + bins, cache_modifier=".cg")
        lowers = tl.load(hist + pid * 2 * BINS + BINS + bins, cache_modifier=".cg")
        length = (tl.load(kv_len + row) - tl.load(kv_start + row)).to(tl.int64)
        need = tl.maximum((length * share - tolerance + ((1 << 40) - 1)) >> 40, count).to(tl.int32)
        total = tl.sum(uppers, 0)
        upper_from = total - tl.cumsum(uppers, 0) + uppers  # keys in this bin and above
        lower_from = total - tl.cumsum(lowers, 0) + lowers
        origin = tl.load(low + pid)
        floor = bins.to(tl.float32) * (32.0 / STEPS)
        mass = uppers.to(tl.float32) * tl.exp(floor + 32.0 / STEPS - BELOW)  # in units of e^(origin + BELOW)
        best_lower = tl.max(tl.where(lowers > 0, bins, 0), 0) * 32
        if DROP:
            if FIXED:
                position = (fixed_tau * scale - origin) * STEPS
                position -= (tl.abs(fixed_tau * scale) + tl.abs(origin)) * (2.0**-21 * STEPS)
                cut = tl.minimum(tl.maximum(tl.floor(position), 0.0), 65535.0).to(tl.int32)
                cut_tau = fixed_tau + 0.0
                if KEEP_BEST:
                    cut_tau = tl.where(best_lower < cut, (origin + best_lower.to(tl.float32) / STEPS) / scale, cut_tau)
                    cut = tl.minimum(cut, best_lower)
            else:
                cut = tl.maximum(tl.sum((lower_from >= need).to(tl.int32), 0) - 1, 0) * 32
                cut_tau = (origin + cut.to(tl.float32) / STEPS) / scale
            if not FIXED:
                cut_tau = tl.where(
                    (cut == 0) | (cut_tau != cut_tau), -float("inf"), cut_tau - tl.abs(cut_tau) * 2.0**-20
                )
            unread = cut
        else:
            cut = tl.maximum(tl.sum((upper_from >= need).to(tl.int32), 0) - 1, 0) * 32
            kept = tl.sum(tl.where(bins > 0, lowers.to(tl.float32) * tl.exp(floor - BELOW), 0.0), 0)
            under = tl.cumsum(mass, 0) - mass
            readable = tl.sum((under * 1.001 <= unread_mass * kept * 0.999).to(tl.int32), 0) - 1
            unread = tl.minimum(tl.maximum(readable, 0) * 32, cut)
            cut_tau = (origin + cut.to(tl.float32) / STEPS) / scale
            cut_tau = tl.where(cut == 0, -float("inf"), cut_tau + tl.abs(cut_tau) * 2.0**-20)
        tl.store(cuts + pid * 2, cut)
        tl.store(cuts + pid * 2 + 1, unread)
        tl.store(tau + pid, cut_tau)
