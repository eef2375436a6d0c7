"""encode_block: sketch every block that is full and not yet sketched, one program per block, without asking the host.

The encoder is free to choose frames; its promise is the radius (sketch/encode.py). Here residuals are float32: each is widened by
4 u (|x| + |center| + 8 scale), which covers the four roundings of computing it, and norms by NORM_INFLATION.
"""

# pyright: reportCallIssue=false
# Constexprs and launch options are no parameters to a type checker.

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from louver.kernels.triton.common import UNIT, token_offset
from louver.kernels.triton.launch import cache_arguments, scales_on
from louver.shapes import Keys, PerRow, Values
from louver.sketch.layout import Sketch

PROGRAMS = 64  # per row and head: a prompt's blocks are spread over them, a decode step's find nothing to do
NORM_INFLATION = tl.constexpr(1 + 2.0**-14)  # gamma(dims + 16) for up to 500 channels, twice
LARGEST = tl.constexpr(60000.0)


@triton.jit
def _fit(x, valid, scales, CLIP: tl.constexpr):
    """Scale code, scale, center (float16 values), codes 0..15 and widened residuals of x [tokens, channels]."""
    low = tl.min(tl.where(valid[:, None], x, float("inf")), 0)
    high = tl.max(tl.where(valid[:, None], x, -float("inf")), 0)
    empty = low > high
    low = tl.where(empty, 0.0, low)
    high = tl.where(empty, 0.0, high)
    middle = (low + high) / 2
    x = tl.where(valid[:, None], x, middle[None, :])
    reach = tl.maximum((high - low) / 16, 2.0**-30)
    full = tl.ceil(8 * (tl.log2(reach) + 18))
    best_error = tl.full(middle.shape, float("inf"), tl.float32)
    best_step = tl.zeros(middle.shape, tl.float32)
    for step in tl.static_range(0, 7 if CLIP else 1):
        candidate = full + (1 - step)
        code = tl.minimum(tl.maximum(candidate, 0.0), 255.0).to(tl.int32)
        scale = tl.load(scales + code)
        center = (middle + scale / 2).to(tl.float16).to(tl.float32)
        grade = tl.floor((x - center[None, :]) / scale[None, :] + 0.5)
        grade = tl.minimum(tl.maximum(grade, -8.0), 7.0)
        off = grade * scale[None, :] + center[None, :] - x
        error = tl.sum(off * off, 0)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_step = tl.where(better, candidate, best_step)
    code = tl.minimum(tl.maximum(best_step, 0.0), 255.0).to(tl.int32)
    scale = tl.load(scales + code)
    center = (middle + scale / 2).to(tl.float16).to(tl.float32)
    grade = tl.floor((x - center[None, :]) / scale[None, :] + 0.5)
    grade = tl.minimum(tl.maximum(grade, -8.0), 7.0)
    off = tl.abs(grade * scale[None, :] + center[None, :] - x)
    off += 4 * UNIT * (tl.abs(x) + tl.abs(center)[None, :] + 8 * scale[None, :])
    return code, scale, center, (grade + 8).to(tl.int32), tl.where(valid[:, None], off, 0.0)


