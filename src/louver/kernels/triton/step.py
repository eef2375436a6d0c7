"""step: one decode step as a fixed sequence of launches, with no wait for the device and no shape that depends on data.

    prepare   place the grid, clear the counters                       one program per query head
    scan      stream the sketched keys, leave 16-bit upper bounds      (kv heads, splits)
    resolve   histograms, then the rule's cuts                         (query heads, chunks)  part of the scan in CUDA
    tiers     list the exact keys, attend the rest through the sketch  (kv heads, splits)     drop: list only
    rank      the rank-th best exact score                             (kv heads, splits)     topk and budget only
    exact     attend the list and the open block exactly               (kv heads, splits)
    finish    merge, certificate                                       one program per query head

A list that overflows its room makes its KV head dense, in ``exact``, on the device. Below ``crossover`` tokens the step is dense.
"""

# pyright: reportCallIssue=false
# Constexprs and launch options are no parameters to a type checker.

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from jaxtyping import Int
from torch import Tensor

from louver.geometry.rounded_query import TENSOR_UNIT, rounded_query_slack
from louver.geometry.rounding import SAFETY, UNIT, UNIT_OF, gamma, radius_inflation
from louver.kernels.ops import TierOutput
from louver.kernels.reference.step import step as reference_step
from louver.kernels.triton import scan_in_cuda
from louver.kernels.triton.common import BINS, COUNTERS, RANK_BINS
from louver.kernels.triton.dense import attend_everything
from louver.kernels.triton.exact import exact_kernel, rank_kernel
from louver.kernels.triton.finish import finish_kernel
from louver.kernels.triton.launch import cache_arguments, num_splits, scales_on
from louver.kernels.triton.resolve import resolve_kernel
from louver.kernels.triton.scan import SAMPLE, prepare_kernel, scan_kernel
from louver.kernels.triton.tiers import list_kernel, tiers_kernel
from louver.protocols import CutRule
from louver.shapes import Keys, PerRow, Query, Values
from louver.sketch.layout import Sketch

crossover = {"drop": 8192, "keep": 16384}  # tokens up to which dense is faster (H100); tests set it to 0
SHARE_BITS = 40
TOLERANCE = 1 << 20  # in 2^-40: forgives a share such as 0.01 its binary rounding


class Workspace(NamedTuple):
    """Buffers of a step, allocated once per shape and shared by the layers of a model: nothing lives on between steps."""

    low: Tensor
    floor: Tensor
    query: Tensor
    masses: Tensor
    hist: Tensor
    rank_hist: Tensor
    counters: Tensor
    finished: Tensor
    cuts: Tensor
    tau: Tensor
    below: Tensor
    upper: Tensor
    reach: Tensor
    listed: Tensor
    exact_out: Tensor
    exact_sums: Tensor
    tier_out: Tensor
    tier_sums: Tensor


@lru_cache(maxsize=8)
def workspace(
    device: torch.device,
    rows: int,
    group: int,
    dims: int,
    capacity: int,
    frame_len: int,
    slices: int,
    splits: tuple[int, int],
) -> Workspace:
    """Allocate the buffers for rows = batch * num_kv_heads."""
    heads, (scans, exacts) = rows * group, splits

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return Workspace(
        low=new(heads),
        floor=new(heads, dtype=torch.int32),
        query=new(heads, dims),
        masses=new(heads, 2),
        hist=new(heads, 2, BINS.value, dtype=torch.int32),
        rank_hist=new(heads, RANK_BINS.value, dtype=torch.int32),
        counters=new(rows, COUNTERS, dtype=torch.int32),
        finished=new(heads, dtype=torch.int32),
        cuts=new(heads, 2, dtype=torch.int32),
        tau=new(heads),
        below=new(heads),
        upper=new(rows, capacity, group, frame_len, dtype=torch.int16),
        reach=new(rows, capacity, slices + 2, group),
        listed=new(rows, room_for(capacity * frame_len), dtype=torch.int32),
        exact_out=new(heads, exacts, dims),
        exact_sums=new(heads, exacts, 8),
        tier_out=new(heads, scans, dims),
        tier_sums=new(heads, scans, 8),
    )


