// From spilled upper bounds to the list of keys read in full.
#pragma once

#include "kernels/unit.h"

namespace louver::LOUVER_ISA {

enum class AlsoFind { nothing, left_out, top_estimate };

// Put this thread's keys on the list whose upper bound reaches cut for some head, unless it reached `before` already,
// and score them. In the same pass, per head: the sum of the ceilings of the keys below its cut (left_out, into
// unit.mass), or the largest estimate of the keys no head's cut is reached by (top_estimate, into the thread's
// extremes), in place of the largest of all.
template <AlsoFind kAlso>
inline void collect(Unit& unit, const float* cut, const float* before) {
    const int64_t group = unit.group.size, frame_len = unit.sketch->frame_len;
    const int64_t begin = unit.blocks.begin * frame_len, end = unit.blocks.end * frame_len;
    const float scale = unit.problem->softmax_scale;
    const int64_t from = unit.my_count();
    for (int64_t g = 0; g < group; ++g) unit.lanes[g] = splat(kAlso == AlsoFind::top_estimate ? -kInfinity : 0.0f);
    // Ceilings of what is left out, by two numbers a head.
    Floats *factor = unit.lanes + group, *offset = factor + group;
    bool fits = kAlso == AlsoFind::left_out;
    for (int64_t g = 0; g < group && fits; ++g) {
        const CeilingsUnder under(scale, unit.top[g]);
        factor[g] = splat(under.factor()), offset[g] = splat(under.offset());
        fits = under.fits();
    }
    for (int64_t i = begin; i < end; i += kLanes) {
        const Ints inside = first_lanes(end - i);
        Ints reached = {};
        for (int64_t g = 0; g < group; ++g) {
            const Floats upper = load<Floats>(unit.upper + g * unit.stride + i);
            const Ints above = upper >= cut[g];
            reached |= above;
            if (kAlso == AlsoFind::left_out) {
                const Floats mass =
                    fits ? CeilingsUnder::at(upper, factor[g], offset[g]) : exp_above((upper - unit.top[g]) * scale);
                unit.lanes[g] += select(inside & ~above, mass, splat(0));
            }
        }
        if (kAlso == AlsoFind::top_estimate) {
            const Ints sketched = inside & ~reached;
            for (int64_t g = 0; g < group; ++g) {
                const Floats estimate = load<Floats>(unit.estimate + g * unit.stride + i);
                unit.lanes[g] = max(unit.lanes[g], select(sketched, estimate, splat(-kInfinity)));
            }
        }
        uint32_t todo = bits(inside & reached);
        if (todo == 0) continue;  // most often
        Ints known = {};
        for (int64_t g = 0; g < group; ++g) {
            const Floats upper = load<Floats>(unit.upper + g * unit.stride + i);
            known |= upper == kInfinity;
            if (before != nullptr) known |= upper >= before[g];
        }
        for (todo &= ~bits(known); todo != 0; todo &= todo - 1) {
            add_token(unit, i + __builtin_ctz(todo));
            unit.keys.prefetch(i + __builtin_ctz(todo));
        }
    }
    for (int64_t g = 0; g < group; ++g) {
        if (kAlso == AlsoFind::left_out) unit.mass[g] = inflated_sum(unit.lanes[g], end - begin);
        if (kAlso == AlsoFind::top_estimate) unit.extreme(g).top = largest(unit.lanes[g]);
    }
    score_list(unit, from);
}

}  // namespace louver::LOUVER_ISA
