// Where precision is cheapest: what every key adds to a certificate, summed by its upper bound, and the cheapest pair
// of cuts whose remaining terms fit. Nothing proven rests on it.
#pragma once

#include "kernels/trial.h"

namespace louver::LOUVER_ISA {

constexpr int64_t kTermBins = 512;
constexpr float kTermNats = 24;      // below the highest bound; what is lower falls into the last bin
constexpr int64_t kTermKeys = 2048;  // a sample of about so many keys says enough

// What the keys of a bin add: surplus of their weights, the same times their values' spread, weight times the error of
// a sketched value, and times the spread; and how many they are.
struct Terms {
    float surplus, surplus_spread, error, spread, count;
};

// One head's terms, summed from an edge down (from it up: the keys). Edge i is the upper bound high - i * width.
struct TermSums {
    float high, width;
    double surplus[kTermBins + 1], coarse[kTermBins + 1], grown[kTermBins + 1];
    float above[kTermBins + 1];
    float edge(int64_t i) const { return i == kTermBins ? -kInfinity : high - static_cast<float>(i) * width; }
};

// Sum the terms of head g's keys that are not exact yet, whoever of the unit's threads they belong to.
inline void sum_terms(const Unit& unit, const Trials& trials, int64_t g, TermSums& to) {
    const SketchView& sketch = *unit.sketch;
    const float *upper = unit.upper + g * unit.stride, *ceilings = trials.ceiling + g * unit.stride,
                *weights = trials.weight + g * unit.stride;
    const int64_t frame_len = sketch.frame_len, step = unit.closed / kTermKeys > 1 ? unit.closed / kTermKeys : 1;
    Floats highest = splat(-kInfinity), lowest = splat(kInfinity);
    for (int64_t i = 0; i < unit.closed; i += kLanes) {
        const Floats x = load<Floats>(upper + i);
        const Ints open = (load<Floats>(ceilings + i) > 0.0f) & first_lanes(unit.closed - i);
        highest = max(highest, select(open, x, splat(-kInfinity))),
        lowest = min(lowest, select(open, x, splat(kInfinity)));
    }
    const float high = largest(highest), low = -largest(-lowest);
    const float range = std::fmin(high - low, kTermNats / unit.problem->softmax_scale);
    to.high = high, to.width = range > 0 ? range / kTermBins : 0;
    alignas(64) Terms bins[kTermBins] = {};
    const float inverse = range > 1e-30f ? kTermBins / range : 0.0f, each = static_cast<float>(step);
    for (int64_t b = 0, v = 0; b < unit.num_blocks; ++b) {
        const int64_t index = sketch.block(unit.row, unit.head, b), base = b * frame_len;
        const float spread = sketch.value_spread[index], error = sketch.value_error[index];
        for (int64_t token = 0; token < frame_len; token += kLanes, ++v) {
            if (v % step != 0) continue;
            const Floats ceiling = load<Floats>(ceilings + base + token), weight = load<Floats>(weights + base + token);
            const Ints open = (ceiling > 0.0f) & first_lanes(frame_len - token);
            if (bits(open) == 0) continue;
            const Floats at = (high - load<Floats>(upper + base + token)) * inverse;
            const Ints place =
                __builtin_convertvector(min(max(at, splat(0)), splat(static_cast<float>(kTermBins - 1))), Ints);
            const Floats w = weight * each, surplus = (ceiling - weight) * each;
            for (uint32_t todo = bits(open); todo != 0; todo &= todo - 1) {
                const int lane = __builtin_ctz(todo);
                Terms& bin = bins[place[lane]];
                bin.surplus += surplus[lane], bin.surplus_spread += surplus[lane] * spread;
                bin.error += w[lane] * error, bin.spread += w[lane] * spread;
                bin.count += each;
            }
        }
    }
    to.surplus[kTermBins] = to.coarse[kTermBins] = to.grown[kTermBins] = 0, to.above[0] = 0;
    for (int64_t i = kTermBins; i-- > 0;) {  // from below: one key may add infinity
        const float more = bins[i].spread - bins[i].error;
        to.surplus[i] = to.surplus[i + 1] + static_cast<double>(bins[i].surplus);
        to.coarse[i] = to.coarse[i + 1] + static_cast<double>(bins[i].surplus_spread + bins[i].error);
        to.grown[i] = to.grown[i + 1] + static_cast<double>(more > 0 ? more : 0.0f);
    }
    for (int64_t i = 0; i < kTermBins; ++i) to.above[i + 1] = to.above[i] + bins[i].count;
}

struct PairOfCuts {
    float exact, unread;
};

// Exact above edge i, coarse from i to edge j, unread below: with C(i) the coarse terms below i, and D(j) what the
// terms below j grow by when they are unread, C(i) + D(j) <= allowed is asked, at the least bytes.
inline PairOfCuts cheapest(const TermSums& terms, float away, double allowed, float exact_bytes, float coarse_bytes) {
    PairOfCuts best{-kInfinity, -kInfinity};
    float cost = terms.above[kTermBins] * exact_bytes;  // everything exact always does
    for (int64_t i = 0, j = kTermBins; i < kTermBins; ++i) {
        const double room = allowed - (terms.coarse[i] + static_cast<double>(away) * terms.surplus[i]);
        if (!(room >= 0)) continue;
        while (j > i && terms.grown[j - 1] <= room) --j;  // the further down i, the more room
        const int64_t read = j > i ? j : i;
        const float spent = terms.above[i] * (exact_bytes - coarse_bytes) + terms.above[read] * coarse_bytes;
        if (spent < cost) cost = spent, best = PairOfCuts{terms.edge(i), std::fmin(terms.edge(read), terms.edge(i))};
    }
    return best;
}

}  // namespace louver::LOUVER_ISA