@triton.jit
def _encode_kernel(
    k, v, table, k_page, k_head, k_token, k_dim, v_page, v_head, v_token, v_dim, table_stride, page_len,
    kv_start, kv_len, num_blocks, scales, weight, mean,
    key_codes, key_center, key_scale, key_radius, radius_unit,
    value_codes, value_center, value_scale, value_error, value_spread,
    num_kv_heads, capacity,
    PAGED: tl.constexpr, VALUES: tl.constexpr, VALUE_CODES: tl.constexpr, FRAME: tl.constexpr, CLIP: tl.constexpr,
    L: tl.constexpr, LP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, SLICES: tl.constexpr, LONG: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid // num_kv_heads
    head = pid % num_kv_heads
    start = tl.load(kv_start + row)
    full = (tl.load(kv_len + row) - start) // L
    half = tl.arange(0, HALF)
    in_half = half < D // 2
    t = tl.arange(0, LP)
    # The slices of the head dimension a radius stands for: LONG of them hold SHORT + 1 channels, the rest SHORT.
    low_slice = tl.where(half < LONG * (SHORT + 1), half // (SHORT + 1), LONG + (half - LONG * (SHORT + 1)) // SHORT)
    upper = half + D // 2
    high_slice = tl.where(
        upper < LONG * (SHORT + 1), upper // (SHORT + 1), LONG + (upper - LONG * (SHORT + 1)) // SHORT
    )
    for b in range(tl.load(num_blocks + row) + tl.program_id(1), full, tl.num_programs(1)):
        token = start + b * L + t
        inside = (t < L)[:, None] & in_half[None, :]
        at = token_offset(
            table,
            row,
            head,
            tl.where(t < L, token, start + b * L),
            k_page,
            k_head,
            k_token,
            table_stride,
            page_len,
            PAGED,
        )
        k_low = tl.load(k + at[:, None] + half[None, :] * k_dim, mask=inside, other=0.0).to(tl.float32)
        k_high = tl.load(k + at[:, None] + upper[None, :] * k_dim, mask=inside, other=0.0).to(tl.float32)
        fits = ((tl.abs(k_low) <= LARGEST) & (tl.abs(k_high) <= LARGEST)).to(tl.int32)
        valid = (tl.min(fits, 1) > 0) & (t < L)
        block = pid.to(tl.int64) * capacity + b
        if VALUES:
            at = token_offset(
                table,
                row,
                head,
                tl.where(t < L, token, start + b * L),
                v_page,
                v_head,
                v_token,
                table_stride,
                page_len,
                PAGED,
            )
            v_low = tl.load(v + at[:, None] + half[None, :] * v_dim, mask=inside, other=0.0).to(tl.float32)
            v_high = tl.load(v + at[:, None] + upper[None, :] * v_dim, mask=inside, other=0.0).to(tl.float32)
            fits = ((tl.abs(v_low) <= LARGEST) & (tl.abs(v_high) <= LARGEST)).to(tl.int32)
            valid = valid & (tl.min(fits, 1) > 0)
            mean_low = tl.load(mean + pid * D + half, mask=in_half, other=0.0)
            mean_high = tl.load(mean + pid * D + upper, mask=in_half, other=0.0)
            far = tl.where(valid[:, None], tl.abs(v_low - mean_low[None, :]) + UNIT * tl.abs(mean_low)[None, :], 0.0)
            away = tl.sum(far * far, 1)
            far = tl.where(valid[:, None], tl.abs(v_high - mean_high[None, :]) + UNIT * tl.abs(mean_high)[None, :], 0.0)
            away += tl.sum(far * far, 1)
            tl.store(value_spread + block, tl.sqrt(tl.max(away, 0)) * NORM_INFLATION + 2.0**-60)
            if VALUE_CODES:
                code, scale, center, grade_low, off = _fit(v_low, valid, scales, CLIP)
                tl.store(value_scale + block * D + half, code.to(tl.uint8), mask=in_half)
                tl.store(value_center + block * D + half, center.to(tl.float16), mask=in_half)
                missed = tl.sum(tl.where(in_half[None, :], off * off, 0.0), 1)
                code, scale, center, grade_high, off = _fit(v_high, valid, scales, CLIP)
                tl.store(value_scale + block * D + upper, code.to(tl.uint8), mask=in_half)
                tl.store(value_center + block * D + upper, center.to(tl.float16), mask=in_half)
                missed += tl.sum(tl.where(in_half[None, :], off * off, 0.0), 1)
                packed = (grade_low | (grade_high << 4)).to(tl.uint8)
                tl.store(value_codes + (block * L + t)[:, None] * (D // 2) + half[None, :], packed, mask=inside)
                tl.store(value_error + block, tl.sqrt(tl.max(missed, 0)) * NORM_INFLATION + 2.0**-60)
        else:
            tl.store(value_spread + block, float("inf"))

        code, scale, center, grade_low, off_low = _fit(k_low, valid, scales, CLIP)
        tl.store(key_scale + block * D + half, code.to(tl.uint8), mask=in_half)
        tl.store(key_center + block * D + half, center.to(tl.float16), mask=in_half)
        w = tl.load(weight + pid * D + half, mask=in_half, other=1.0)
        u = tl.where(in_half, w * scale if FRAME == 1 else (w if FRAME == 0 else 1.0), 1.0)
        square_low = tl.where(in_half[None, :], off_low * off_low / u[None, :], 0.0)
        code, scale, center, grade_high, off_high = _fit(k_high, valid, scales, CLIP)
        tl.store(key_scale + block * D + upper, code.to(tl.uint8), mask=in_half)
        tl.store(key_center + block * D + upper, center.to(tl.float16), mask=in_half)
        w = tl.load(weight + pid * D + upper, mask=in_half, other=1.0)
        u = tl.where(in_half, w * scale if FRAME == 1 else (w if FRAME == 0 else 1.0), 1.0)
        square_high = tl.where(in_half[None, :], off_high * off_high / u[None, :], 0.0)
        packed = (grade_low | (grade_high << 4)).to(tl.uint8)
        tl.store(key_codes + (block * L + t)[:, None] * (D // 2) + half[None, :], packed, mask=inside)
        for s in tl.static_range(SLICES):
            square = tl.sum(tl.where((low_slice == s)[None, :], square_low, 0.0), 1)
            square += tl.sum(tl.where((high_slice == s)[None, :], square_high, 0.0), 1)
            norm = tl.sqrt(square) * NORM_INFLATION
            unit = tl.maximum(tl.max(norm, 0) * ((1 + 2.0**-20) / 253), 2.0**-100)
            radius = tl.where(valid, tl.minimum(tl.ceil(norm / unit), 254.0), 255.0)
            tl.store(key_radius + (block * L + t) * SLICES + s, radius.to(tl.int32).to(tl.uint8), mask=t < L)
            tl.store(radius_unit + block * SLICES + s, unit)


def encode_block(
    keys: Keys,
    values: Values | None,
    sketch: Sketch,
    kv_start: PerRow,
    kv_len: PerRow,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> None:
    """Close the blocks that are full, in place; see louver.kernels.reference.encode.encode_block. Never waits for the device."""
    config = sketch.config
    batch, num_kv_heads = sketch.query_weight.shape[:2]
    base, longer = divmod(sketch.dims, sketch.num_slices)
    coded = sketch.value_codes is not None and values is not None
    if sketch.capacity:
        _encode_kernel[(batch * num_kv_heads, min(PROGRAMS, sketch.capacity))](
            *cache_arguments(keys, values if values is not None else keys, block_table),
            kv_start, kv_len, sketch.num_blocks, scales_on(keys.device), sketch.query_weight, sketch.value_mean,
            sketch.key_codes, sketch.key_center, sketch.key_scale, sketch.key_radius, sketch.radius_unit,
            sketch.value_codes if coded else sketch.key_codes, sketch.value_center if coded else sketch.key_center,
            sketch.value_scale if coded else sketch.key_scale, sketch.value_error if coded else sketch.value_spread,
            sketch.value_spread, num_kv_heads, sketch.capacity,
            PAGED=block_table is not None, VALUES=values is not None, VALUE_CODES=coded,
            FRAME={"frame": 1, "diagonal": 0, "identity": 2}[config.metric], CLIP=config.clip,
            L=config.frame_len, LP=triton.next_power_of_2(config.frame_len), D=sketch.dims,
            HALF=triton.next_power_of_2(sketch.dims // 2), SLICES=sketch.num_slices, LONG=longer, SHORT=base,
            num_warps=8,
        )  # fmt: skip
    full = torch.div(kv_len - kv_start, config.frame_len, rounding_mode="floor").to(torch.int32)
    torch.maximum(sketch.num_blocks, full, out=sketch.num_blocks)
