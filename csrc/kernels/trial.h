// Cuts tried before anything is read for them: what a step under them would certify, and read, from the ends of every
// sketched key's weight. Nothing proven rests on it; the step that follows has a certificate of its own.
#pragma once

#include "kernels/joint.h"

namespace louver::LOUVER_ISA {

// What one thread's keys add to one head's certificate, as its joint maximum sees it (joint.h).
struct TrialSums {
    double numerator, total;  // over sketched keys, at the ends of their weights
    double missed;            // weight times |v - value used|
    double promoted;          // weight of the keys that would be exact, and are not yet
};

struct TrialCounts {
    int64_t exact, coarse, value_blocks;  // keys of closed blocks, decided ones among the exact; and blocks
};

// What the threads of a unit share besides the unit itself.
struct Trials {
    float *weight, *ceiling;          // [group, stride]: the ends; 0 of keys that are exact already
    float *away, *allowed;            // [group]: |mean - output|, and the certificate asked for
    float *cut, *live, *aim, *ratio;  // [group]: the cuts tried, what they aimed at, what they would certify
    float *best_cut, *best_live;      // [group]: the cheapest that would do
    double* whole;                    // [group]: about the weight of all keys
    TrialSums* sums;                  // [size, group]
    TrialCounts* counts;              // [size]
};

// Zeros for what became exact.
inline void clear_ends(Unit& unit, const Trials& trials) {
    const int64_t group = unit.group.size, frame_len = unit.sketch->frame_len;
    const int64_t begin = unit.blocks.begin * frame_len, end = unit.blocks.end * frame_len;
    for (int64_t i = begin; i < end; i += kLanes) {
        Ints exact = {};
        for (int64_t g = 0; g < group; ++g) exact |= load<Floats>(unit.upper + g * unit.stride + i) >= unit.cut[g];
        exact &= first_lanes(end - i);
        if (bits(exact) == 0) continue;
        for (int64_t g = 0; g < group; ++g)
            for (float* ends : {trials.weight, trials.ceiling}) {
                float* to = ends + g * unit.stride + i;
                store_some(to, select(exact, splat(0), load<Floats>(to)), end - i);
            }
    }
}

// The weight of this thread's keys that are not exact, per head.
inline void sum_ends(Unit& unit, const Trials& trials) {
    const int64_t frame_len = unit.sketch->frame_len;
    const int64_t begin = unit.blocks.begin * frame_len, end = unit.blocks.end * frame_len;
    for (int64_t g = 0; g < unit.group.size; ++g) {
        Floats total = {};
        for (int64_t i = begin; i < end; i += kLanes) total += load_some(trials.weight + g * unit.stride + i, end - i);
        trials.sums[unit.rank * unit.group.size + g].promoted = static_cast<double>(sum(total));
    }
}

// One head's part of a block under the cuts tried. exact and live are masks per kLanes tokens.
inline void try_block(const Unit& unit, const Trials& trials, int64_t g, int64_t b, const Ints* exact,
                      const Ints* live) {
    const SketchView& sketch = *unit.sketch;
    const int64_t index = sketch.block(unit.row, unit.head, b), base = g * unit.stride + b * sketch.frame_len;
    const float spread = sketch.value_spread[index], error = sketch.value_error[index];
    const float distance = spread + trials.away[g], rate = trials.allowed[g];
    Floats numerator = {}, total = {}, missed = {}, promoted = {};
    for (int64_t token = 0, v = 0; token < sketch.frame_len; token += kLanes, ++v) {
        const Floats ceiling = load<Floats>(trials.ceiling + base + token);
        const Floats a = load<Floats>(trials.weight + base + token);
        const Ints open = (ceiling > 0.0f) & first_lanes(sketch.frame_len - token), sketched = open & ~exact[v];
        const Floats weight = as_float(as_int(a) & sketched), high = as_float(as_int(ceiling) & sketched);
        const Floats floor = a * (a * reciprocal_near(ceiling)) * kFloorFactor - kLeastWeight;
        const Floats low = select(sketched, max(floor, splat(0)), splat(0));
        const Floats up = (high - weight) * distance, down = (weight - low) * distance;
        const Ints rises = up - rate * high > down - rate * low;
        numerator += select(rises, up, down), total += select(rises, high, low);
        missed += weight * select(live[v], splat(error), splat(spread));
        promoted += as_float(as_int(a) & open & exact[v]);
    }
    alignas(16) float four[4];
    const Floats vectors[4] = {numerator, total, missed, promoted};
    sum4(vectors, four);
    TrialSums& sums = trials.sums[unit.rank * unit.group.size + g];
    sums.numerator += static_cast<double>(four[0]), sums.total += static_cast<double>(four[1]);
    sums.missed += static_cast<double>(four[2]), sums.promoted += static_cast<double>(four[3]);
}

// This thread's part of what the cuts tried would certify and read; by every step-th block.
inline void try_cuts(Unit& unit, const Trials& trials, int64_t step, Ints* exact, Ints* live) {
    const int64_t group = unit.group.size, frame_len = unit.sketch->frame_len;
    for (int64_t g = 0; g < group; ++g) trials.sums[unit.rank * group + g] = TrialSums{};
    TrialCounts counts = {};
    for (int64_t b = unit.blocks.begin; b < unit.blocks.end; b += step) {
        bool any = false;
        for (int64_t token = 0, v = 0; token < frame_len; token += kLanes, ++v) {
            Ints is_exact = {}, is_live = {};
            for (int64_t g = 0; g < group; ++g) {
                const Floats upper = load<Floats>(unit.upper + g * unit.stride + b * frame_len + token);
                is_exact |= upper >= trials.cut[g], is_live |= upper >= trials.live[g];
            }
            const Ints inside = first_lanes(frame_len - token);
            const uint32_t coarse = bits(inside & is_live & ~is_exact);
            counts.exact += __builtin_popcount(bits(inside & is_exact));
            counts.coarse += __builtin_popcount(coarse);
            any |= coarse != 0;
            exact[v] = is_exact, live[v] = is_live;
        }
        counts.value_blocks += any;
        for (int64_t g = 0; g < group; ++g) try_block(unit, trials, g, b, exact, live);
    }
    counts.exact *= step, counts.coarse *= step, counts.value_blocks *= step;
    trials.counts[unit.rank] = counts;
    const auto each = static_cast<double>(step);
    for (int64_t g = 0; g < group; ++g) {
        TrialSums& sums = trials.sums[unit.rank * group + g];
        sums.numerator *= each, sums.total *= each, sums.missed *= each, sums.promoted *= each;
    }
}

}  // namespace louver::LOUVER_ISA
