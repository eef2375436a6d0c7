"""Rounding of an estimate whose query was rounded to float16 and summed on tensor cores; continues geometry/rounding.py.

With s a block's frame scale and p = fp16(q s), a kernel computes

    estimate = q . center - 8 sum(p) + sum(code p),    code in 0..15,    sketched score = q . center + sum((code - 8) q s).

Per channel |p - q s| <= (2^-11 + 2^-23) |q s| + 2^-25 (the product in float32, then float16, subnormals included), and |code - 8| <= 8.
Products code p are exact in float32; their sum on a tensor core is off by at most gamma(D + 2, TENSOR_UNIT) 15 |p|_1 (23: 8 sum(p) may be
summed there too). The other two
sums have 2 D + 4 float32 terms: gamma(2 D + 4) (|q center|_1 + 8 |p|_1), and three additions join the parts. Where p overflows the
estimate is not finite, and the key is exact.
"""

from louver.geometry.rounding import ABSOLUTE, SAFETY, UNIT, gamma

TENSOR_UNIT = (
    2.0**-22
)  # assumed of a tensor core's float32 accumulation, which no vendor publishes; the gpu tests probe it


def rounded_query_slack(head_dim: int) -> tuple[float, float, float]:
    """Factors (scaled, centered, fixed): |score - estimate| <= scaled |q s|_1 + centered |q center|_1 + fixed."""
    wide, narrow = gamma(head_dim + 2, TENSOR_UNIT), gamma(2 * head_dim + 4)
    scaled = 8 * (2.0**-11 + 2.0**-23) + 1.002 * (23 * wide + 8 * narrow + 96 * UNIT)
    fixed = head_dim * 2.0**-25 * (8 + 23 * wide + 8 * narrow + 1) + ABSOLUTE
    return SAFETY * scaled, SAFETY * (narrow + 4 * UNIT), SAFETY * fixed
