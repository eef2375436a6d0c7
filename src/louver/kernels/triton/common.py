"""What the kernels of a step share: the grid bounds are rounded to, and where a token lies.

A decode step never materialises its bounds. The scan rounds every upper bound *up* to a 16-bit code on a grid in logits,

    upper logit  <=  low + code / STEPS,        low = the mean logit of the block centers - BELOW nats,

one grid per query head. By Jensen's inequality a key below the grid weighs less than e^-BELOW of an average key, and a key above
it (ALWAYS) is attended exactly. Histograms, cuts and tiers are then integers, and every kernel of the step agrees on them.
"""

import triton
import triton.language as tl

STEPS = tl.constexpr(1024)  # codes per nat
BELOW = tl.constexpr(20.0)  # nats of the grid below the mean logit; the other 44 lie above
SIGNED = tl.constexpr(32768)  # codes are stored as int16, shifted by this
ALWAYS = tl.constexpr(65535)  # code of a key that is exact in any case
BIN_CODES = tl.constexpr(32)  # codes per histogram bin
BINS = tl.constexpr(2048)
RANK_BINS = tl.constexpr(1024)  # from the cut upwards
RANK_CODES = tl.constexpr(4)  # codes per bin of these
DECIDED = tl.constexpr(1 << 30)  # flag on a listed token that no threshold may reject
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UNIT = tl.constexpr(2.0**-24)

# Counters per row and KV head (int32).
COUNTERS = 8
LISTED, COARSE, VALUE_BLOCKS, SPREAD, RANKED, EXACT, WEIGHED, CROWDED = (tl.constexpr(i) for i in range(8))


@triton.jit
def token_offset(
    table, row, head, token, stride_page, stride_head, stride_token, table_stride, page_len, PAGED: tl.constexpr
):
    """Offset of a token's first channel: row `row` of a tensor, or a page of a paged cache."""
    token = token.to(tl.int64)
    if PAGED:
        page = tl.load(table + row * table_stride + token // page_len).to(tl.int64)
        token = token % page_len
    else:
        page = row.to(tl.int64)
    return page * stride_page + head.to(tl.int64) * stride_head + token * stride_token


@triton.jit
def nibble(words, PART: tl.constexpr):
    """Part 0..3 of int16 code words as float16, times 2^-24: a code is the significand of a subnormal, no conversion needed.

    Part p of word w is channel 2 w + p // 2 of the low (p even) or the high half of the head dimension.
    """
    if PART >= 2:
        words = words >> 8
    if PART % 2 == 1:
        words = words >> 4
    return (words & 15).to(tl.float16, bitcast=True)


@triton.jit
def frame_channels(frame, widest, scales, inside):
    """Centers in scales, and scales, of the channels of a frame that ``frame`` points at; ``widest``: its block's scale code."""
    packed = tl.load(frame, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + tl.maximum(widest - (packed & 63), 0), mask=inside, other=0.0)
    return (packed >> 6).to(tl.float32) * 0.5, scale


@triton.jit
def radius_codes(radius, block, t, s, L: tl.constexpr, SLICES: tl.constexpr):
    """Radius codes of a block's tokens t in slice s: those of the second half are high nibbles; 0 past the block's end."""
    half: tl.constexpr = (L + 1) // 2
    byte = tl.load(radius + (block * half + tl.where(t < half, t, t - half)) * SLICES + s, mask=t < L, other=0)
    return tl.where(t < half, byte & 15, byte >> 4).to(tl.int32)


@triton.jit
def take_turn():
    """Of a kernel that may start while its predecessor ends (launch_pdl): wait for all that came before, and let the next one start."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; // $0",
        "=r,~{memory}",
        [],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def exp(x):
    """e^x within four units in the last place."""
    return tl.exp2(x * LOG2E)
