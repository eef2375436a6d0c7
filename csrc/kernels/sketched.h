// The sketched keys of a step that drops nothing, a block at a time: weights from their estimates, values from their
// codes or, where a head's bound is below live_above for all heads, the mean value.
#pragma once

#include <utility>

#include "kernels/coarse.h"
#include "kernels/unit.h"

namespace louver::LOUVER_ISA {

// Which keys of one block are sketched and whose values are read; found a block ahead, so that those are on their way.
struct FoundBlock {
    Ints *sketched, *unread;  // per kLanes tokens: not exact for any head; those of them live for none
    uint32_t* live;           // the others, a bit each
    const uint8_t** rows;     // [frame_len + 4], value codes of the live ones
    int64_t count;
};

struct CoarseScratch {
    FoundBlock found[2];  // of this block and the next
    int64_t stride;       // frame_len in whole vectors, and room for one more
    float* weight;        // [group, stride], weights of the live tokens
    uint8_t* rounded;     // [group, stride]
    int32_t* total;       // [group, dims]
};

inline void find_live(const Unit& unit, int64_t b, FoundBlock& found) {
    const SketchView& sketch = *unit.sketch;
    const int64_t group = unit.group.size, frame_len = sketch.frame_len, half = sketch.dims / 2, base = b * frame_len;
    const uint8_t* codes = sketch.value_codes + sketch.block(unit.row, unit.head, b) * frame_len * half;
    found.count = 0;
    for (int64_t token = 0, v = 0; token < frame_len; token += kLanes, ++v) {
        Ints exact = {}, live = {};
        for (int64_t g = 0; g < group; ++g) {
            const Floats upper = load<Floats>(unit.upper + g * unit.stride + base + token);
            exact |= upper >= unit.cut[g];  // decided keys too: theirs is +infinity
            live |= upper >= unit.live_above[g];
        }
        const Ints sketched = first_lanes(frame_len - token) & ~exact;
        found.sketched[v] = sketched, found.unread[v] = sketched & ~live, found.live[v] = bits(sketched & live);
        for (uint32_t todo = found.live[v]; todo != 0; todo &= todo - 1) {
            const uint8_t* row = codes + (token + __builtin_ctz(todo)) * half;
            prefetch_row(reinterpret_cast<const char*>(row), half);
            found.rows[found.count++] = row;
        }
    }
    for (int64_t i = found.count; i % 4 != 0; ++i) found.rows[i] = codes;  // weighed with zero
}

// A head's weights of a vector of sketched keys: what is used, how much more and how much less it can be. docs/
// guarantee.md, section 13: the bounds lie symmetrically about the estimate, so one growth serves both sides.
struct Weighed {
    Floats weight, growth, floor;  // in [floor, weight * growth], but for kLeastWeight
};
struct Weigher {
    float top, scale, slack;
    LOUVER_INLINE Weighed operator()(Floats upper, Floats estimate, Ints sketched) const {
        const Floats logit = (estimate - top) * scale;
        const Floats weight = select(sketched, exp_small(logit), splat(0));
        const Floats growth = growth_above(select(sketched, (upper - estimate) * scale + slack, splat(0)));
        const Floats floor = select(logit >= kLowestExponent, weight * reciprocal_below(growth), splat(0));
        return Weighed{weight, growth, floor};
    }
};

// Weights of block b's sketched keys for head g: those of live keys side by side into weight, the rest into the sums of
// what goes unread. Adds up floors and what the weights can be off by.
inline void weigh_block(Unit& unit, int64_t b, int64_t g, const FoundBlock& found, float* weight) {
    const SketchView& sketch = *unit.sketch;
    const double spread = static_cast<double>(sketch.value_spread[sketch.block(unit.row, unit.head, b)]);
    const double slack_of_sum = 1e-5 + static_cast<double>(lane_slack(sketch.frame_len));
    const Weigher weigh{unit.top[g], unit.problem->softmax_scale, unit.logit_slack[g]};
    const float* uppers = unit.upper + g * unit.stride + b * sketch.frame_len;
    const float* estimates = unit.estimate + g * unit.stride + b * sketch.frame_len;
    Floats surplus = {}, floors = {}, unread = {}, unread_ceilings = {};
    Ints any = {};
    for (int64_t token = 0, v = 0; token < sketch.frame_len; token += kLanes, ++v) {
        const Weighed each = weigh(load<Floats>(uppers + token), load<Floats>(estimates + token), found.sketched[v]);
        const Floats apart = select(found.unread[v], each.weight, splat(0));
        surplus += each.weight * each.growth - each.weight;
        floors += each.floor;
        unread += apart;
        unread_ceilings += select(found.unread[v], each.weight * each.growth, splat(0));
        any |= found.sketched[v];
        store_packed(weight, each.weight, found.live[v]);
        weight += __builtin_popcount(found.live[v]);
    }
    unit.unread_of[g] = 0;
    if (bits(any) == 0) return;
    Sums& sums = unit.sum_of(g);
    alignas(16) float four[4];
    const Floats vectors[4] = {surplus, floors, unread, unread_ceilings};
    sum4(vectors, four);
    const double off = static_cast<double>(four[0]) * (1 + slack_of_sum) +
                       static_cast<double>(sketch.frame_len) * static_cast<double>(kLeastWeight);
    const double left = static_cast<double>(four[2]);
    sums.surplus += off, sums.surplus_spread += off * spread;
    sums.floors += static_cast<double>(four[1]) * (1 - slack_of_sum);
    sums.unread += left, sums.total += left;
    sums.unread_ceilings += static_cast<double>(four[3]) * (1 + slack_of_sum);
    if (left > 0) sums.value_miss += left * spread;
    sums.size += left * static_cast<double>(unit.mean_norm);
    unit.unread_of[g] = four[2];
}

// The current block's value frame, decoded; returns at least the norm of any value it can hold.
inline float decode_value_frame(Unit& unit, int64_t index) {
    const SketchView& sketch = *unit.sketch;
    const int64_t dims = sketch.dims;
    Floats squares = {};
    for (int64_t d = 0; d < unit.group.padded; d += kLanes) {
        Bytes code = {};
        Shorts center = {};
        const int64_t n = dims - d < kLanes ? dims - d : kLanes;
        std::memcpy(&code, sketch.value_scale + index * dims + d, static_cast<size_t>(n));
        std::memcpy(&center, sketch.value_center + index * dims + d, static_cast<size_t>(2 * n));
        const Floats s = select(first_lanes(n), scales_of(code), splat(0)), z = from_half(center);
        const Floats reach = abs(z) + 8.0f * s;
        squares += reach * reach;
        store(unit.value_scale + d, s), store(unit.value_center + d, z);
    }
    return std::sqrt(sum(squares)) * kNormInflation;
}

// Head g's weights of the block's live keys as whole multiples of a 255th of the largest. The weights used are the
// rounded ones: what rounding moved is part of what they can be off by.
inline void round_weights(Unit& unit, int64_t b, int64_t g, int64_t count, float extent, float* weight,
                          uint8_t* rounded) {
    const SketchView& sketch = *unit.sketch;
    const int64_t index = sketch.block(unit.row, unit.head, b);
    const float slack_of_sum = lane_slack(sketch.frame_len);
    store(weight + count, splat(0));
    Floats tops = {}, misses = {}, wholes = {};
    for (int64_t i = 0; i < count; i += kLanes) tops = max(tops, load<Floats>(weight + i));
    const float top = largest(tops), step = top / 255, inverse = top > 1e-30f ? 255 / top : 0.0f;
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats w = load<Floats>(weight + i);
        const Ints r = round_to_int(w * inverse);
        const Floats whole = to_float(r);
        misses += abs(w - step * whole);
        wholes += whole;
        store_bytes(rounded + i, r);
    }
    const float missed = sum(misses), whole = sum(wholes), unread = unit.unread_of[g];
    const double moved = static_cast<double>(missed * (1 + slack_of_sum) + unread * slack_of_sum);
    Sums& sums = unit.sum_of(g);
    sums.surplus += moved;
    if (moved > 0) sums.surplus_spread += moved * static_cast<double>(sketch.value_spread[index]);
    const double used = static_cast<double>(step) * static_cast<double>(whole);
    unit.step_of[g] = step, unit.whole_of[g] = used;
    sums.total += used;
    if (used > 0) sums.value_miss += used * static_cast<double>(sketch.value_error[index]);
    sums.size += used * static_cast<double>(extent);
}

