"""step: one decode step as a fixed sequence of launches, with no wait for the device and no shape that depends on data.

    prepare   place the grid, clear the counters                       one program per query head
    scan      stream the sketched keys, leave 16-bit upper bounds      (kv heads, splits)     CUDA, drop: a byte each
    resolve   histograms, then the rule's cuts                         (query heads, chunks)
    tiers     list the exact keys, attend the rest through the sketch  (kv heads, splits)     drop: list only
    rank      score the list, find the rank-th best                    (kv heads, splits)     topk and budget only
    exact     attend the list and the open block exactly               (kv heads, splits)
    finish    merge, certificate                                       one program per query head

In CUDA the scan counts, too, and every program of tiers reads the cuts off the histograms: there is no resolve.

A list that overflows its room (plan.py) makes its KV head dense, in ``exact``, on the device. Where dense is faster (crossover.py) the step is dense.
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
from louver.kernels.reference.step import step as reference_step
from louver.kernels.triton import crossover, native
from louver.kernels.triton.common import BINS, COUNTERS
from louver.kernels.triton.dense import attend_everything
from louver.kernels.triton.exact import exact_kernel, rank_kernel
from louver.kernels.triton.finish import finish_kernel
from louver.kernels.triton.launch import cache_arguments, early_options, longest_row, num_splits
from louver.kernels.triton.plan import Plan, plan_for
from louver.kernels.triton.resolve import resolve_kernel
from louver.kernels.triton.scan import SAMPLE, prepare_kernel, scan_kernel
from louver.kernels.triton.tiers import list_kernel, tiers_kernel
from louver.protocols import CutRule
from louver.shapes import Keys, PerRow, Query, Values
from louver.sketch.layout import Sketch


def serves(q: Tensor, sketch: Sketch, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernels take these shapes; the reference serves the rest (odd head dimensions, mixed dtypes)."""
    head_dim = q.shape[2]
    return head_dim % 4 == 0 and 32 <= head_dim <= 256 and keys.dtype == values.dtype and sketch.capacity > 0


