"""attend_in_looks: a step whose threshold depends on scores (a share of the mass, a distance from the best), as a fixed sequence of launches.

    prepare, scan               bounds of every sketched key, and the histogram of the upper ones
    first,  list, weigh         the keys that are needed in any case: their scores bound the total mass, and settle what the best is
    second, list, weigh         what may be needed under that knowledge
    last, exact, finish         the threshold among what is scored; attend what reaches it
    dense                       KV heads of which nearly all keys are needed; the others' programs end at once

What attention/looks.py does over any backend's ops. Cuts fall on histogram bins of 1/32 nat. No wait for the device, no shape that depends
on data. prepare, scan, exact and finish are those of a step under a rule, in CUDA where that serves.
"""

# pyright: reportCallIssue=false
# Constexprs and launch options are no parameters to a type checker.

from typing import NamedTuple

import torch
import triton
from jaxtyping import Int
from torch import Tensor

from louver.geometry.rounded_query import TENSOR_UNIT
from louver.geometry.rounding import SAFETY, UNIT, UNIT_OF, gamma
from louver.kernels.ops import TierOutput
from louver.kernels.triton import crossover, native, step
from louver.kernels.triton.common import BINS, COUNTERS, CROWDED
from louver.kernels.triton.dense import attend_crowded, attend_everything
from louver.kernels.triton.launch import buffers, cache_arguments, early_options, longest_row, num_splits, workspace
from louver.kernels.triton.plan import MOST_KEYS, SHARE_BITS, TOLERANCE, Plan, plan_for
from louver.kernels.triton.thresholds import first_kernel, last_kernel, second_kernel
from louver.kernels.triton.weigh import list_new_kernel, weigh_kernel
from louver.protocols import CutRule
from louver.shapes import Keys, PerQueryHead, PerRow, Query, Values
from louver.sketch.layout import Sketch

BOUNDS = CutRule(drop=False)  # makes the scan count upper bounds; in Triton it also resolves cuts, which are not used
KEPT = CutRule(drop=True)
FLOOR = (0.9, 4.0)  # bounds are counted from so many nats below this share of the centers on
RESERVE = 2.0**-7  # of what may be dropped: for the roundings that a certificate allows for once more
NEVER = (1 << 31) - 1  # keys: a rank that no step reaches, so the threshold stays what it is


class Wanted(NamedTuple):
    """What a step must keep; whatever at least one of them asks for."""

    share: float = 0.0
    count: int = 0  # the max(ceil(share * valid keys), count) largest scores; 0 and 0: none
    nats: float | None = None  # every key whose logit lies within so many nats of the best
    dropped_mass: float | None = None  # so many keys that at most this share of the softmax mass is dropped
    tau: PerQueryHead | None = None  # every key whose score reaches it, float32


