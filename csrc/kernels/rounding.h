// Rounding and exponentials with proven errors: the twin of src/louver/geometry/rounding.py, with what is special to
// these kernels. The proofs are in docs/guarantee.md, section "CPU backend".
#pragma once

#include <cmath>

#include "kernels/simd.h"

namespace louver::LOUVER_ISA {

constexpr float kUnit = 0x1p-24f;      // unit roundoff of float32
constexpr float kAbsolute = 0x1p-96f;  // covers underflow
constexpr float kSafety = 1.001f;      // covers the rounding of a slack's own computation
constexpr float kNormInflation = 1 + 1e-5f;
constexpr float kTinyNorm = 0x1p-57f;  // what squares may lose to underflow, per norm of up to 1,024 channels
constexpr float kInfinity = __builtin_inff();

LOUVER_INLINE float gamma(float n) { return n * kUnit / (1 - n * kUnit); }
// What n terms of one sign, added by kLanes lanes in float32, can be off by, relative to their sum.
LOUVER_INLINE float lane_slack(int64_t n) { return kSafety * gamma(static_cast<float>(n / kLanes + 13)); }
LOUVER_INLINE double inflated_sum(Floats lanes, int64_t n) {
    return static_cast<double>(sum(lanes)) * (1 + static_cast<double>(lane_slack(n)));
}
LOUVER_INLINE float logit_slack(float magnitude) { return 5 * kUnit * magnitude + 0x1p-21f; }

LOUVER_INLINE float unit_of(DType dtype) {
    return dtype == DType::float32 ? kUnit : dtype == DType::float16 ? 0x1p-11f : 0x1p-8f;
}

constexpr float kLowestExponent =
    -87.0f;  // e^x below this counts as zero (in a lower bound) or as e^-87 (in an upper one)
constexpr float kLeastWeight = 0x1p-124f;  // above what exp2_of_weight returns of anything lower

// e^(x - n ln 2) for n the whole number nearest to x log2 e.
LOUVER_INLINE Floats exp_of_rest(Floats x, Floats n) {
    Floats r = x - n * 0x1.62e4p-1f;  // ln 2 in two parts, n * the first is exact
    r = r + n * -1.4286068203094172e-6f;
    Floats p = splat(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p;
}

// e^x within 2^-21 relative for -87 <= x <= 88; e^-87 below, +inf above 89. NaN stays NaN.
LOUVER_INLINE Floats exp(Floats x) {
#if defined(__AVX512F__)
    // max and min return their second argument where one is NaN.
    const __m512 y = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(kLowestExponent), (__m512)x));
    const Floats clamped = (Floats)y;
    const Floats n = (Floats)_mm512_roundscale_ps((__m512)(clamped * 1.44269504088896341f), 0);
#else
    const Floats clamped = x < kLowestExponent ? splat(kLowestExponent) : x > 88.0f ? splat(88.0f) : x;
    const Ints whole = round_to_int(clamped * 1.44269504088896341f);
    const Floats n = to_float(whole);
#endif
#if defined(__AVX512F__)
    return (Floats)_mm512_scalef_ps((__m512)exp_of_rest(clamped, n), (__m512)n);
#else
    const Floats y = as_float(as_int(exp_of_rest(clamped, n)) + (whole << 23));
    return x > 88.0f ? splat(kInfinity) : x == x ? y : x;
#endif
}

// An upper bound on e^x, at most 6.2% above it, in four instructions: 2^(i + f) <= 2^i (1 + f) for 0 <= f < 1, and the
// right-hand side is the float with exponent i and mantissa f. x above 88 gives +inf.
LOUVER_INLINE Floats exp_above(Floats x) {
    // 2^23 (x log2 e + 127), plus a margin for the rounding of the product, the sum and the conversion.
    const Floats clamped = max(x, splat(kLowestExponent));
    const Floats scaled = clamped * 12102203.161561485f + 1065353216.0f + 256.0f;
    return x > 88.0f ? splat(kInfinity) : as_float(__builtin_convertvector(scaled, Ints));
}

// Upper bounds on e^(scale (x - top)) for x <= top, as exp_above has them, in half of the instructions: product,
// difference and conversion are one multiplication and one addition. Proof: docs/guarantee.md, section 13.
class CeilingsUnder {
  public:
    CeilingsUnder(float scale, float top) {
        const double factor = static_cast<double>(static_cast<float>(static_cast<double>(scale) * 12102203.161561485));
        const double shift = factor * static_cast<double>(top), size = std::fabs(shift);
        factor_ = static_cast<float>(factor);
        offset_ = static_cast<float>(1065353216.0 + 256.0 + size * 0x1p-22 - shift);
        fits_ = size < 0x1p36;
    }
    float factor() const { return factor_; }
    float offset() const { return offset_; }
    // False: the margin would be too wide.
    bool fits() const { return fits_; }
    static LOUVER_INLINE Floats at(Floats x, Floats factor, Floats offset) {
        constexpr float kLeast = kLowestExponent * 12102203.161561485f + 1065353216.0f + 256.0f;
        return as_float(__builtin_convertvector(max(x * factor + offset, splat(kLeast)), Ints));
    }

  private:
    float factor_, offset_;
    bool fits_;
};

// 2^x within 2^-18 relative for -125 <= x <= 127; 2^-125 or so below. For weights, whose bounds pay for it.
LOUVER_INLINE Floats exp2_of_weight(Floats x) {
    const Floats clamped = max(x, splat(-125.0f)), shifted = clamped + 12582912.0f;  // 1.5 * 2^23: to a whole number
    const Floats f = clamped - (shifted - 12582912.0f);
    Floats p = f * 0x1.3997d6p-7f + 0x1.ca1440p-5f;  // the best of degree 4 on [-1/2, 1/2], 2^-18.4 off at most
    p = p * f + 0x1.ec06dap-3f;
    p = p * f + 0x1.62e0dcp-1f;
    p = p * f + 0x1.ffffe8p-1f;
    return as_float((Ints)((UInts)as_int(p) + ((UInts)as_int(shifted) << 23)));  // words that may wrap
}

// At least e^(4x) and at most 1.3% above it for 0 <= x <= 1, but for 2^-19 of rounding: (e^x)^4, and
// sum_{k >= 3} x^k / k! <= (e - 5/2) x^3.
LOUVER_INLINE Floats growth_above(Floats x) {
    Floats p = x * 0.21829f + 0.5f;
    p = p * x + 1.0f;
    p = p * x + 1.0f;
    p = p * p;
    return p * p;
}

LOUVER_INLINE float exp1(float x) { return exp(splat(x))[0]; }

}  // namespace louver::LOUVER_ISA