def step(
    q: Query,
    keys: Keys,
    values: Values,
    sketch: Sketch,
    rule: CutRule,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    sinks: int = 0,
    recent: int = 0,
    keep_best: bool = False,
    record: bool = False,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> TierOutput:
    """One decode step under a rule; see louver.kernels.reference.step.step.

    Differences in kind, never in the promise: cuts fall on histogram bins of 1/32 nat (a retrieval's in CUDA: on levels of 0.065) and ranks
    on steps of 1/1024 nat, so a few keys more than asked are exact; short contexts are dense.
    """
    sketch = sketch.by_row()
    batch, num_q_heads, head_dim = q.shape
    longest = longest_row(keys, block_table)
    record_here = record and block_table is None
    if (
        crossover.dense_is_faster("drop" if rule.drop else "keep", q, keys, longest)
        and not record_here
        and keys.dtype == values.dtype
    ):
        out, evidence, counts = attend_everything(q, keys, values, kv_start, kv_len, softmax_scale, block_table)
        return output_of(out, evidence, counts, None)
    if not serves(q, sketch, keys, values):
        return reference_step(
            q,
            keys,
            values,
            sketch,
            rule,
            kv_start,
            kv_len,
            softmax_scale,
            sinks,
            recent,
            keep_best,
            record,
            block_table,
        )
    num_kv_heads = keys.shape[1]
    group, rows = num_q_heads // num_kv_heads, batch * num_kv_heads
    capacity = sketch.capacity
    native_scan = native.serves_scan(q, sketch, group)
    scans = native.num_ctas(rows, -(-capacity // 8)) if native_scan else num_splits(rows, capacity, 8)
    ranked = rule.drop and rule.tau is None
    native_attend = ranked and native_scan and native.serves_cache(keys, values) and q.dtype == keys.dtype
    most = -(-longest // 64)
    exacts = native.num_ctas(rows, most) if native_attend else num_splits(rows, most, 4)
    plan = plan_for(q, keys, values, sketch, rule, (kv_start, kv_len), softmax_scale, block_table, scans, exacts)
    w = plan.workspace
    x = q.contiguous() if q.dtype == keys.dtype else q.float().contiguous()
    if native_scan:
        floor = _floor(rule, max(1, rule.count) / max(1, longest))
        native.prepare(plan, x, floor, ranked)
        native.scan(plan, x, sinks, recent)
    else:
        scan(plan, x, sinks, recent, keep_best, scans, ranked)
    unit = UNIT if keys.dtype == torch.float32 else TENSOR_UNIT
    slack_share = SAFETY * gamma(head_dim + 2, unit)
    mask = torch.zeros(batch, num_q_heads, keys.shape[2], dtype=torch.int8, device=q.device) if record_here else None
    if not native_scan:
        sort(plan, scans)
    elif rule.drop:
        native.list_keys(plan, keep_best)
    else:
        native.tiers(plan, scans)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    evidence = torch.empty(5, batch, num_q_heads, dtype=torch.float32, device=q.device)
    counts = torch.empty(batch, num_kv_heads, 7, dtype=torch.int64, device=q.device)
    chain = longest / min(scans, exacts) + scans + exacts + 256
    result = output_of(out, evidence, counts, None if mask is None else mask.view(torch.bool))
    if native_attend:
        native.score(plan, slack_share)
        native.attend(plan, exacts, slack_share, mask)
    else:
        attend_listed(plan, x, ranked, exacts, slack_share, mask)
    accumulation = chain * (unit if rule.drop else TENSOR_UNIT)
    if native_scan:
        rounding = (accumulation, UNIT_OF[q.dtype])
        native.finish(plan, (exacts, scans), w.raised if native_attend else w.tau, rounding, (out, evidence, counts))
        return result
    finish(plan, (exacts, scans), w.tau, (accumulation, UNIT_OF[q.dtype]), (out, evidence, counts))
    return result


def _floor(rule: CutRule, share: float) -> tuple[float, float]:
    """The share of the centers above which bounds are counted, and nats below it: under what a rule asks for, or every key is listed."""
    share = max(rule.share, share)
    if not rule.drop:
        return (0.0 if share > 0.3 else 0.5 if share <= 0.05 else 0.9), 0.0
    if share <= 0.012:
        return 0.25, 0.0
    return (
        0.9,
        4.0,
    )  # the lower bound of a key lies below its block's center, by the radius and by where it lies in the block


def _sizes(plan: Plan) -> tuple[dict, dict, dict]:
    dims, frame_len = plan.sketch.dims, plan.sketch.config.frame_len
    return (
        {"G": plan.group, "GP": triton.next_power_of_2(plan.group), "D": dims},
        {"L": frame_len, "LP": triton.next_power_of_2(frame_len)},
        {"WORDS": max(16, triton.next_power_of_2(dims // 4))},
    )


def scan(plan: Plan, x: Tensor, sinks: int, recent: int, keep_best: bool, scans: int, ranked: bool) -> None:
    """The grids, the scan and its cuts in Triton."""
    w, sketch = plan.workspace, plan.sketch
    prepare_kernel[(plan.rows * plan.group,)](
        x, sketch.key_frame, sketch.key_scale, plan.scales, sketch.num_blocks, w.low, w.hist, w.rank_hist, w.counters, w.finished, w.below,
        plan.num_kv_heads * plan.group, sketch.capacity, plan.scale, 2 * BINS.value, G=plan.group, D=sketch.dims,
        DP=triton.next_power_of_2(sketch.dims), SAMPLE=SAMPLE, NUM_COUNTERS=COUNTERS, RANKED=ranked, BINS=1024, num_warps=4,
    )  # fmt: skip
    heads, frames, words = _sizes(plan)
    short, longer = divmod(sketch.dims, sketch.num_slices)
    scan_kernel[(plan.rows, scans)](
        x, sketch.key_codes.view(torch.int16), sketch.key_frame, sketch.key_scale, sketch.key_radius, sketch.radius_least,
        sketch.radius_unit, plan.scales, sketch.query_weight, *plan.place, w.low, w.upper, w.reach, plan.num_kv_heads, sketch.capacity, sinks, recent,
        plan.scale, *plan.rounding, **heads, **words, **frames, FRAME=native.METRICS[sketch.config.metric],
        SLICES=sketch.num_slices, LONG=longer, SHORT=short, STAGES=1, num_warps=4,
    )  # fmt: skip
    chunk = triton.next_power_of_2(max(1, 8192 // frames["LP"]))
    resolve_kernel[(plan.rows * plan.group, triton.cdiv(sketch.capacity, chunk))](
        w.upper, w.reach, *plan.place, w.low, w.hist, w.finished, w.cuts, w.tau, plan.num_kv_heads, sketch.capacity, plan.scale,
        *plan.choice, G=plan.group, **frames, SLICES=sketch.num_slices, CHUNK=chunk, DROP=plan.rule.drop, FIXED=plan.fixed,
        KEEP_BEST=keep_best, num_warps=8,
    )  # fmt: skip


def sort(plan: Plan, scans: int, again: bool = False) -> None:
    """List the exact keys, and attend the others where nothing is dropped, in Triton; ``again``: of KV heads that are not idle."""
    w, sketch, room = plan.workspace, plan.sketch, plan.room
    heads, frames, words = _sizes(plan)
    ends = (plan.num_kv_heads, sketch.capacity, room)
    if plan.rule.drop:
        chunk = max(1, 2048 // frames["LP"])
        list_kernel[(plan.rows, triton.cdiv(sketch.capacity, chunk))](
            w.upper, sketch.value_spread, sketch.num_blocks, w.cuts, w.listed, w.counters, w.below, *ends, G=plan.group, **frames,
            CHUNK=chunk, NUM_COUNTERS=COUNTERS, num_warps=4,
        )  # fmt: skip
    else:
        values = sketch.value_frames
        assert values is not None, "a policy that drops nothing needs sketched values"
        tiers_kernel[(plan.rows, scans)](
            w.upper, w.reach, sketch.key_radius, values.codes.view(torch.int16), values.frame, values.scale, values.error,
            sketch.value_spread, plan.scales, sketch.num_blocks, w.low, w.cuts, w.listed, w.counters, w.tier_out, w.tier_sums,
            w.finished, *ends, **heads, **words, **frames, SLICES=sketch.num_slices, NUM_COUNTERS=COUNTERS, STAGES=1,
            AGAIN=again, num_warps=4,
        )  # fmt: skip


def attend_listed(
    plan: Plan,
    x: Tensor,
    ranked: bool,
    exacts: int,
    slack_share: float,
    mask: Tensor | None,
    again: bool = False,
    scored: bool = False,
) -> None:
    """Settle the rank, and attend the list and the open block exactly; ``scored``: by scores that were left before, as ranking does."""
    w, sketch, room = plan.workspace, plan.sketch, plan.room
    heads, frames, _ = _sizes(plan)
    places = w.list_scores.shape[1]
    cache = cache_arguments(plan.keys, plan.values, plan.block_table)
    tile = {
        **heads,
        "DP": triton.next_power_of_2(sketch.dims),
        "L": frames["L"],
        "NUM_COUNTERS": COUNTERS,
        "PAGED": plan.block_table is not None,
        "num_warps": 4,
    }
    if ranked:
        rank_kernel[(plan.rows, exacts)](
            x, *cache, w.listed, w.list_scores, w.list_slacks, w.counters, w.cuts, w.low, w.tau, w.rank_hist, *plan.place,
            plan.num_kv_heads, room, places, plan.scale,
            slack_share, *plan.choice[:3], **tile, BLOCK=64,
        )  # fmt: skip
    exact_kernel[(plan.rows, exacts)](
        x, *cache, w.listed, w.list_scores, w.list_slacks, w.counters, w.low, w.tau, *plan.place, w.exact_out, w.exact_sums, w.counters if mask is None else mask, w.finished,
        plan.num_kv_heads, room, places, plan.scale, slack_share, UNIT_OF[plan.values.dtype] * 1.01 + 2.0**-20,
        0 if mask is None else mask.shape[2], **tile, DROP=plan.rule.drop, RECORD=mask is not None,
        RANKED_BEFORE=ranked or scored, AGAIN=again, BLOCK=32, num_stages=1 if ranked or scored else 3,
        **early_options(x),
    )  # fmt: skip


def finish(
    plan: Plan,
    splits: tuple[int, int],
    tau: Tensor,
    rounding: tuple[float, float],
    result: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Merge ``splits`` (exact, tiers) into output, evidence and counts, in Triton; see native.finish."""
    w, dims = plan.workspace, plan.sketch.dims
    finish_kernel[(plan.rows * plan.group,)](
        w.exact_out, w.exact_sums, w.tier_out, w.tier_sums, w.low, w.cuts, tau, w.below, plan.sketch.value_mean, w.counters,
        *plan.place, *result, plan.num_kv_heads * plan.group, plan.num_kv_heads, plan.room, *rounding, G=plan.group, D=dims,
        DP=triton.next_power_of_2(dims), L=plan.sketch.config.frame_len, EXACTS=splits[0], TIERS=splits[1],
        NUM_COUNTERS=COUNTERS, DROP=plan.rule.drop, num_warps=4,
    )  # fmt: skip


def output_of(out: Tensor, evidence: Tensor, counts: Tensor, mask: Tensor | None) -> TierOutput:
    lse, certificate, arithmetic, dropped, tau = evidence.unbind(0)
    return TierOutput(
        out=out,
        lse=lse,
        certificate=certificate,
        arithmetic_bound=arithmetic,
        dropped_mass_bound=dropped,
        tau=tau,
        counts=counts,
        exact_mask=mask,
    )
