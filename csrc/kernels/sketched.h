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
    int32_t* row;             // [stride], places in the block's value codes of the live ones, in bytes
    const uint8_t* codes;     // the block's
    int64_t count;
    bool none;  // no key is sketched
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
    found.codes = sketch.value_codes + sketch.block(unit.row, unit.head, b) * frame_len * half;
    const Ints lane_rows = load<Ints>(kLaneNumbers) * static_cast<int32_t>(half);
    int64_t count = 0;
    Ints any = {};
    for (int64_t token = 0, v = 0; token < frame_len; token += kLanes, ++v) {
        Ints exact = {}, live = {};
        for (int64_t g = 0; g < group; ++g) {
            const Floats upper = load<Floats>(unit.upper + g * unit.stride + base + token);
            exact |= upper >= unit.cut[g];  // decided keys too: theirs is +infinity
            live |= upper >= unit.live_above[g];
        }
        const Ints sketched = first_lanes(frame_len - token) & ~exact;
        const uint32_t mask = bits(sketched & live);
        any |= sketched;
        found.sketched[v] = sketched, found.unread[v] = sketched & ~live, found.live[v] = mask;
        store_packed(found.row + count, lane_rows + static_cast<int32_t>(token * half), mask);
        count += __builtin_popcount(mask);
    }
    for (int64_t i = count; i % 8 != 0; ++i) found.row[i] = 0;  // weighed with zero
    found.count = count, found.none = bits(any) == 0;
}

// A head's weights of a vector of sketched keys. The bounds lie symmetrically about the estimate, so one growth serves
// both sides: the real weight lies between weight / growth and weight * growth (docs/guarantee.md, section 13).
struct Weighed {
    Floats weight, growth;  // 0 and 1 for keys that are not sketched
};
struct Weigher {
    float to_powers, of_top, quarter_scale, slack;
    Weigher(const Unit& unit, int64_t g)
        : to_powers(unit.problem->softmax_scale * 1.44269504088896341f),
          of_top(unit.top[g] * to_powers),
          quarter_scale(0.25f * unit.problem->softmax_scale),
          slack(0.25f * unit.logit_slack[g]) {}
    // kWide: any growth; else that of lanes with more than 1 in widest, above e^4, means nothing.
    template <bool kWide>
    LOUVER_INLINE Weighed weigh(Floats upper, Floats estimate, Ints sketched, Floats& widest) const {
        const Floats power = estimate * to_powers - of_top;
        const Floats x = as_float(as_int((upper - estimate) * quarter_scale + slack) & sketched);
        widest = max(widest, x);
        Floats growth = growth_above(x);
        if (kWide) growth = select(x > 1.0f, exp(4 * x), growth);
        return Weighed{as_float(as_int(exp2_of_weight(power)) & sketched), growth};
    }
};

// What a block's sketched keys of one head add up to.
struct BlockSums {
    Floats surplus, floors, unread, unread_ceilings;
};

// Weights of a block's sketched keys for one head, those of live keys side by side into weight. False where a bound
// was too wide for kWide = false.
template <bool kWide>
LOUVER_INLINE bool weigh_keys(const Weigher& weigher, const float* uppers, const float* estimates,
                              const FoundBlock& found, int64_t frame_len, float* weight, BlockSums& sums) {
    Floats surplus = {}, floors = {}, unread = {}, unread_ceilings = {}, widest = {};
    for (int64_t token = 0, v = 0; token < frame_len; token += kLanes, ++v) {
        const Weighed each = weigher.weigh<kWide>(load<Floats>(uppers + token), load<Floats>(estimates + token),
                                                  found.sketched[v], widest);
        surplus += each.weight * (each.growth - 1.0f);
        floors += each.weight * reciprocal_near(each.growth);
        const Floats left = as_float(as_int(each.weight) & found.unread[v]);
        unread += left;
        unread_ceilings += left * each.growth;
        store_packed(weight, each.weight, found.live[v]);
        weight += __builtin_popcount(found.live[v]);
    }
    sums = BlockSums{surplus, floors, unread, unread_ceilings};
    return kWide || bits(widest > 1.0f) == 0;
}

