"""Dense attention of one query per row, split over the keys: the fallback, and the right choice below the crossover.

Arithmetic bound: tensor cores also sum |q| |k| and a |v|, for a tenth of a percent of the time; a logit is off by at most
gamma times the largest of the first, the output by the second times what that and the rounding of the weights make of a weight.
(The largest |k| and |v|, kept element by element, doubled the time: docs/kernels.md.)
"""

# pyright: reportCallIssue=false
# Constexprs and launch options are no parameters to a type checker.

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from louver.geometry.rounding import UNIT_OF
from louver.kernels.triton.common import LN2, LOG2E, exp, token_offset
from louver.kernels.triton.launch import buffers, cache_arguments, longest_row, num_splits, workspace
from louver.shapes import Keys, PerQueryHead, PerRow, Query, Values
from louver.sketch.layout import Sketch

LIFT = 15.0  # float16 weights are scaled by 2^15, or small ones would underflow


@triton.jit
def _dense_kernel(
    q, k, v, table, k_page, k_head, k_token, k_dim, v_page, v_head, v_token, v_dim, table_stride, page_len,
    kv_start, kv_len, part_out, part_sums, only, num_kv_heads, scale, only_stride,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, PAGED: tl.constexpr,
    STAGES: tl.constexpr, LIFT: tl.constexpr, NARROW: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if SOME:  # noqa: SIM102 - decided as this is compiled; the next only as it runs
        if tl.load(only + pid * only_stride) == 0:
            return
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    row = pid // num_kv_heads
    g = tl.arange(0, GP)
    real = g < G
    d = tl.arange(0, DP)
    start = tl.load(kv_start + row)
    stop = tl.load(kv_len + row)
    x = tl.load(q + (pid * G + g)[None, :] * D + d[:, None], mask=real[None, :] & (d < D)[:, None], other=0.0)
    peak = tl.full((GP,), -float("inf"), tl.float32)
    weights = tl.zeros((GP,), tl.float32)
    out = tl.zeros((GP, DP), tl.float32)
    x_abs = tl.abs(x).to(x.dtype)
    largest = tl.zeros((GP,), tl.float32)
    reach = tl.zeros((GP, DP), tl.float32)
    each = tl.cdiv(tl.cdiv(stop - start, BLOCK), splits) * BLOCK
    begin = start + split * each
    end = tl.minimum(begin + each, stop)
    own_k = k + row.to(tl.int64) * k_page + (pid % num_kv_heads).to(tl.int64) * k_head
    own_v = v + row.to(tl.int64) * v_page + (pid % num_kv_heads).to(tl.int64) * v_head
    for i in tl.range(begin, end, BLOCK, num_stages=STAGES):
        token = i + tl.arange(0, BLOCK)
        inside = token < end
        held = inside[:, None] & (d < D)[None, :]
        if PAGED:
            safe = tl.where(inside, token, start)
            head = pid % num_kv_heads
            at = token_offset(table, row, head, safe, k_page, k_head, k_token, table_stride, page_len, PAGED)
            key = tl.load(k + at[:, None] + d[None, :] * k_dim, mask=held, other=0.0)
            at = token_offset(table, row, head, safe, v_page, v_head, v_token, table_stride, page_len, PAGED)
            value = tl.load(v + at[:, None] + d[None, :] * v_dim, mask=held, other=0.0)
        else:
            key = tl.load(own_k + token.to(tl.int64)[:, None] * k_token + d[None, :] * k_dim, mask=held, other=0.0)
            value = tl.load(own_v + token.to(tl.int64)[:, None] * v_token + d[None, :] * v_dim, mask=held, other=0.0)
        if NARROW:  # 8-bit elements become the query's dtype in registers
            key = key.to(x.dtype)
            value = value.to(x.dtype)
        absolute = tl.dot(tl.abs(key).to(x.dtype), x_abs, input_precision="ieee")
        largest = tl.maximum(largest, tl.max(absolute, 0))
        logit = tl.dot(key.to(x.dtype), x, input_precision="ieee") * scale
        logit = tl.where(inside[:, None], logit, -float("inf"))
        higher = tl.maximum(peak, tl.max(logit, 0))
        weight = tl.exp2((logit - higher[None, :]) * LOG2E + LIFT)
        fade = exp(peak - higher)
        weights = weights * fade + tl.sum(weight, 0)
        rounded = tl.trans(weight).to(value.dtype)
        out = out * fade[:, None] + tl.dot(rounded, value, input_precision="ieee")
        reach = reach * fade[:, None] + tl.dot(rounded, tl.abs(value).to(value.dtype), input_precision="ieee")
        peak = higher
    at = ((pid * G + g) * splits + split).to(tl.int64)
    tl.store(part_out + at[:, None] * D + d[None, :], out, mask=real[:, None] & (d < D)[None, :])
    norm = tl.sqrt(tl.sum(reach * reach, 1))
    tl.store(part_sums + at * 8, peak - LIFT * LN2, mask=real)
    tl.store(part_sums + at * 8 + 1, weights, mask=real)
    tl.store(part_sums + at * 8 + 2, largest, mask=real)
    tl.store(part_sums + at * 8 + 3, norm, mask=real)
    # Column G asks with a zero query: every weight is 2^LIFT, so its reach is the plain sum of |v|.
    plain = tl.sum(tl.where(g == G, norm, 0.0), 0) * tl.exp2(-LIFT)
    tl.store(part_sums + at * 8 + 4, tl.zeros((GP,), tl.float32) + plain, mask=real)


@triton.jit
def _merge_kernel(
    part_out, part_sums, kv_start, kv_len, out, evidence, counts, only, num_blocks, num_kv_heads, scale, score_share,
    weight_slack, accumulation, underflow, out_unit, only_stride, frame_len,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if SOME:  # noqa: SIM102 - decided as this is compiled; the next only as it runs
        if tl.load(only + pid // G * only_stride) == 0:
            return
    d = tl.arange(0, DP)
    s = tl.arange(0, SPLITS)
    row = pid // G // num_kv_heads
    length = (tl.load(kv_len + row) - tl.load(kv_start + row)).to(tl.int64)
    sums = part_sums + (pid * SPLITS + s) * 8
    peaks = tl.load(sums)
    peak = tl.max(peaks, 0)
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    fade = tl.where(peaks == -float("inf"), 0.0, exp(peaks - shift))
    weights = tl.load(sums + 1)
    total = tl.sum(weights * fade, 0)
    parts = tl.load(part_out + (pid * SPLITS + s)[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    parts = tl.where(peaks[:, None] == -float("inf"), 0.0, parts)
    o = tl.sum(parts * fade[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + pid * D + d, o.to(out.dtype.element_ty), mask=d < D)
    # |sum a |v|| over all keys, relative to the total, and the largest error of a logit in nats.
    reach = tl.sum(tl.load(sums + 3) * fade, 0) / tl.where(total > 0, total, 1.0) * 1.001
    largest = tl.max(tl.load(sums + 2), 0) * scale
    plain = tl.sum(tl.load(sums + 4), 0) / tl.where(total > 0, total, 1.0) * 1.001
    off = largest * score_share + weight_slack + 2.0**-20 * (largest + tl.abs(shift))
    norm = tl.sqrt(tl.sum(o * o, 0)) * 1.001
    rows = tl.num_programs(0)
    arithmetic = (exp(2 * off) - 1) * 1.001 * (reach + norm) + accumulation * (reach + norm)
    arithmetic += underflow * (plain + norm * length.to(tl.float32) / tl.where(total > 0, total, 1.0))
    arithmetic += out_unit * norm + tl.sqrt(D * 1.0) * 2.0**-24
    tl.store(evidence + pid, tl.where(total > 0, shift + tl.log(total), -float("inf")))
    tl.store(evidence + rows + pid, 0.0)
    tl.store(evidence + 2 * rows + pid, tl.where(arithmetic == arithmetic, arithmetic, float("inf")))
    tl.store(evidence + 3 * rows + pid, 0.0)
    tl.store(evidence + 4 * rows + pid, -float("inf"))
    if pid % G == 0:
        blocks = length * 0
        if SOME:
            blocks += tl.load(num_blocks + row)
        closed = blocks * frame_len
        table = counts + pid // G * 7
        tl.store(table, length)
        tl.store(table + 1, blocks)
        tl.store(table + 2, length - closed)
        tl.store(table + 3, closed)
        tl.store(table + 4, closed)
        tl.store(table + 5, closed * 0)
        tl.store(table + 6, closed * 0)


def attend_dense(
    q: Query,
    keys: Keys,
    values: Values,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> tuple[Query, PerQueryHead]:
    """softmax(softmax_scale q K^T) V over the valid tokens of each row; out in q's dtype, and lse (float32)."""
    out, evidence, _ = attend_everything(q, keys, values, kv_start, kv_len, softmax_scale, block_table)
    return out, evidence[0]


def attend_everything(
    q: Query,
    keys: Keys,
    values: Values,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> tuple[Query, Tensor, Tensor]:
    """The same with the rows of evidence of a step (lse, certificate 0, arithmetic, dropped 0, tau -inf) and its counts."""
    batch, num_q_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    evidence = torch.empty(5, batch, num_q_heads, dtype=torch.float32, device=q.device)
    counts = torch.empty(batch, keys.shape[1], 7, dtype=torch.int64, device=q.device)
    _attend(q, keys, values, (kv_start, kv_len), softmax_scale, block_table, (out, evidence, counts), None)
    return out, evidence, counts


def attend_crowded(
    q: Query,
    keys: Keys,
    values: Values,
    sketch: Sketch,
    ends: tuple[PerRow, PerRow],
    softmax_scale: float,
    block_table: Int[Tensor, "batch pages"] | None,
    result: tuple[Tensor, Tensor, Tensor],
    crowded: Int[Tensor, " rows"],
    mask: Int[Tensor, "batch num_q_heads kv_len"] | None,
) -> None:
    """Write what ``attend_everything`` gives over the results of a step, for the KV heads marked with 1 in crowded (any stride).

    Those had read their sketch by then: their counts are of a step that attended every key of every block exactly, and so says the mask
    of exact keys (int8), if there is one.
    """
    _attend(q, keys, values, ends, softmax_scale, block_table, result, (crowded, sketch))
    if mask is not None:
        position = torch.arange(mask.shape[2], device=q.device)
        valid = (position >= ends[0][:, None]) & (position < ends[1][:, None])
        dense = crowded.reshape(q.shape[0], -1).repeat_interleave(q.shape[1] // keys.shape[1], 1)
        mask |= (dense[:, :, None] * valid[:, None]).to(torch.int8)


def _attend(
    q: Query,
    keys: Keys,
    values: Values,
    ends: tuple[PerRow, PerRow],
    softmax_scale: float,
    block_table: Tensor | None,
    result: tuple[Tensor, Tensor, Tensor],
    only: tuple[Tensor, Sketch] | None,
) -> None:
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    longest = longest_row(keys, block_table)
    block = 64 if head_dim <= 64 and keys.element_size() == 2 else 32  # narrow heads: as many bytes on their way
    # Of some KV heads there are programs enough to fill the device with one of them; the others' end at once.
    splits = num_splits(batch * num_kv_heads, -(-longest // block), 2 if only is None else 8)
    part_out = buffers(workspace, q.device, "dense_out", (batch * num_q_heads, splits, head_dim), torch.float32)
    part_sums = buffers(workspace, q.device, "dense_sums", (batch * num_q_heads, splits, 8), torch.float32)
    group = num_q_heads // num_kv_heads
    sizes = {"G": group, "D": head_dim, "DP": triton.next_power_of_2(head_dim), "SOME": only is not None}
    narrow = keys.element_size() == 1  # a float8 cache without scales, which only the bench asks for
    kind = q.dtype if narrow else values.dtype
    compute = q.contiguous() if narrow or q.dtype == keys.dtype else q.float().contiguous()
    chosen, stride = (ends[0], 0) if only is None else (only[0], only[0].stride(0))
    num_blocks, frame_len = (ends[0], 0) if only is None else (only[1].num_blocks, only[1].config.frame_len)
    _dense_kernel[(batch * num_kv_heads, splits)](
        compute, *cache_arguments(keys, values, block_table), *ends, part_out, part_sums, chosen, num_kv_heads,
        softmax_scale, stride, **sizes, GP=triton.next_power_of_2(group + 1), BLOCK=block, PAGED=block_table is not None,
        STAGES=3, LIFT=LIFT if kind == torch.float16 else 0.0, NARROW=narrow, num_warps=4,
    )  # fmt: skip
    unit = 2.0**-22
    chain = longest / splits + block
    _merge_kernel[(batch * num_q_heads,)](
        part_out, part_sums, *ends, *result, chosen, num_blocks, num_kv_heads, softmax_scale,
        (head_dim + 2) * unit * 1.01, UNIT_OF[kind] * 1.01 + 2.0**-20, 2 * (chain + splits + 64) * unit,
        2.0**-25 if kind == torch.float16 else 2.0**-120, UNIT_OF[q.dtype], stride, frame_len,
        **sizes, SPLITS=splits, num_warps=4,
    )  # fmt: skip
