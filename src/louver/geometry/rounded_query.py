"""Rounding of an estimate whose query was rounded to float16 and summed on tensor cores: docs/guarantee.md, 4.8.

With s a block's frame scale and p = fp16(q s), a kernel computes, for codes in 0..15,

    estimate = q . center - 8 sum(p) + sum(code p),    sketched score = q . center + sum((code - 8) q s).

Where p overflows the estimate is not finite, and the key is exact.
"""

from louver.geometry.rounding import ABSOLUTE, SAFETY, UNIT, gamma

# Assumed of a tensor core's float32 accumulation, which no vendor publishes; the gpu tests probe it.
TENSOR_UNIT = 2.0**-22
QUANTA = 32512  # 127 * 256: the largest integer whose high and low byte are both signed


def rounded_query_slack(head_dim: int) -> tuple[float, float, float]:
    """Factors (scaled, centered, fixed): |score - estimate| <= scaled |q s|_1 + centered |q center|_1 + fixed."""
    wide, narrow = gamma(head_dim + 2, TENSOR_UNIT), gamma(2 * head_dim + 6)
    scaled = 8 * (2.0**-11 + 2.0**-23) + 1.002 * (23 * wide + 8 * narrow + 96 * UNIT)
    fixed = head_dim * 2.0**-25 * (8 + 23 * wide + 8 * narrow + 1) + ABSOLUTE
    return SAFETY * scaled, SAFETY * (narrow + 4 * UNIT), SAFETY * fixed


def quantized_query_slack(head_dim: int) -> tuple[float, float, float]:
    """Factors (scaled, centered, fixed): |score - estimate| <= scaled max|q s| + centered |q center|_1 + fixed.

    The query is rounded to whole numbers, p = round(q s / step) with step = max|q s| / QUANTA, and multiplied with codes exactly:
    estimate = q . center + step sum((code - 8) p).
    """
    narrow = gamma(head_dim + 10)
    scaled = 8 * head_dim * (0.5 / QUANTA + 16 * UNIT)
    return SAFETY * scaled, SAFETY * (narrow + 4 * UNIT), SAFETY * (ABSOLUTE + head_dim * 2.0**-90)