// The same of block b for head g, added to the thread's sums: what the weights can be off by, floors, and what is
// unread.
inline void weigh_block(Unit& unit, int64_t b, int64_t g, const FoundBlock& found, float* weight) {
    const SketchView& sketch = *unit.sketch;
    const double spread = static_cast<double>(sketch.value_spread[sketch.block(unit.row, unit.head, b)]);
    const double slack_of_sum = 1e-5 + static_cast<double>(lane_slack(sketch.frame_len));
    const double least = static_cast<double>(sketch.frame_len) * static_cast<double>(kLeastWeight);
    const Weigher weigher(unit, g);
    const float* uppers = unit.upper + g * unit.stride + b * sketch.frame_len;
    const float* estimates = unit.estimate + g * unit.stride + b * sketch.frame_len;
    BlockSums block;
    if (!weigh_keys<false>(weigher, uppers, estimates, found, sketch.frame_len, weight, block))
        weigh_keys<true>(weigher, uppers, estimates, found, sketch.frame_len, weight, block);
    alignas(16) float four[4];
    const Floats vectors[4] = {block.surplus, block.floors, block.unread, block.unread_ceilings};
    sum4(vectors, four);
    unit.unread_of[g] = four[2];
    if (found.none) return;
    Sums& sums = unit.sum_of(g);
    const double off = static_cast<double>(four[0]) * (1 + slack_of_sum) + least;
    const double floors = static_cast<double>(four[1]) * kReciprocalBelow * (1 - slack_of_sum) - least;
    const double left = static_cast<double>(four[2]);
    sums.surplus += off, sums.surplus_spread += off * spread;
    sums.floors += floors > 0 ? floors : 0;
    sums.unread += left, sums.total += left;
    sums.unread_ceilings += static_cast<double>(four[3]) * (1 + slack_of_sum);
    if (left > 0) sums.value_miss += left * spread;
    sums.size += left * static_cast<double>(unit.mean_norm);
}

// The current block's value frame, decoded; returns at least the norm of any value it can hold.
inline float decode_value_frame(Unit& unit, int64_t index) {
    const SketchView& sketch = *unit.sketch;
    const int64_t dims = sketch.dims;
    Floats squares = {};
    const int16_t* frame = sketch.value_frame + index * dims;
    for (int64_t d = 0; d < unit.group.padded; d += kLanes) {
        const FrameLanes lanes = frame_lanes(frame + d, sketch.value_scale[index], dims - d);
        const Floats center = 0.5f * lanes.center, reach = (abs(center) + 8.0f) * lanes.scale;
        squares += reach * reach;
        store(unit.value_scale + d, lanes.scale), store(unit.value_center + d, center);
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
    sums.moved += moved;
    if (moved > 0) sums.moved_spread += moved * static_cast<double>(sketch.value_spread[index]);
    const double used = static_cast<double>(step) * static_cast<double>(whole);
    unit.step_of[g] = step, unit.whole_of[g] = used;
    sums.total += used;
    if (used > 0) sums.value_miss += used * static_cast<double>(sketch.value_error[index]);
    sums.size += used * static_cast<double>(extent);
}

// Touch part `g` of `parts` of a block's live rows: all at once they would wait for each other.
inline void touch_live(const FoundBlock& found, int64_t half, int64_t g, int64_t parts) {
    for (int64_t i = found.count * g / parts; i < found.count * (g + 1) / parts; ++i)
        prefetch_row(reinterpret_cast<const char*>(found.codes + found.row[i]), half);
}

// Block b's sketched keys: those of live keys with values from their codes, the rest as the mean value. The next
// block's live rows are touched meanwhile.
inline void add_block(Unit& unit, int64_t b, const FoundBlock& found, const FoundBlock& next, CoarseScratch& scratch) {
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
        touch_live(next, half, g, group);
        weigh_block(unit, b, g, found, weight);
        round_weights(unit, b, g, count, extent, weight, scratch.rounded + g * scratch.stride);
    }
    if (count == 0) return;
    add_codes(found.codes, found.row, count, half, scratch.rounded, scratch.stride, group, scratch.total);
    for (int64_t g = 0; g < group; ++g) {
        const float step = unit.step_of[g], whole = static_cast<float>(unit.whole_of[g]);
        float* out = unit.my_out() + g * unit.group.padded;
        const int32_t* total = scratch.total + g * dims;
        for (int64_t d = 0; d < unit.group.padded; d += kLanes) {
            const Floats coded = step * to_float(load<Ints>(total + d)) - 8 * whole;
            store(out + d, load<Floats>(out + d) + load<Floats>(unit.value_scale + d) *
                                                       (coded + load<Floats>(unit.value_center + d) * whole));
        }
    }
}

// All of this thread's sketched keys, above unit.live_above with their values.
inline void add_sketched(Unit& unit, CoarseScratch& scratch) {
    FoundBlock *now = &scratch.found[0], *next = &scratch.found[1];
    next->count = 0;
    if (unit.blocks.begin < unit.blocks.end) find_live(unit, unit.blocks.begin, *now);
    for (int64_t b = unit.blocks.begin; b < unit.blocks.end; ++b) {
        if (b + 1 < unit.blocks.end) {
            find_live(unit, b + 1, *next);
        } else {
            next->count = 0;
        }
        add_block(unit, b, *now, *next, scratch);
        std::swap(now, next);
    }
}

}  // namespace louver::LOUVER_ISA
