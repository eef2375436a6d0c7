// The joint maximum (kernels/reference/joint.py; docs/guarantee.md, 8 and 13): how far weights that lie in known
// intervals can pull an average, all of them together. For every rate r >= 0
//
//     (sum |w - a| d + e) / sum w  <=  r + max(F(r), 0) / sum floor,   F(r) = e + sum max over w of (|w - a| d - r w),
//
// whatever r is; Dinkelbach's iteration finds a good one.
#pragma once

#include "kernels/finish.h"
#include "kernels/sketched.h"

namespace louver::LOUVER_ISA {

constexpr int kDinkelbachSteps = 3;
constexpr float kFloorFactor = static_cast<float>(kReciprocalBelow) * (1 - 1e-5f);

// From bounds to the ends of weights, of this thread's keys that no head's cut is reached by; zeros for the others.
// weight and ceiling [group, stride] may be unit.estimate and unit.upper, once add_sketched is done with both.
inline void fill_ends(Unit& unit, float* weight, float* ceiling) {
    const int64_t group = unit.group.size, frame_len = unit.sketch->frame_len;
    const int64_t begin = unit.blocks.begin * frame_len, end = unit.blocks.end * frame_len;
    for (int64_t i = begin; i < end; i += kLanes) {
        Ints sketched = first_lanes(end - i);
        for (int64_t g = 0; g < group; ++g) sketched &= load<Floats>(unit.upper + g * unit.stride + i) < unit.cut[g];
        for (int64_t g = 0; g < group; ++g) {
            const int64_t at = g * unit.stride + i;
            Floats widest = {};
            const Weighed each = Weigher(unit, g).weigh<true>(load<Floats>(unit.upper + at),
                                                              load<Floats>(unit.estimate + at), sketched, widest);
            store_some(ceiling + at, select(sketched, each.weight * each.growth + kLeastWeight, splat(0)), end - i);
            store_some(weight + at, each.weight, end - i);
        }
    }
}

// Call body(low, high, up, down) for kLanes sketched keys at a time of head g: the ends of the weight, and what the
// numerator gains at the upper and at the lower one; after each block end_block(). Lanes without a sketched key hold
// zeros. False where a block's values may be anywhere.
template <class Body, class EndBlock>
inline bool over_sketched(const Unit& unit, int64_t g, float away, Body body, EndBlock end_block) {
    const SketchView& sketch = *unit.sketch;
    for (int64_t b = 0; b < unit.num_blocks; ++b) {
        const int64_t base = g * unit.stride + b * sketch.frame_len;
        const float distance = sketch.value_spread[sketch.block(unit.row, unit.head, b)] + away;
        Ints any = {};
        for (int64_t token = 0; token < sketch.frame_len; token += kLanes) {
            const Floats ceiling = load<Floats>(unit.upper + base + token),
                         a = load<Floats>(unit.estimate + base + token);
            const Ints sketched = first_lanes(sketch.frame_len - token) & (ceiling > 0.0f);
            any |= sketched;
            const Floats weight = select(sketched, a, splat(0)), high = select(sketched, ceiling, splat(0));
            // Bounds lie symmetrically about the estimate: ceiling / weight = weight / floor.
            const Floats floor = a * (a * reciprocal_near(ceiling)) * kFloorFactor - kLeastWeight;
            const Floats low = select(sketched, max(floor, splat(0)), splat(0));
            body(low, high, max(high - weight, splat(0)) * distance, max(weight - low, splat(0)) * distance);
        }
        if (!(distance < kInfinity) && bits(any) != 0) return false;
        end_block();
    }
    return true;
}

// At least the largest ratio for head g, from its sums over all threads, exact_floors of which are exact keys' floors;
// +infinity where nothing is known. rate: a guess, and how many steps to improve it by.
inline float joint_maximum(const Unit& unit, int64_t g, const Sums& sums, double exact_floors, float away,
                           float rate = 0, int steps = kDinkelbachSteps) {
    const double extra = (sums.value_miss + sums.moved_spread + sums.moved * static_cast<double>(away)) * (1 + 1e-5);
    const double exact = exact_floors * (1 - 1e-5), least = sums.floors * (1 - 1e-5);
    if (!(least > 0)) return kInfinity;
    for (int step = 0; step < steps; ++step) {
        Floats numerator = {}, total = {};
        const float r = rate;
        if (!over_sketched(
                unit, g, away,
                [&](Floats low, Floats high, Floats up, Floats down) LOUVER_ALWAYS_INLINE {
                    const Ints rises = up - r * high > down - r * low;
                    numerator += select(rises, up, down), total += select(rises, high, low);
                },
                [] {}))
            return kInfinity;
        rate = static_cast<float>((static_cast<double>(sum(numerator)) + extra) /
                                  (static_cast<double>(sum(total)) + exact));
        if (!(rate >= 0 && rate < kInfinity)) return kInfinity;
    }
    const double r = static_cast<double>(rate),
                 rounding = 1e-5 + static_cast<double>(lane_slack(unit.sketch->frame_len));
    double gain = extra - r * exact, size = 0;
    Floats gains = {}, sizes = {};
    over_sketched(
        unit, g, away,
        [&](Floats low, Floats high, Floats up, Floats down) LOUVER_ALWAYS_INLINE {
            gains += max(up - rate * high, down - rate * low);
            sizes += max(up, down) + rate * high;
        },
        [&] {
            gain += static_cast<double>(sum(gains)), size += static_cast<double>(sum(sizes));
            gains = sizes = splat(0);
        });
    const double excess = gain + rounding * size;
    const double bound = (r + (excess > 0 ? excess : 0) / least) * (1 + 1e-5);
    return excess == excess && bound == bound ? static_cast<float>(bound) : kInfinity;
}

// The smaller of the certificate a unit has and the joint maximum, for this thread's heads. unit.rescale holds the
// exact keys' floors.
inline void tighten_certificates(const Unit& unit) {
    unit.my_heads([&](int64_t g) {
        const int64_t index = unit.row * unit.problem->num_q_heads + unit.head * unit.group.size + g;
        float& certificate = unit.output->certificate[index];
        if (certificate == 0) return;
        Sums sums = {};
        for (int member = 0; member < unit.size; ++member) add(sums, unit.sums[member * unit.group.size + g]);
        const float joint = joint_maximum(unit, g, sums, unit.rescale[g], unit.away[g]);
        if (joint < certificate) certificate = joint;
    });
}

}  // namespace louver::LOUVER_ISA
