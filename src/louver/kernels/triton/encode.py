"""encode_block: sketch every block that is full and not yet sketched, one program per block, without asking the host.

The encoder is free to choose frames; its promise is the radius (sketch/encode.py). Here residuals are float32: each is widened by
4 u (|x| + (|center| + 8) scale), which covers the three roundings of computing it, and norms by NORM_INFLATION. A block's tokens are
held in two halves, each padded to a power of two: two radii share a byte.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Constexprs and launch options are no parameters to a type checker, and what a jitted function returns is not known to it.

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from louver.kernels.triton.common import UNIT, token_offset
from louver.kernels.triton.launch import cache_arguments, scales_on
from louver.shapes import Keys, PerRow, Values
from louver.sketch import layout
from louver.sketch.layout import LARGEST_FRAMED, Sketch, half_len

PROGRAMS = 64  # per row and head: a prompt's blocks are spread over them, a decode step's find nothing to do
NORM_INFLATION = tl.constexpr(1 + 2.0**-14)  # gamma(dims + 16) for up to 500 channels, twice
LARGEST = tl.constexpr(LARGEST_FRAMED)
LEVELS = tl.constexpr(16.0)
CENTERS = tl.constexpr(layout.CENTERS)
FALLS = tl.constexpr(layout.FALLS)
NO_BOUND = tl.constexpr(layout.NO_BOUND)


@triton.jit
def _scale_code(reach):
    return tl.ceil(8 * (tl.log2(tl.maximum(reach, 2.0**-30)) + 18))


@triton.jit
def _span(x, valid):
    """Of x [tokens, channels]: middle of its range, scale codes that span it and that its center can be counted in, unclamped."""
    low = tl.min(tl.where(valid[:, None], x, float("inf")), 0)
    high = tl.max(tl.where(valid[:, None], x, -float("inf")), 0)
    empty = low > high
    low = tl.where(empty, 0.0, low)
    high = tl.where(empty, 0.0, high)
    middle = (low + high) / 2
    return middle, _scale_code((high - low) / LEVELS), _scale_code(tl.abs(middle) / (CENTERS / 2 - 2))


@triton.jit
def _widest(full_low, finest_low, full_high, finest_high):
    """The block's scale code: that of the widest channel, a step wider."""
    widest = tl.maximum(tl.max(tl.maximum(full_low, finest_low), 0), tl.max(tl.maximum(full_high, finest_high), 0))
    return tl.minimum(tl.maximum(widest + 1, 0.0), 255.0)


@triton.jit
def _grades(x, middle, scale):
    """Centers in whole halves of the scale, and codes -8..7 of x."""
    center = tl.floor(2 * (middle / scale) + 1.5)
    center = tl.minimum(tl.maximum(center, -1.0 * CENTERS), CENTERS - 1.0)
    grade = tl.floor(x / scale[None, :] - center[None, :] / 2 + 0.5)
    return center, tl.minimum(tl.maximum(grade, -8.0), 7.0)


@triton.jit
def _fit(x, valid, present, span, widest, scales, CLIP: tl.constexpr):
    """Frame, scale, codes 0..15 and widened residuals of x [tokens, channels]."""
    middle, full, finest = span
    x = tl.where(valid[:, None], x, middle[None, :])
    finest = tl.minimum(tl.maximum(tl.maximum(finest, widest - (FALLS - 1)), 0.0), 255.0)
    best_error = tl.full(middle.shape, float("inf"), tl.float32)
    best = tl.minimum(tl.maximum(full + 1, finest), widest)
    for step in tl.static_range(0, 7 if CLIP else 1):
        candidate = tl.minimum(tl.maximum(full + (1 - step), finest), widest)
        scale = tl.load(scales + candidate.to(tl.int32))
        center, grade = _grades(x, middle, scale)
        off = (grade + center[None, :] / 2) * scale[None, :] - x
        off = off * off
        error = tl.sum(tl.where(present[:, None], off * off, 0.0), 0)  # of fourth powers: sketch/encode.py
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best = tl.where(better, candidate, best)
    scale = tl.load(scales + best.to(tl.int32))
    center, grade = _grades(x, middle, scale)
    off = tl.abs((grade + center[None, :] / 2) * scale[None, :] - x)
    off += 4 * UNIT * (tl.abs(x) + ((tl.abs(center) / 2 + 8) * scale)[None, :])
    frame = center.to(tl.int32) * FALLS + (widest - best).to(tl.int32)
    return frame.to(tl.int16), scale, (grade + 8).to(tl.int32), tl.where(valid[:, None], off, 0.0)