def attend_in_looks(
    q: Query,
    keys: Keys,
    values: Values,
    sketch: Sketch,
    wanted: dict,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    sinks: int = 0,
    recent: int = 0,
    record: bool = False,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> TierOutput | None:
    """One decode step that keeps what is ``wanted`` (fields of Wanted) and drops the rest; None where no kernel serves these shapes.

    dropped_mass_bound <= dropped_mass for every query head, if it is asked for. A KV head that would need four fifths of its keys for that
    is attended densely.
    """
    want = Wanted(**wanted)
    sketch = sketch.by_row()
    batch, num_q_heads, head_dim = q.shape
    longest = longest_row(keys, block_table)
    record_here = record and block_table is None
    if crossover.dense_is_faster("looks", q, keys, longest) and not record_here and keys.dtype == values.dtype:
        dense = attend_everything(q, keys, values, kv_start, kv_len, softmax_scale, block_table)
        return step.output_of(*dense, None)
    if not step.serves(q, sketch, keys, values):
        return None
    num_kv_heads, capacity = keys.shape[1], sketch.capacity
    group, rows, most = num_q_heads // num_kv_heads, batch * num_kv_heads, -(-longest // 64)
    native_scan = native.serves_scan(q, sketch, group)
    native_attend = native_scan and native.serves_cache(keys, values)
    scans = native.num_ctas(rows, -(-capacity // 8)) if native_scan else num_splits(rows, capacity, 8)
    exacts = native.num_ctas(rows, most) if native_attend else num_splits(rows, most, 4)
    place = (kv_start, kv_len)
    plan = plan_for(q, keys, values, sketch, BOUNDS, place, softmax_scale, block_table, scans, exacts)
    x = q.contiguous() if q.dtype == keys.dtype else q.float().contiguous()
    if native_scan:
        native.prepare(plan, x, FLOOR, True)
        native.scan(plan, x, sinks, recent)
    else:
        step.scan(plan, x, sinks, recent, False, scans, False)
    unit = UNIT if keys.dtype == torch.float32 else TENSOR_UNIT
    slack_share = SAFETY * gamma(head_dim + 2, unit)
    plan = plan._replace(rule=KEPT, choice=(0, TOLERANCE, NEVER, 0.0, 0.0))
    promised = _narrow(plan, x, want, sinks, recent, slack_share, native_scan)

    mask = torch.zeros(batch, num_q_heads, keys.shape[2], dtype=torch.int8, device=q.device) if record_here else None
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    evidence = torch.empty(5, batch, num_q_heads, dtype=torch.float32, device=q.device)
    counts = torch.empty(batch, num_kv_heads, 7, dtype=torch.int64, device=q.device)
    if native_attend:
        native.attend(plan, exacts, slack_share, mask)
    else:
        step.attend_listed(plan, x, False, exacts, slack_share, mask, scored=True)
    rounding = ((longest / min(scans, exacts) + scans + exacts + 256) * unit, UNIT_OF[q.dtype])
    finish = native.finish if native_scan else step.finish
    result = (out, evidence, counts)
    finish(plan, (exacts, scans), promised, rounding, result)
    if want.dropped_mass is not None:
        crowded = plan.workspace.counters[:, CROWDED.value]
        attend_crowded(q, keys, values, sketch, place, softmax_scale, block_table, result, crowded, mask)
    return step.output_of(out, evidence, counts, None if mask is None else mask.view(torch.bool))


def _narrow(
    plan: Plan, x: Tensor, want: Wanted, sinks: int, recent: int, slack_share: float, native_scan: bool
) -> Tensor:
    """From the scan's bounds to the workspace's list, its scores, and tau; returns the score that no key left out reaches."""
    w, sketch, device = plan.workspace, plan.sketch, x.device
    heads, frame_len = plan.rows * plan.group, sketch.config.frame_len
    splits = num_splits(plan.rows, -(-plan.room // 64), 8)

    def new(name: str, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return buffers(workspace, device, name, shape, dtype)

    before, best = new("cuts_before", heads), new("best_floor", heads)
    ceilings, floors = new("ceilings", heads, BINS.value), new("floors", heads, BINS.value)
    sums = new("weighed", heads, 2, splits, dtype=torch.float32)
    promised = new("promised", heads, dtype=torch.float32)
    given = promised if want.tau is None else want.tau.contiguous()
    held = native.NUM_BINS if native_scan else BINS.value
    scan = (w.hist, w.floor, w.masses)
    stride = held if native_scan else 2 * BINS.value
    ratio = 0.0 if want.dropped_mass is None else want.dropped_mass / (1 - want.dropped_mass) * (1 - RESERVE)
    nats = 0.0 if want.nats is None else want.nats
    choice = (round(want.share * (1 << SHARE_BITS)), TOLERANCE, min(max(1, want.count), MOST_KEYS))
    asked = {
        "COUNTED": want.share > 0 or want.count > 0,
        "NEAR": want.nats is not None,
        "MASS": want.dropped_mass is not None,
        "GIVEN": want.tau is not None,
    }
    cache = cache_arguments(plan.keys, plan.values, plan.block_table)
    shape = {"G": plan.group, "D": sketch.dims, "DP": triton.next_power_of_2(sketch.dims), "L": frame_len}
    paged = plan.block_table is not None
    held_by = {"HELD": held, "BASED": native_scan}
    early = early_options(x)
    chunk = max(1, 512 // triton.next_power_of_2(frame_len))
    off = UNIT_OF[plan.values.dtype] * 1.01 + 2.0**-20  # what exact_kernel allows a weight for rounding; attend.cu less

    def score_what_reaches(last: bool) -> None:
        list_new_kernel[(plan.rows, triton.cdiv(sketch.capacity, chunk))](
            w.upper, sketch.value_spread, sketch.num_blocks, w.cuts, before, w.listed, w.counters, w.below, plan.num_kv_heads,
            sketch.capacity, plan.room, G=plan.group, L=frame_len, LP=triton.next_power_of_2(frame_len), CHUNK=chunk,
            NUM_COUNTERS=COUNTERS, LAST=last, num_warps=4, **early,
        )  # fmt: skip
        weigh_kernel[(plan.rows, splits)](
            x, *cache, w.listed, w.list_scores, w.list_slacks, w.counters, w.low, ceilings, floors, best, sums, *plan.place,
            plan.num_kv_heads, plan.room, plan.scale, slack_share, off, **shape, GP=triton.next_power_of_2(plan.group), BLOCK=64,
            NUM_COUNTERS=COUNTERS, PAGED=paged, LAST=last, COUNTED=asked["COUNTED"], NEAR=asked["NEAR"], MASS=asked["MASS"],
            num_warps=4, **early,
        )  # fmt: skip

    first_kernel[(heads,)](
        x, *cache, *scan, w.low, given, w.cuts, before, w.counters, ceilings, floors, best, *plan.place, plan.num_kv_heads, stride,
        sinks, recent, plan.scale, slack_share, ratio, *choice, **shape, **held_by, **asked, BLOCK=64,
        NUM_COUNTERS=COUNTERS, PAGED=paged, num_warps=8, **early,
    )  # fmt: skip
    score_what_reaches(last=False)
    second_kernel[(heads,)](
        *scan, w.low, given, w.cuts, before, w.counters, floors, best, sums, *plan.place, plan.num_kv_heads, stride,
        plan.scale, nats, ratio, *choice, G=plan.group, L=frame_len, **held_by, SPLITS=splits, NUM_COUNTERS=COUNTERS, **asked, num_warps=8, **early,
    )  # fmt: skip
    score_what_reaches(last=True)
    last_kernel[(heads,)](
        w.low, given, w.cuts, w.counters, ceilings, floors, best, sums, w.below, w.tau, promised, *plan.place,
        plan.num_kv_heads, plan.room, plan.scale, nats, ratio, *choice, G=plan.group, L=frame_len, SPLITS=splits,
        NUM_COUNTERS=COUNTERS, **asked, num_warps=8, **early,
    )  # fmt: skip
    return promised