def room_for(tokens: int) -> int:
    """Places in a KV head's list of exact keys; where more are exact, dense attention is faster anyway."""
    return max(1024, tokens // 3)


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

    Differences in kind, never in the promise: cuts fall on histogram bins of 1/32 nat and ranks on steps of 1/1024 nat, so a few
    keys more than asked are exact; short contexts are dense.
    """
    batch, num_q_heads, head_dim = q.shape
    longest = keys.shape[2] * (1 if block_table is None else block_table.shape[1])
    record_here = record and block_table is None
    if longest <= crossover["drop" if rule.drop else "keep"] and not record_here and keys.dtype == values.dtype:
        out, evidence, counts = attend_everything(q, keys, values, kv_start, kv_len, softmax_scale, block_table)
        return _output(out, evidence, counts, None)
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
    capacity, frame_len, slices = sketch.capacity, sketch.config.frame_len, sketch.num_slices
    scans, exacts = num_splits(rows, capacity, 8), num_splits(rows, -(-longest // 64), 4)
    w = workspace(q.device, rows, group, head_dim, capacity, frame_len, slices, (scans, exacts))
    room = w.listed.shape[1]
    base, longer = divmod(sketch.dims, slices)
    x = q.contiguous() if q.dtype == keys.dtype else q.float().contiguous()
    scales = scales_on(q.device)
    place = (sketch.num_blocks, kv_start, kv_len)
    share, need = round(rule.share * (1 << SHARE_BITS)), max(1, rule.count)
    ranked, fixed = rule.drop and rule.tau is None, rule.drop and rule.tau is not None
    heads = {"G": group, "GP": triton.next_power_of_2(group), "D": head_dim}
    frames = {"L": frame_len, "LP": triton.next_power_of_2(frame_len)}
    words = {"WORDS": max(16, triton.next_power_of_2(head_dim // 4))}

    native = scan_in_cuda.serves(q, sketch, group)
    bins = scan_in_cuda.num_bins(group) if native else 2 * BINS.value
    wanted = max(rule.share, need / max(1, longest))
    floor = 0.0 if fixed or not native or wanted > 0.05 else 0.25 if rule.drop else 0.5
    prepare_kernel[(batch * num_q_heads,)](
        x, sketch.key_center, sketch.num_blocks, w.low, w.floor, w.query, w.hist, w.rank_hist, w.counters, w.finished, w.masses,
        w.below, num_q_heads, capacity, softmax_scale, bins, G=group, D=head_dim, DP=triton.next_power_of_2(head_dim),
        SAMPLE=SAMPLE, NUM_COUNTERS=COUNTERS, RANKED=ranked, BINS=1024, FLOOR=floor, num_warps=4,
    )  # fmt: skip
    metric = {"frame": 1, "diagonal": 0, "identity": 2}[sketch.config.metric]
    choice = (share, TOLERANCE, need, min(max(rule.tau or 0.0, -1e30), 1e30), rule.unread_mass)
    ends = (num_kv_heads, capacity, sinks, recent, softmax_scale)
    rounding = (*rounded_query_slack(head_dim), radius_inflation(head_dim + 8))
    if native:
        scan_in_cuda.scan(w, sketch, scales, place, ends, rounding, choice, group, metric, rule.drop, fixed, keep_best)
    else:
        scan_kernel[(rows, scans)](
            x, sketch.key_codes.view(torch.int16), sketch.key_center, sketch.key_scale, sketch.key_radius, sketch.radius_unit,
            scales, sketch.query_weight, *place, w.low, w.upper, w.reach, *ends, *rounding, **heads, **words, **frames,
            FRAME=metric, SLICES=slices, LONG=longer, SHORT=base, STAGES=1, num_warps=4,
        )  # fmt: skip
        chunk = max(1, 8192 // frames["LP"])
        resolve_kernel[(batch * num_q_heads, triton.cdiv(capacity, chunk))](
            w.upper, w.reach, *place, w.low, w.hist, w.finished, w.cuts, w.tau, num_kv_heads, capacity, softmax_scale, *choice,
            G=group, **frames, SLICES=slices, CHUNK=triton.next_power_of_2(chunk), DROP=rule.drop, FIXED=fixed,
            KEEP_BEST=keep_best, num_warps=8,
        )  # fmt: skip
    if rule.drop:
        chunk = max(1, 2048 // frames["LP"])
        list_kernel[(rows, triton.cdiv(capacity, chunk))](
            w.upper, sketch.value_spread, sketch.num_blocks, w.cuts, w.listed, w.counters, w.below, num_kv_heads, capacity, room,
            G=group, **frames, CHUNK=chunk, NUM_COUNTERS=COUNTERS, num_warps=4,
        )  # fmt: skip
    else:
        frames_of_values = sketch.value_frames
        assert frames_of_values is not None, "a policy that drops nothing needs sketched values"
        tiers_kernel[(rows, scans)](
            w.upper, w.reach, sketch.key_radius, frames_of_values.codes.view(torch.int16), frames_of_values.center, frames_of_values.scale,
            frames_of_values.error, sketch.value_spread, scales, sketch.num_blocks, w.low, w.cuts, w.listed, w.counters, w.tier_out,
            w.tier_sums, num_kv_heads, capacity, room, **heads, **words, **frames, SLICES=slices, NUM_COUNTERS=COUNTERS,
            STAGES=1, num_warps=4,
        )  # fmt: skip
    cache = cache_arguments(keys, values, block_table)
    unit = UNIT if keys.dtype == torch.float32 else TENSOR_UNIT
    slack_share = SAFETY * gamma(head_dim + 2, unit)
    tile = {
        "DP": triton.next_power_of_2(head_dim),
        "BLOCK": 32,
        "NUM_COUNTERS": COUNTERS,
        "PAGED": block_table is not None,
        "num_warps": 4,
    }
    if ranked:
        rank_kernel[(rows, exacts)](
            x, *cache, w.listed, w.counters, w.cuts, w.low, w.tau, w.rank_hist, *place, num_kv_heads, room, softmax_scale,
            slack_share, share, TOLERANCE, need, **heads, L=frame_len, **tile,
        )  # fmt: skip
    mask = torch.zeros(batch, num_q_heads, longest, dtype=torch.int8, device=q.device) if record_here else w.counters
    exact_kernel[(rows, exacts)](
        x, *cache, w.listed, w.counters, w.low, w.tau, *place, w.exact_out, w.exact_sums, mask, num_kv_heads, room,
        softmax_scale, slack_share, UNIT_OF[values.dtype] * 1.01 + 2.0**-20, longest, **heads, L=frame_len, **tile,
        DROP=rule.drop, RECORD=record_here,
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    evidence = torch.empty(5, batch, num_q_heads, device=q.device)
    counts = torch.empty(batch, num_kv_heads, 7, dtype=torch.int64, device=q.device)
    chain = longest / min(scans, exacts) + scans + exacts + 256
    finish_kernel[(batch * num_q_heads,)](
        w.exact_out, w.exact_sums, w.tier_out, w.tier_sums, w.low, w.cuts, w.tau, w.below, sketch.value_mean, w.counters, *place,
        out, evidence, counts, num_q_heads, num_kv_heads, room, chain * unit, UNIT_OF[q.dtype], G=group, D=head_dim,
        DP=tile["DP"], L=frame_len, EXACTS=exacts, TIERS=scans, NUM_COUNTERS=COUNTERS, DROP=rule.drop, num_warps=4,
    )  # fmt: skip
    return _output(out, evidence, counts, mask.bool() if record_here else None)


def _output(out: Tensor, evidence: Tensor, counts: Tensor, mask: Tensor | None) -> TierOutput:
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
