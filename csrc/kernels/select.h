// Thresholds by counting: how many values reach t, for a few t, instead of a sort or a scattered histogram. One count
// of 40,000 values is 2,500 comparisons of 16 lanes, about a microsecond.
#pragma once

#include <algorithm>

#include "kernels/simd.h"

namespace louver::LOUVER_ISA {

// Floats as integers of the same order (NaN apart).
LOUVER_INLINE int32_t order_of(float x) {
    const int32_t i = load<int32_t>(&x);
    return i < 0 ? static_cast<int32_t>(0x80000000u) - i : i;
}
LOUVER_INLINE float float_at(int32_t order) {
    const int32_t i = order < 0 ? static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(order)) : order;
    return load<float>(&i);
}

// Values x[0 .. n), readable up to whole vectors; step > 1 looks at every step-th vector only.
LOUVER_INLINE int64_t count_at_least(const float* x, int64_t n, float t, int64_t step = 1) {
    Ints total = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += step * kLanes) total -= load<Floats>(x + i) >= t;
    if (i < n) total -= (load<Floats>(x + i) >= t) & first_lanes(n - i);
    int64_t out = 0;
    for (int lane = 0; lane < kLanes; ++lane) out += total[lane];
    return out;
}

// The largest t for which reaches(t) holds, given that it holds for low and not above high; both in order_of's
// integers. With a tolerance, some t for which it holds, at most that many floats below the largest.
template <class Reaches>
LOUVER_INLINE float bisect(int32_t low, int32_t high, Reaches reaches, int64_t tolerance = 0) {
    while (static_cast<int64_t>(high) - low > tolerance) {
        const int32_t middle = static_cast<int32_t>((static_cast<int64_t>(low) + high + 1) >> 1);
        if (reaches(float_at(middle))) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return float_at(low);
}

struct Range {
    float low, high;
};

// The smallest and largest finite values.
inline Range finite_range(const float* x, int64_t n, int64_t step) {
    Floats low = splat(__builtin_inff()), high = splat(-__builtin_inff());
    for (int64_t i = 0; i + kLanes <= n; i += step * kLanes) {
        const Floats v = load<Floats>(x + i);
        const Ints finite = abs(v) < __builtin_inff();
        low = select(finite & (v < low), v, low), high = select(finite & (v > high), v, high);
    }
    return Range{-largest(-low), largest(high)};
}

// Some t near the largest for which reaches(t) holds, to a thousandth of the range.
template <class Reaches>
LOUVER_INLINE float halve(Range range, Reaches reaches) {
    if (!(range.low < range.high)) return range.low;
    for (int i = 0; i < 11; ++i) {
        const float middle = range.low + 0.5f * (range.high - range.low);
        (reaches(middle) ? range.low : range.high) = middle;
    }
    return range.low;
}

constexpr int64_t kSampleVectors = 96;

// Some t with at least need values at or above it, and not many more, by whole counts; where ties or huge ranges leave
// that without an end, halving the floats themselves does not. 0 < need <= n.
inline float threshold_by_counts(const float* x, int64_t n, int64_t need) {
    const int64_t enough = need + need / 32 + 4;
    int32_t least = order_of(-__builtin_inff()), most = order_of(__builtin_inff());  // need values reach `least` only
    Range range = finite_range(x, n, 1);
    for (int tries = 0; tries < 24 && range.low < range.high; ++tries) {
        const float middle = range.low + 0.5f * (range.high - range.low);
        const int64_t found = count_at_least(x, n, middle);
        if (found >= need && found <= enough) return middle;
        if (found >= need) {
            range.low = middle;
            if (order_of(middle) > least) least = order_of(middle);
        } else {
            range.high = middle;
            if (order_of(middle) - 1 < most) most = order_of(middle) - 1;
        }
    }
    return bisect(least, most, [&](float t) { return count_at_least(x, n, t) >= need; });
}

// The same, and -infinity where there are fewer values than need. A sample says which values can matter, and those
// alone are counted: packed has room for n + kLanes of them.
inline float threshold_for(const float* x, int64_t n, int64_t need, float* packed) {
    if (need > n) return -__builtin_inff();
    const int64_t step = n / (kSampleVectors * kLanes);
    if (step < 2) return threshold_by_counts(x, n, need);
    const Range range = finite_range(x, n, step);
    const double share = static_cast<double>(need) / static_cast<double>(step);
    const double target = share + 3 * std::sqrt(share) + 2;
    const float t =
        halve(range, [&](float at) { return static_cast<double>(count_at_least(x, n, at, step)) >= target; });
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
        const Floats v = load<Floats>(x + i);
        const uint32_t mask = bits((v >= t) & first_lanes(n - i));
        store_packed(packed + count, v, mask);
        count += __builtin_popcount(mask);
    }
    return count >= need ? threshold_by_counts(packed, count, need) : threshold_by_counts(x, n, need);
}

// The rank-th largest of x[0 .. n), which is left in another order; -infinity where there are fewer numbers among them.
inline float nth_largest(float* x, int64_t n, int64_t rank) {
    const float t = threshold_by_counts(x, n, rank);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
        const Floats v = load<Floats>(x + i);
        const uint32_t mask = bits((v >= t) & first_lanes(n - i));
        store_packed(x + count, v, mask);  // never beyond what was read
        count += __builtin_popcount(mask);
    }
    if (count < rank) return -__builtin_inff();
    for (int few = 0; few < 64; ++few) {  // the least of a few too many go, equal ones together
        Floats least = splat(__builtin_inff());
        for (int64_t i = 0; i < count; i += kLanes) {
            const Floats v = load<Floats>(x + i);
            least = min(select(first_lanes(count - i), v, least), least);
        }
        const float t = -largest(-least);
        int64_t left = 0;
        for (int64_t i = 0; i < count; i += kLanes) {
            const Floats v = load<Floats>(x + i);
            const uint32_t mask = bits((v > t) & first_lanes(count - i));
            store_packed(x + left, v, mask);
            left += __builtin_popcount(mask);
        }
        if (left < rank) return t;
        count = left;
    }
    std::nth_element(x, x + rank - 1, x + count, [](float a, float b) { return a > b; });
    return x[rank - 1];
}

}  // namespace louver::LOUVER_ISA
