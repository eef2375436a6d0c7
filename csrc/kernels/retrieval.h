// A retrieval step: every key that reaches the threshold, exactly, and a bound on the mass of the rest.
#pragma once

#include "kernels/collect.h"
#include "kernels/finish.h"

namespace louver::LOUVER_ISA {

// The rank-th largest floor (score less rounding) among the keys scored: no member of the true top can be below it.
inline float nth_floor(const Unit& unit, int64_t g, int64_t rank) {
    const float* scores = unit.scores + g * unit.stride;
    const float each = score_error(unit.group.padded) * unit.group.norm[g];
    int64_t scored = 0;
    unit.lists([&](int64_t begin, int64_t n) {
        for (int64_t i = 0; i < n; i += kLanes)
            store(unit.packed + scored + i,
                  load<Floats>(scores + begin + i) - (each * load<Floats>(unit.norms + begin + i) + kAbsolute));
        scored += n;
    });
    return nth_largest(unit.packed, scored, rank);
}

// Count what was scanned, add up the ceilings of scored keys that a head above whose tau they are leaves out, and take
// the keys no head keeps off the list. weigh(g, logit) is at least e^logit.
template <class Keep, class Weigh>
inline void settle_list(Unit& unit, const float* tau, Keep keep, Weigh weigh) {
    const int64_t group = unit.group.size, begin = unit.list_begin, end = begin + unit.my_count();
    const float scale = unit.problem->softmax_scale;
    int64_t* counts = unit.counts + unit.rank * kNumCounts;
    int64_t to = begin;
    for (int64_t g = 0; g < group; ++g) unit.lanes[g] = splat(0);
    for (int64_t at = begin; at < end; at += kLanes) {
        const Ints inside = first_lanes(end - at);
        Ints any = {};
        for (int64_t g = 0; g < group; ++g) {
            const Ints kept = inside & keep(g, at);
            any |= kept;
            const Floats upper = unit.uppers(g, at), score = load<Floats>(unit.scores + g * unit.stride + at);
            const Floats ceiling = min(score + unit.slacks(g, at), upper);  // upper where the score is NaN
            const Ints left_out = inside & ~kept & (upper >= tau[g]);
            unit.lanes[g] += select(left_out, weigh(g, (ceiling - unit.top[g]) * scale), splat(0));
            for (uint32_t todo = bits(kept); unit.output->exact_mask != nullptr && todo != 0; todo &= todo - 1)
                unit.mark_exact(g, unit.tokens[at + __builtin_ctz(todo)]);
        }
        counts[kScanned] +=
            __builtin_popcount(bits(inside & (load<Ints>(unit.tokens + at) < static_cast<int32_t>(unit.closed))));
        for (uint32_t todo = bits(any); todo != 0; todo &= todo - 1, ++to) {
            const int64_t from = at + __builtin_ctz(todo);
            counts[kExact] += unit.tokens[from] < unit.closed;
            unit.tokens[to] = unit.tokens[from], unit.norms[to] = unit.norms[from];
            for (int64_t g = 0; g < group; ++g) unit.scores[g * unit.stride + to] = unit.scores[g * unit.stride + from];
        }
    }
    unit.my_count() = to - begin;
    for (int64_t g = 0; g < group; ++g) unit.sum_of(g).left_out += inflated_sum(unit.lanes[g], end - begin);
}

// The best score of what each head keeps, into this thread's extremes: next to a key that another head had scored, all
// of it could vanish.
template <class Keep>
inline void find_best_kept(Unit& unit, Keep keep) {
    for (int64_t g = 0; g < unit.group.size; ++g) {
        Floats best = splat(-kInfinity);
        for (int64_t i = 0; i < unit.my_count(); i += kLanes) {
            const int64_t at = unit.list_begin + i;
            const Ints kept = keep(g, at) & first_lanes(unit.my_count() - i);
            best = max(best, select(kept, load<Floats>(unit.scores + g * unit.stride + at), splat(-kInfinity)));
        }
        unit.extreme(g).peak = largest(best);
    }
}

inline void retrieval_unit(Unit& unit, float* weights, float* value_norms) {
    const Rule& rule = *unit.rule;
    const int64_t group = unit.group.size;
    const float scale = unit.problem->softmax_scale;
    clear_sums(unit);
    scan_unit<false>(unit);
    unit.wait();
    const int64_t rank = keys_needed(rule, unit.length);
    float *fine = unit.cut, *tau = unit.tau;
    if (!rule.has_tau) {
        unit.my_heads([&](int64_t g) {
            // Decided keys are +infinity among the upper bounds and scored already.
            fine[g] = threshold_for(unit.upper + g * unit.stride, unit.closed, rank, unit.packed);
        });
        unit.wait();
        collect<AlsoFind::nothing>(unit, fine, nullptr);
        unit.wait();
        unit.my_heads([&](int64_t g) { tau[g] = nth_floor(unit, g, rank); });
        if (unit.scan.planes > 1) {
            // Many keys lie between the two: scoring the upper half of them first says which of the others need not be.
            unit.wait();
            unit.my_heads([&](int64_t g) {
                unit.before[g] = fine[g];
                if (tau[g] > -kInfinity && tau[g] < fine[g]) fine[g] = fine[g] + 0.5f * (tau[g] - fine[g]);
            });
            unit.wait();
            collect<AlsoFind::nothing>(unit, fine, unit.before);
            unit.wait();
            unit.my_heads([&](int64_t g) { tau[g] = std::fmax(tau[g], nth_floor(unit, g, rank)); });
        }
    } else {
        unit.my_heads([&](int64_t g) {
            tau[g] = rule.tau;
            const float best = over_members(unit, g, &Extremes::lower);
            if (rule.keep_best && best < tau[g]) tau[g] = best;
        });
    }
    unit.my_heads([&](int64_t g) {
        const float upper = over_members(unit, g, &Extremes::top), top = tau[g] < upper ? tau[g] : upper;
        unit.top[g] = top > -kInfinity && top < kInfinity ? top : 0.0f;
    });
    unit.wait();
    collect<AlsoFind::left_out>(unit, tau, rule.has_tau ? nullptr : fine);
    unit.wait();
    float* final_tau = unit.cut;  // fine is done with
    unit.my_heads(
        [&](int64_t g) { final_tau[g] = rule.has_tau ? tau[g] : std::fmax(tau[g], nth_floor(unit, g, rank)); });
    unit.wait();
    auto keep = [&](int64_t g, int64_t at) LOUVER_ALWAYS_INLINE {
        const Floats upper = unit.uppers(g, at), score = load<Floats>(unit.scores + g * unit.stride + at);
        return (upper == kInfinity) | ((upper >= tau[g]) & ~(score + unit.slacks(g, at) < final_tau[g]));
    };
    if (rule.has_tau) {  // a rank keeps the best key in any case
        find_best_kept(unit, keep);
        unit.wait();
    }
    unit.my_heads([&](int64_t g) {
        // Ceilings were summed in units of e^(scale tau); the output wants the best score kept.
        const float peak = over_members(unit, g, &Extremes::peak), before = unit.top[g];
        unit.top[g] = peak > -kInfinity ? peak : 0.0f;
        unit.rescale[g] = static_cast<double>(scale) * (static_cast<double>(before) - static_cast<double>(unit.top[g]));
    });
    unit.wait();
    settle_list(unit, tau, keep, [](int64_t, Floats logit) LOUVER_ALWAYS_INLINE { return exp_above(logit); });
    for (int64_t g = 0; g < group; ++g)
        if (unit.mass[g] > 0) unit.sum_of(g).left_out += unit.mass[g] * std::exp(unit.rescale[g] + 1e-4) + 1e-300;
    attend_list(unit, weights, value_norms, keep);
    unit.wait();
    if (unit.rank == 0) {
        for (int64_t g = 0; g < group; ++g) tau[g] = final_tau[g];
        finish_unit(unit);
    }
    unit.wait();
}

}  // namespace louver::LOUVER_ISA