@triton.jit
def _encode_kernel(
    k, v, table, k_page, k_head, k_token, k_dim, v_page, v_head, v_token, v_dim, table_stride, page_len,
    kv_start, kv_len, num_blocks, scales, weight, mean,
    key_codes, key_frame, key_scale, key_radius, radius_least, radius_unit,
    value_codes, value_frame, value_scale, value_error, value_spread,
    num_kv_heads, capacity,
    PAGED: tl.constexpr, VALUES: tl.constexpr, VALUE_CODES: tl.constexpr, FRAME: tl.constexpr, CLIP: tl.constexpr,
    L: tl.constexpr, HL: tl.constexpr, HLP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, SLICES: tl.constexpr,
    LONG: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid // num_kv_heads
    head = pid % num_kv_heads
    start = tl.load(kv_start + row)
    full = (tl.load(kv_len + row) - start) // L
    half = tl.arange(0, HALF)
    in_half = half < D // 2
    j = tl.arange(0, HLP)
    place = tl.arange(0, 2 * HLP)
    t = tl.where(place < HLP, place, place - HLP + HL)
    present = ((place & (HLP - 1)) < HL) & (t < L)
    # The slices of the head dimension a radius stands for: LONG of them hold SHORT + 1 channels, the rest SHORT.
    low_slice = tl.where(half < LONG * (SHORT + 1), half // (SHORT + 1), LONG + (half - LONG * (SHORT + 1)) // SHORT)
    upper = half + D // 2
    high_slice = tl.where(
        upper < LONG * (SHORT + 1), upper // (SHORT + 1), LONG + (upper - LONG * (SHORT + 1)) // SHORT
    )
    for b in range(tl.load(num_blocks + row) + tl.program_id(1), full, tl.num_programs(1)):
        token = start + b * L + t
        inside = present[:, None] & in_half[None, :]
        at = token_offset(
            table,
            row,
            head,
            tl.where(present, token, start + b * L),
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
        valid = (tl.min(fits, 1) > 0) & present
        block = pid.to(tl.int64) * capacity + b
        if VALUES:
            at = token_offset(
                table,
                row,
                head,
                tl.where(present, token, start + b * L),
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
                span_low = _span(v_low, valid)
                span_high = _span(v_high, valid)
                widest = _widest(span_low[1], span_low[2], span_high[1], span_high[2])
                tl.store(value_scale + block, widest.to(tl.int32).to(tl.uint8))
                frame, scale, grade_low, off = _fit(v_low, valid, present, span_low, widest, scales, CLIP)
                tl.store(value_frame + block * D + half, frame, mask=in_half)
                missed = tl.sum(tl.where(in_half[None, :], off * off, 0.0), 1)
                frame, scale, grade_high, off = _fit(v_high, valid, present, span_high, widest, scales, CLIP)
                tl.store(value_frame + block * D + upper, frame, mask=in_half)
                missed += tl.sum(tl.where(in_half[None, :], off * off, 0.0), 1)
                packed = (grade_low | (grade_high << 4)).to(tl.uint8)
                tl.store(value_codes + (block * L + t)[:, None] * (D // 2) + half[None, :], packed, mask=inside)
                tl.store(value_error + block, tl.sqrt(tl.max(missed, 0)) * NORM_INFLATION + 2.0**-60)
        else:
            tl.store(value_spread + block, float("inf"))

        span_low = _span(k_low, valid)
        span_high = _span(k_high, valid)
        widest = _widest(span_low[1], span_low[2], span_high[1], span_high[2])
        tl.store(key_scale + block, widest.to(tl.int32).to(tl.uint8))
        frame, scale, grade_low, off_low = _fit(k_low, valid, present, span_low, widest, scales, CLIP)
        tl.store(key_frame + block * D + half, frame, mask=in_half)
        w = tl.load(weight + pid * D + half, mask=in_half, other=1.0)
        u = tl.where(in_half, w * scale if FRAME == 1 else (w if FRAME == 0 else 1.0), 1.0)
        square_low = tl.where(in_half[None, :], off_low * off_low / u[None, :], 0.0)
        frame, scale, grade_high, off_high = _fit(k_high, valid, present, span_high, widest, scales, CLIP)
        tl.store(key_frame + block * D + upper, frame, mask=in_half)
        w = tl.load(weight + pid * D + upper, mask=in_half, other=1.0)
        u = tl.where(in_half, w * scale if FRAME == 1 else (w if FRAME == 0 else 1.0), 1.0)
        square_high = tl.where(in_half[None, :], off_high * off_high / u[None, :], 0.0)
        packed = (grade_low | (grade_high << 4)).to(tl.uint8)
        tl.store(key_codes + (block * L + t)[:, None] * (D // 2) + half[None, :], packed, mask=inside)
        for s in tl.static_range(SLICES):
            square = tl.sum(tl.where((low_slice == s)[None, :], square_low, 0.0), 1)
            square += tl.sum(tl.where((high_slice == s)[None, :], square_high, 0.0), 1)
            norm = tl.sqrt(square) * NORM_INFLATION  # whose other half covers what follows
            least = tl.min(tl.where(valid, norm, float("inf")), 0)
            least = tl.where((least < float("inf")) & (least >= 2.0**-100), least, 0.0)
            above = tl.where(valid, norm - least, 0.0)
            unit = tl.maximum(tl.max(above, 0) * ((1 + 2.0**-20) / (NO_BOUND - 1)), 2.0**-100)
            radius = tl.where(
                valid, tl.minimum(tl.ceil(above / unit), NO_BOUND - 1.0), tl.where(present, NO_BOUND, 0.0)
            )
            low, high = tl.split(tl.trans(tl.reshape(radius.to(tl.int32), (2, HLP))))
            tl.store(key_radius + (block * HL + j) * SLICES + s, (low | (high << 4)).to(tl.uint8), mask=j < HL)
            tl.store(radius_least + block * SLICES + s, least)
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
            sketch.key_codes, sketch.key_frame, sketch.key_scale, sketch.key_radius, sketch.radius_least, sketch.radius_unit,
            sketch.value_codes if coded else sketch.key_codes, sketch.value_frame if coded else sketch.key_frame,
            sketch.value_scale if coded else sketch.key_scale, sketch.value_error if coded else sketch.value_spread,
            sketch.value_spread, num_kv_heads, sketch.capacity,
            PAGED=block_table is not None, VALUES=values is not None, VALUE_CODES=coded,
            FRAME={"frame": 1, "diagonal": 0, "identity": 2}[config.metric], CLIP=config.clip,
            L=config.frame_len, HL=half_len(config.frame_len), HLP=triton.next_power_of_2(half_len(config.frame_len)), D=sketch.dims,
            HALF=triton.next_power_of_2(sketch.dims // 2), SLICES=sketch.num_slices, LONG=longer, SHORT=base,
            num_warps=8,
        )  # fmt: skip
    full = torch.div(kv_len - kv_start, config.frame_len, rounding_mode="floor").to(torch.int32)
    torch.maximum(sketch.num_blocks, full, out=sketch.num_blocks)
