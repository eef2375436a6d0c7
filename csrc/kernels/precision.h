// A precision step: nothing is dropped. Keys above the cut are exact, the others keep their estimated weight with a
// sketched value, and those that provably share little mass with the head's mean value.
#pragma once

#include "kernels/collect.h"
#include "kernels/finish.h"
#include "kernels/sketched.h"

namespace louver::LOUVER_ISA {

// An upper bound below which head g's keys weigh `share` of the least mass all keys have, by a sample of the blocks'
// keys: near enough for a guess, which add_sketched's own sums then check. exact_floors: the least mass of exact keys.
inline float guess_live(const Unit& unit, int64_t g, double share, double exact_floors) {
    constexpr int kSample = 192;
    Floats uppers[kSample], ceilings[kSample], floors = {};
    const int64_t vectors = (unit.closed + kLanes - 1) / kLanes, most = (vectors + kSample - 1) / kSample;
    const int64_t step = most > 8 ? most : 8;
    const Weigher weigher(unit, g);
    Floats widest = {};
    float low = kInfinity, high = -kInfinity;
    int taken = 0;
    for (int64_t i = 0; i < vectors; i += step, ++taken) {
        Ints sketched = first_lanes(unit.closed - i * kLanes);
        for (int64_t h = 0; h < unit.group.size; ++h)
            sketched &= load<Floats>(unit.upper + h * unit.stride + i * kLanes) < unit.cut[h];
        const Floats upper = load<Floats>(unit.upper + g * unit.stride + i * kLanes);
        const Weighed each =
            weigher.weigh<true>(upper, load<Floats>(unit.estimate + g * unit.stride + i * kLanes), sketched, widest);
        uppers[taken] = select(sketched, upper, splat(kInfinity));
        ceilings[taken] = each.weight * each.growth;
        floors += each.weight * reciprocal_near(each.growth);
        low = std::fmin(low, -largest(-uppers[taken]));
        high = std::fmax(high, largest(select(sketched, upper, splat(-kInfinity))));
    }
    const double allowed = share * (exact_floors / static_cast<double>(step) + static_cast<double>(sum(floors)));
    return halve(Range{low, high}, [&](float t) {
        Floats below = {};
        for (int i = 0; i < taken; ++i) below += select(uppers[i] < t, ceilings[i], splat(0));
        return static_cast<double>(sum(below)) <= allowed;
    });
}

// Whether what went unread is at most the share of the mass the rule allows.
inline bool little_unread(const Unit& unit) {
    for (int64_t g = 0; g < unit.group.size; ++g) {
        double ceilings = 0, floors = 0;
        for (int m = 0; m < unit.size; ++m)
            ceilings += unit.sums[m * unit.group.size + g].unread_ceilings,
                floors += unit.sums[m * unit.group.size + g].floors;
        if (ceilings > 0 && !(ceilings <= unit.rule->unread_mass * floors * (1 - 1e-4))) return false;
    }
    return true;
}

// Whether the largest estimate of any key, which the scan has found, is near enough to a score to be what weights are
// relative to: of an exact key it may lie far above its score, and beside it all weights would vanish.
inline bool near_a_score(const Unit& unit) {
    constexpr float kNats = 10;
    for (int64_t g = 0; g < unit.group.size; ++g) {
        const float estimate = over_members(unit, g, &Extremes::top), peak = over_members(unit, g, &Extremes::peak);
        if (!(estimate * unit.problem->softmax_scale <= peak * unit.problem->softmax_scale + kNats)) return false;
    }
    return true;
}

// What weights are relative to, and what arithmetic can add to a logit.
inline void settle_top(Unit& unit) {
    const float scale = unit.problem->softmax_scale;
    unit.my_heads([&](int64_t g) {
        const float peak = over_members(unit, g, &Extremes::peak), upper = over_members(unit, g, &Extremes::top);
        const float top = peak > upper ? peak : upper, extent = over_members(unit, g, &Extremes::extent);
        unit.top[g] = top > -kInfinity ? top : 0.0f;
        // Beyond -87 and 88 nats of the top, weights and floors are zero and ceilings a constant or infinity.
        unit.logit_slack[g] = 2 * logit_slack(4 * scale * extent + 90);
        unit.tau[g] = unit.cut[g];
    });
}

// The keys of the list are exact.
inline void count_exact(const Unit& unit) {
    int64_t* counts = unit.counts + unit.rank * kNumCounts;
    for (int64_t i = unit.list_begin; i < unit.list_begin + unit.my_count(); ++i) {
        if (unit.tokens[i] < unit.closed) counts[kScanned] += 1, counts[kExact] += 1;
        for (int64_t g = 0; g < unit.group.size && unit.output->exact_mask != nullptr; ++g)
            unit.mark_exact(g, unit.tokens[i]);
    }
}

inline void precision_unit(Unit& unit, float* weights, float* value_norms, CoarseScratch& scratch) {
    const Rule& rule = *unit.rule;
    const int64_t group = unit.group.size;
    scan_unit<true>(unit);
    unit.wait();
    const int64_t need = keys_needed(rule, unit.length);
    int64_t decided = 0;
    unit.lists([&](int64_t, int64_t n) { decided += n; });
    decided -= unit.length - unit.closed;
    unit.my_heads([&](int64_t g) {
        unit.cut[g] = threshold_for(unit.upper + g * unit.stride, unit.closed, need + decided, unit.packed);
    });
    unit.wait();
    collect<AlsoFind::nothing>(unit, unit.cut, nullptr);
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
        if (lowered) collect<AlsoFind::nothing>(unit, unit.cut, unit.before);
        unit.wait();
    }
    if (!near_a_score(unit)) {  // the same for every thread
        unit.wait();
        collect<AlsoFind::top_estimate>(unit, unit.cut, unit.cut);  // of the keys that are left; lists none
        unit.wait();
    }
    settle_top(unit);
    unit.wait();
    auto keep = [](int64_t, int64_t) LOUVER_ALWAYS_INLINE { return ~Ints{}; };
    for (const double trim : {0.95, 0.8, 0.5, 0.0}) {  // a guess is rarely too high by so much
        clear_sums(unit);
        attend_list(unit, weights, value_norms, keep);
        unit.wait();
        unit.my_heads([&](int64_t g) {
            double floors = 0;
            for (int m = 0; m < unit.size; ++m) floors += unit.sums[m * group + g].floors;
            unit.live_above[g] =
                trim * rule.unread_mass > 0 ? guess_live(unit, g, trim * rule.unread_mass, floors) : -kInfinity;
        });
        unit.wait();
        add_sketched(unit, scratch);
        unit.wait();
        const bool enough = little_unread(unit);  // the same for every thread
        if (enough) break;
        unit.wait();
    }
    count_exact(unit);
    unit.wait();
    if (unit.rank == 0) finish_unit(unit);
    unit.wait();
}

}  // namespace louver::LOUVER_ISA
