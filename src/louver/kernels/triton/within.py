"""attend_within: a step whose certificate meets a relative error, as a fixed sequence of launches, with no wait for the device.

    prepare, scan, resolve      the bounds, and the first cuts, by a rule
    tiers, exact, finish        an output with its certificate                     again after every settle
    settle                      lower the cuts of whoever misses (settle.py)       len(AIMS) times
    settle, dense               everything exact for whoever misses still, and for KV heads that need nearly all of their keys

Launches of later passes end at once for KV heads whose cuts stayed. The first pass is a step's, in CUDA where that serves; the others take the
Triton twins, which know what to leave out.
What attention/within.py does over any backend's ops, with sums by key where this has a model, and as many passes as it takes.
"""

# pyright: reportCallIssue=false
# Constexprs and launch options are no parameters to a type checker.

import torch
import triton
from jaxtyping import Int
from torch import Tensor

from louver.geometry.rounded_query import TENSOR_UNIT
from louver.geometry.rounding import SAFETY, UNIT, UNIT_OF, gamma
from louver.kernels.ops import TierOutput
from louver.kernels.triton import native
from louver.kernels.triton.common import BINS, COUNTERS
from louver.kernels.triton.dense import attend_crowded
from louver.kernels.triton.launch import buffers, longest_row, num_splits, workspace
from louver.kernels.triton.plan import plan_for
from louver.kernels.triton.settle import settle_kernel
from louver.kernels.triton.step import attend_listed, finish, output_of, scan, serves, sort
from louver.protocols import COUNTS, CutRule
from louver.shapes import Keys, PerRow, Query, Values
from louver.sketch.accounting import CACHE_BYTES, value_frame_bytes
from louver.sketch.layout import Sketch

FLOOR = (0.9, 4.0)  # bounds are counted from so many nats below this share of the centers on
# Of what is allowed, what each pass that lowers cuts aims at. Much too high at first: heads of a group read for one another, which shows
# only in the next certificate, and cuts never rise again.
AIMS = (2.5, 1.4, 0.95, 0.8)


def attend_within(
    q: Query,
    keys: Keys,
    values: Values,
    sketch: Sketch,
    first: CutRule,
    error: float,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    sinks: int = 0,
    recent: int = 0,
    record: bool = False,
) -> tuple[TierOutput, Int[Tensor, "batch num_kv_heads"]] | None:
    """One step with certificate + arithmetic <= error |out| or certificate 0, per query head; None where no kernel serves these shapes.

    first: the rule of the first cuts. Also returns bytes that the counts don't cover: value codes that a pass read of keys which are
    exact in the end, at most.
    """
    if not serves(q, sketch, keys, values):
        return None
    batch, num_q_heads, head_dim = q.shape
    rows, longest = batch * keys.shape[1], longest_row(keys)
    native_scan = native.serves_scan(q, sketch, num_q_heads // keys.shape[1])
    scans = native.num_ctas(rows, -(-sketch.capacity // 8)) if native_scan else num_splits(rows, sketch.capacity, 8)
    exacts = num_splits(rows, -(-longest // 64), 4)
    plan = plan_for(q, keys, values, sketch, first, (kv_start, kv_len), softmax_scale, None, scans, exacts)
    w, device = plan.workspace, q.device
    x = q.contiguous() if q.dtype == keys.dtype else q.float().contiguous()
    unit = UNIT if keys.dtype == torch.float32 else TENSOR_UNIT
    rounding = ((longest / min(scans, exacts) + scans + exacts + 256) * TENSOR_UNIT, UNIT_OF[q.dtype])
    mask = torch.zeros(batch, num_q_heads, keys.shape[2], dtype=torch.int8, device=device) if record else None
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    evidence = torch.empty(5, batch, num_q_heads, dtype=torch.float32, device=device)
    counts = torch.empty(batch, keys.shape[1], 7, dtype=torch.int64, device=device)
    above = buffers(workspace, device, "bounds_above", (batch * num_q_heads, BINS.value), torch.int32)
    below = buffers(workspace, device, "grown_below", (batch * num_q_heads, BINS.value), torch.float32)
    crowded = buffers(workspace, device, "crowded", (rows,), torch.int32).zero_()

    held = native.NUM_BINS if native_scan else BINS.value

    def attend(again: bool) -> None:
        if native_scan and not again:
            native.tiers(plan, scans)
        else:
            sort(plan, scans, again)
        attend_listed(plan, x, False, exacts, SAFETY * gamma(head_dim + 2, unit), mask, again)
        merge = native.finish if native_scan else finish
        merge(plan, (exacts, scans), w.tau, rounding, (out, evidence, counts))

    def lower(aim: float) -> None:
        w.finished.fill_(1)  # idle, unless a head says otherwise
        settle_kernel[(batch * num_q_heads,)](
            w.hist, w.floor, w.masses, sketch.value_mean, out, evidence, w.tier_sums, w.low, sketch.num_blocks, w.counters, above, below, w.cuts, w.tau,
            w.finished, crowded, plan.num_kv_heads, held if native_scan else 2 * held, error, aim, softmax_scale, float(2 * CACHE_BYTES * head_dim),
            float(head_dim // 2), G=plan.group, D=head_dim, DP=triton.next_power_of_2(head_dim), L=sketch.config.frame_len,
            TIERS=scans, TP=triton.next_power_of_2(scans), NUM_COUNTERS=COUNTERS,
            HELD=held, BASED=native_scan, num_warps=8,
        )  # fmt: skip

    if native_scan:
        native.prepare(plan, x, FLOOR, False)
        native.scan(plan, x, sinks, recent)
    else:
        scan(plan, x, sinks, recent, False, scans, False)
    attend(again=False)
    looked = counts[..., COUNTS.index("exact")].clone()
    for aim in AIMS:
        lower(aim)
        w.counters.mul_(w.finished[: plan.rows, None])
        attend(again=True)
    lower(0.0)
    attend_crowded(
        q, keys, values, sketch, (kv_start, kv_len), softmax_scale, None, (out, evidence, counts), crowded, mask
    )
    columns = dict(zip(COUNTS, counts.unbind(-1), strict=True))
    more = (columns["exact"] - looked) * (head_dim // 2)
    more += (columns["blocks"] - columns["value_blocks"]) * value_frame_bytes(head_dim)
    return output_of(out, evidence, counts, None if mask is None else mask.view(torch.bool)), more
