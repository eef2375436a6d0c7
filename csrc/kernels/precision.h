// A precision step: nothing is dropped. Keys above the cut are exact, the others keep their estimated weight with a
// sketched value, and those that provably share little mass with the head's mean value.
#pragma once

#include "kernels/coarse.h"
#include "kernels/collect.h"
#include "kernels/finish.h"

namespace louver::LOUVER_ISA {

// From bounds to weights, in place: unit.estimate becomes the weight, unit.upper the ceiling of each sketched key, zero
// for exact keys. Adds up floors and what the weights can be off by.
inline void weigh_unit(Unit& unit) {
    const SketchView& sketch = *unit.sketch;
    const int64_t group = unit.group.size;
    const float scale = unit.problem->softmax_scale;
    const double slack_of_sum = 1e-5 + static_cast<double>(lane_slack(sketch.frame_len));
    for (int64_t b = unit.blocks.begin; b < unit.blocks.end; ++b) {
        const int64_t base = b * sketch.frame_len;
        const double spread = static_cast<double>(sketch.value_spread[sketch.block(unit.row, unit.head, b)]);
        for (int64_t g = 0; g < 2 * group; ++g) unit.lanes[g] = splat(0);
        for (int64_t token = 0; token < sketch.frame_len; token += kLanes) {
            const int64_t at = base + token, count = sketch.frame_len - token;
            const Ints inside = first_lanes(count);
            Ints exact = {};
            for (int64_t g = 0; g < group; ++g) {
                const Floats upper = load<Floats>(unit.upper + g * unit.stride + at);
                exact |= upper >= unit.cut[g];  // decided keys too: theirs is +infinity
            }
            const Ints sketched = inside & ~exact;
            for (int64_t g = 0; g < group; ++g) {
                float* uppers = unit.upper + g * unit.stride + at;
                float* estimates = unit.estimate + g * unit.stride + at;
                const Floats upper = load<Floats>(uppers), estimate = load<Floats>(estimates);
                const float top = unit.top[g], slack = unit.logit_slack[g];
                const Floats logit = (estimate - top) * scale, above = (upper - top) * scale + slack;
                const Floats weight = select(sketched & (logit >= kLowestExponent), exp(logit), splat(0));
                const Floats most = exp(above), ceiling = select(sketched, most, splat(0));
                // The bounds lie symmetrically about the estimate: ceiling / weight = weight / floor.
                const Floats floor = select(sketched, weight * (weight * reciprocal_below(most)), splat(0));
                unit.lanes[2 * g] += max(ceiling - weight, weight - floor);  // how far the true weight can be
                unit.lanes[2 * g + 1] += floor;
                store_some(uppers, ceiling, count);
                store_some(estimates, weight, count);
            }
        }
        for (int64_t g = 0; g < group; ++g) {
            const double surplus = static_cast<double>(sum(unit.lanes[2 * g])) * (1 + slack_of_sum);
            Sums& sums = unit.sum_of(g);
            sums.surplus += surplus;
            if (surplus > 0) sums.surplus_spread += surplus * spread;
            sums.floors += static_cast<double>(sum(unit.lanes[2 * g + 1])) * (1 - slack_of_sum);
        }
    }
}

struct CoarseScratch {
    const uint8_t** rows;  // [frame_len]
    uint32_t* live;        // per kLanes tokens, a bit for each whose value is read
    int64_t stride;        // frame_len in whole vectors
    float* weight;         // [stride + kLanes], a head's weights of the live tokens
    uint8_t* rounded;      // [group, stride]
    int32_t* total;        // [group, dims]
};

// The values of one block: those of live keys from their codes, the rest as the mean value.
inline void add_block(Unit& unit, int64_t b, const float* live_above, CoarseScratch& scratch) {
    const SketchView& sketch = *unit.sketch;
    const int64_t group = unit.group.size, frame_len = sketch.frame_len, dims = sketch.dims, half = dims / 2;
    const int64_t base = b * frame_len, index = sketch.block(unit.row, unit.head, b);
    const uint8_t* codes = sketch.value_codes + index * frame_len * half;
    const float slack_of_sum = lane_slack(frame_len);
    int64_t count = 0;
    for (int64_t g = 0; g < group; ++g) unit.lanes[g] = splat(0);
    for (int64_t token = 0; token < frame_len; token += kLanes) {
        const Ints inside = first_lanes(frame_len - token);
        Ints live = {};
        for (int64_t g = 0; g < group; ++g)
            live |= load<Floats>(unit.upper + g * unit.stride + base + token) >= live_above[g];
        for (int64_t g = 0; g < group; ++g)
            unit.lanes[g] +=
                select(inside & ~live, load<Floats>(unit.estimate + g * unit.stride + base + token), splat(0));
        scratch.live[token / kLanes] = bits(live & inside);
        for (uint32_t todo = scratch.live[token / kLanes]; todo != 0; todo &= todo - 1)
            scratch.rows[count++] = codes + (token + __builtin_ctz(todo)) * half;
    }
    for (int64_t i = count; i % 4 != 0; ++i) scratch.rows[i] = codes;  // weighed with zero
    const double spread = static_cast<double>(sketch.value_spread[index]),
                 error = static_cast<double>(sketch.value_error[index]);
    float extent = 0;
    if (count > 0) {
        unit.counts[unit.rank * kNumCounts + kCoarse] += count;
        unit.counts[unit.rank * kNumCounts + kValueBlocks] += 1;
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
        extent = sum(squares);
        extent = std::sqrt(extent) * kNormInflation;
    }
    for (int64_t g = 0; g < group; ++g) {
        const float* weights = unit.estimate + g * unit.stride + base;
        Sums& sums = unit.sum_of(g);
        Floats tops = {};
        int64_t packed = 0;
        for (int64_t token = 0; token < frame_len && packed < count; token += kLanes) {
            store_packed(scratch.weight + packed, load<Floats>(weights + token), scratch.live[token / kLanes]);
            packed += __builtin_popcount(scratch.live[token / kLanes]);
        }
        store(scratch.weight + count, splat(0));
        for (int64_t i = 0; i < count; i += kLanes) tops = max(tops, load<Floats>(scratch.weight + i));
        const float top = largest(tops), unread = sum(unit.lanes[g]);
        sums.unread += static_cast<double>(unread);
        sums.total += static_cast<double>(unread);
        if (unread > 0) sums.value_miss += static_cast<double>(unread) * spread;
        sums.size += static_cast<double>(unread) * static_cast<double>(unit.mean_norm);
        const float step = top / 255, inverse = top > 1e-30f ? 255 / top : 0.0f;
        Floats misses = {}, wholes = {};
        for (int64_t i = 0; i < count; i += kLanes) {
            const Floats w = load<Floats>(scratch.weight + i);
            const Ints r = round_to_int(w * inverse);
            misses += abs(w - step * to_float(r));
            wholes += to_float(r);
            store_bytes(scratch.rounded + g * scratch.stride + i, r);
        }
        const float missed = sum(misses), whole = sum(wholes);
        unit.step_of[g] = step;
        unit.whole_of[g] = static_cast<double>(step) * static_cast<double>(whole);
        // The weights used are the rounded ones: what rounding moved is part of what they can be off by.
        const double moved = static_cast<double>(missed * (1 + slack_of_sum) + unread * slack_of_sum);
        sums.surplus += moved;
        if (moved > 0) sums.surplus_spread += moved * spread;
        sums.total += unit.whole_of[g];
        if (unit.whole_of[g] > 0) sums.value_miss += unit.whole_of[g] * error;
        sums.size += unit.whole_of[g] * static_cast<double>(extent);
    }
    if (count == 0) return;
    add_codes(scratch.rows, count, half, scratch.rounded, scratch.stride, group, scratch.total);
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

inline void precision_unit(Unit& unit, float* weights, float* value_norms, CoarseScratch& scratch) {
    const Rule& rule = *unit.rule;
    const int64_t group = unit.group.size;
    const float scale = unit.problem->softmax_scale;
    clear_sums(unit);
    scan_unit<true>(unit);
    unit.wait();
    const int64_t need = keys_needed(rule, unit.length);
    int64_t decided = 0;
    unit.lists([&](int64_t, int64_t n) { decided += n; });
    decided -= unit.length - unit.closed;
    unit.my_heads(
        [&](int64_t g) { unit.cut[g] = threshold_for(unit.upper + g * unit.stride, unit.closed, need + decided); });
    unit.wait();
    collect<AlsoFind::top_estimate>(unit, unit.cut, nullptr);
    unit.wait();
    if (rule.keep_best) {
        // The key with the best score has an upper bound no floor exceeds: with some scored, the cut can follow the
        // best floor.
        unit.my_heads([&](int64_t g) {
            const float best = over_members(unit, g, &Extremes::lower);
            unit.before[g] = unit.cut[g];
            if (best < unit.cut[g]) unit.cut[g] = best;
        });
        unit.wait();
        bool lowered = false;  // the same for every thread
        for (int64_t g = 0; g < group; ++g) lowered |= unit.cut[g] < unit.before[g];
        if (lowered) collect<AlsoFind::top_estimate>(unit, unit.cut, unit.before);
        unit.wait();
    }
    unit.my_heads([&](int64_t g) {
        const float peak = over_members(unit, g, &Extremes::peak), upper = over_members(unit, g, &Extremes::top);
        const float top = peak > upper ? peak : upper, extent = over_members(unit, g, &Extremes::extent);
        unit.top[g] = top > -kInfinity ? top : 0.0f;
        // Beyond -87 and 88 nats of the top, weights and floors are zero and ceilings a constant or infinity.
        unit.logit_slack[g] = 2 * logit_slack(4 * scale * extent + 90);
        unit.tau[g] = unit.cut[g];
    });
    unit.wait();
    weigh_unit(unit);
    int64_t* counts = unit.counts + unit.rank * kNumCounts;
    auto keep = [](int64_t, int64_t) LOUVER_ALWAYS_INLINE { return ~Ints{}; };
    for (int64_t i = unit.list_begin; i < unit.list_begin + unit.my_count(); ++i) {
        if (unit.tokens[i] < unit.closed) counts[kScanned] += 1, counts[kExact] += 1;
        for (int64_t g = 0; g < group && unit.output->exact_mask != nullptr; ++g) unit.mark_exact(g, unit.tokens[i]);
    }
    attend_list(unit, weights, value_norms, keep);
    unit.wait();
    unit.my_heads([&](int64_t g) {
        double floors = 0;
        for (int m = 0; m < unit.size; ++m) floors += unit.sums[m * group + g].floors;
        unit.live_above[g] =
            unread_below(unit.upper + g * unit.stride, unit.closed, rule.unread_mass * floors * (1 - 1e-4));
    });
    unit.wait();
    for (int64_t b = unit.blocks.begin; b < unit.blocks.end; ++b) add_block(unit, b, unit.live_above, scratch);
    unit.wait();
    if (unit.rank == 0) finish_unit(unit, false);
    unit.wait();
}

}  // namespace louver::LOUVER_ISA
