// Rounding and exponentials with proven errors: the twin of src/louver/geometry/rounding.py, with what is special to
// these kernels. The proofs are in docs/guarantee.md, section "CPU backend".
#pragma once

#include "kernels/simd.h"

namespace louver::LOUVER_ISA {

constexpr float kUnit = 0x1p-24f;      // unit roundoff of float32
constexpr float kAbsolute = 0x1p-96f;  // covers underflow
constexpr float kSafety = 1.001f;      // covers the rounding of a slack's own computation
constexpr float kNormInflation = 1 + 1e-5f;
constexpr float kTinyNorm = 0x1p-57f;  // what squares may lose to underflow, per norm of up to 1,024 channels
constexpr float kInfinity = __builtin_inff();

LOUVER_INLINE float gamma(float n) { return n * kUnit / (1 - n * kUnit); }
LOUVER_INLINE float sum_inflation(float n) { return 1 + kSafety * gamma(n + 8); }
LOUVER_INLINE float logit_slack(float magnitude) { return 5 * kUnit * magnitude + 0x1p-21f; }

LOUVER_INLINE float unit_of(DType dtype) {
    return dtype == DType::float32 ? kUnit : dtype == DType::float16 ? 0x1p-11f : 0x1p-8f;
}

constexpr float kLowestExponent =
    -87.0f;  // e^x below this counts as zero (in a lower bound) or as e^-87 (in an upper one)

// e^x within 2^-21 relative for -87 <= x <= 88; e^-87 below, +inf above 89. NaN stays NaN.
LOUVER_INLINE f32x16 exp(f32x16 x) {
#if defined(__AVX512F__)
    // max and min return their second argument where one is NaN.
    const __m512 y = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(kLowestExponent), (__m512)x));
    const f32x16 clamped = (f32x16)y;
    const f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)(clamped * 1.44269504088896341f), 0);
#else
    const f32x16 clamped = x < kLowestExponent ? splat(kLowestExponent) : x > 88.0f ? splat(88.0f) : x;
    const f32x16 n = to_float(round_to_int(clamped * 1.44269504088896341f));
#endif
    f32x16 r = clamped - n * 0x1.62e4p-1f;  // ln 2 in two parts, n * the first is exact
    r = r + n * -1.4286068203094172e-6f;
    f32x16 p = splat(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const f32x16 y = as_float(as_int(p) + (round_to_int(n) << 23));
    return x > 88.0f ? splat(kInfinity) : x == x ? y : x;
#endif
}

// An upper bound on e^x, at most 6.2% above it, in four instructions: 2^(i + f) <= 2^i (1 + f) for 0 <= f < 1, and the
// right-hand side is the float with exponent i and mantissa f. x above 88 gives +inf.
LOUVER_INLINE f32x16 exp_above(f32x16 x) {
    // 2^23 (x log2 e + 127), plus a margin for the rounding of the product, the sum and the conversion.
    const f32x16 clamped = max(x, splat(kLowestExponent));
    const f32x16 scaled = clamped * 12102203.161561485f + 1065353216.0f + 256.0f;
    return x > 88.0f ? splat(kInfinity) : as_float(__builtin_convertvector(scaled, i32x16));
}

LOUVER_INLINE float exp1(float x) { return exp(splat(x))[0]; }

}  // namespace louver::LOUVER_ISA