// Block b's sketched keys: those of live keys with values from their codes, the rest as the mean value.
inline void add_block(Unit& unit, int64_t b, const FoundBlock& found, CoarseScratch& scratch) {
    const SketchView& sketch = *unit.sketch;
    const int64_t group = unit.group.size, dims = sketch.dims, half = dims / 2, count = found.count;
    float extent = 0;
    if (count > 0) {
        unit.counts[unit.rank * kNumCounts + kCoarse] += count;
        unit.counts[unit.rank * kNumCounts + kValueBlocks] += 1;
        extent = decode_value_frame(unit, sketch.block(unit.row, unit.head, b));
    }
    for (int64_t g = 0; g < group; ++g) {
        float* weight = scratch.weight + g * scratch.stride;
        weigh_block(unit, b, g, found, weight);
        round_weights(unit, b, g, count, extent, weight, scratch.rounded + g * scratch.stride);
    }
    if (count == 0) return;
    add_codes(found.rows, count, half, scratch.rounded, scratch.stride, group, scratch.total);
    for (int64_t g = 0; g < group; ++g) {
        const float step = unit.step_of[g], whole = static_cast<float>(unit.whole_of[g]);
        float* out = unit.my_out() + g * unit.group.padded;
        const int32_t* total = scratch.total + g * dims;
        for (int64_t d = 0; d < unit.group.padded; d += kLanes) {
            const Floats coded = step * to_float(load<Ints>(total + d)) - 8 * whole;
            store(out + d, load<Floats>(out + d) + (load<Floats>(unit.value_scale + d) * coded +
                                                    load<Floats>(unit.value_center + d) * whole));
        }
    }
}

// All of this thread's sketched keys, above unit.live_above with their values.
inline void add_sketched(Unit& unit, CoarseScratch& scratch) {
    FoundBlock *now = &scratch.found[0], *next = &scratch.found[1];
    if (unit.blocks.begin < unit.blocks.end) find_live(unit, unit.blocks.begin, *now);
    for (int64_t b = unit.blocks.begin; b < unit.blocks.end; ++b) {
        if (b + 1 < unit.blocks.end) find_live(unit, b + 1, *next);
        add_block(unit, b, *now, scratch);
        std::swap(now, next);
    }
}

}  // namespace louver::LOUVER_ISA
