// The op `attend_tiers`: a step from bounds that are there already and cuts that a policy chose. What follows the cuts
// is what the fused step does, with two differences: the thresholds are the caller's, and bounds are as tight as they
// come, because the caller holds them against what was asked (attention/within.py, attention/looks.py).
#pragma once

#include "kernels/joint.h"
#include "kernels/step.h"

namespace louver::LOUVER_ISA {

struct TiersContext {
    StepContext step;
    const BoundsView* bounds;
    const CutsView* cuts;
    const uint8_t* again;  // [batch, num_kv_heads], or null: the units to attend; the others' output stays
};

// What one unit sees of bounds and cuts.
struct UnitBounds {
    const float *estimate, *half_width;  // [group, sketched]
    const uint8_t* undecided;            // [sketched]
    int64_t sketched;
    const float *unread, *fine, *exact;  // [group]
    const int64_t* rank;
};

inline UnitBounds bounds_of(const Unit& unit, const BoundsView& bounds, const CutsView& cuts) {
    const Problem& problem = *unit.problem;
    const int64_t head = unit.row * problem.num_q_heads + unit.head * unit.group.size;
    const uint8_t* undecided = bounds.undecided + (unit.row * problem.num_kv_heads + unit.head) * bounds.sketched;
    return UnitBounds{bounds.estimate + head * bounds.sketched,
                      bounds.half_width + head * bounds.sketched,
                      undecided,
                      bounds.sketched,
                      cuts.unread + head,
                      cuts.fine + head,
                      cuts.exact + head,
                      cuts.rank == nullptr ? nullptr : cuts.rank + head};
}

// A threshold that is no number keeps everything.
LOUVER_INLINE float cut_of(float x) { return x == x ? x : -kInfinity; }

// Spill the bounds of this thread's blocks as scan_unit would: upper bounds, +infinity for decided keys, which go on
// the list with the tokens no block holds and are scored.
template <bool kSpillEstimates>
inline void read_bounds(Unit& unit, const UnitBounds& from) {
    const int64_t group = unit.group.size, frame_len = unit.sketch->frame_len;
    const int64_t begin = unit.blocks.begin * frame_len, end = unit.blocks.end * frame_len;
    unit.my_count() = 0;
    for (int64_t i = begin; i < end; ++i)
        if (from.undecided[i] == 0) add_token(unit, i);
    for (int64_t g = 0; g < group; ++g) {
        Floats top = splat(-kInfinity), widest = {};
        for (int64_t i = begin; i < end; i += kLanes) {
            const int64_t count = end - i;
            const Ints known = some_bytes(from.undecided + i, count) != 0;
            const Floats estimate = load_some(from.estimate + g * from.sketched + i, count);
            const Floats width = load_some(from.half_width + g * from.sketched + i, count), upper = estimate + width;
            top = max(top, select(known, upper, splat(-kInfinity)));
            widest = max(widest, select(known, abs(estimate) + width, splat(0)));
            store_some(unit.upper + g * unit.stride + i, select(known, upper, splat(kInfinity)), count);
            if (kSpillEstimates) store_some(unit.estimate + g * unit.stride + i, estimate, count);
        }
        unit.extreme(g) = {-kInfinity, largest(top), largest(widest), -kInfinity};
    }
    for (int64_t i = unit.closed; i < unit.length && unit.last(); ++i) add_token(unit, i);
    score_list(unit, 0);
}

// Nothing is dropped.
inline void tiers_unit(Unit& unit, const UnitBounds& from, Private& mine) {
    clear_sums(unit);
    read_bounds<true>(unit, from);
    unit.my_heads([&](int64_t g) { unit.cut[g] = cut_of(from.exact[g]); });
    unit.wait();
    collect<AlsoFind::top_estimate>(unit, unit.cut, nullptr);
    unit.wait();
    settle_top(unit);
    unit.wait();
    attend_list(unit, mine.weights, mine.value_norms, [](int64_t, int64_t) LOUVER_ALWAYS_INLINE { return ~Ints{}; });
    count_exact(unit);
    unit.wait();
    unit.my_heads([&](int64_t g) {
        unit.live_above[g] = cut_of(from.unread[g]);
        unit.rescale[g] = 0;
        for (int m = 0; m < unit.size; ++m) unit.rescale[g] += unit.sums[m * unit.group.size + g].floors;
    });
    unit.wait();
    add_sketched(unit, mine.coarse);
    fill_ends(unit, unit.estimate, unit.upper);
    unit.wait();
    if (unit.rank == 0) finish_unit(unit);
    unit.wait();
    tighten_certificates(unit);
}

// The ceilings of this thread's keys that no head has had scored.
inline void add_unseen(Unit& unit, const float* seen_above) {
    const int64_t group = unit.group.size, frame_len = unit.sketch->frame_len;
    const int64_t begin = unit.blocks.begin * frame_len, end = unit.blocks.end * frame_len;
    const float scale = unit.problem->softmax_scale;
    for (int64_t g = 0; g < group; ++g) unit.lanes[g] = splat(0);
    for (int64_t i = begin; i < end; i += kLanes) {
        Ints unseen = first_lanes(end - i);
        for (int64_t g = 0; g < group; ++g) unseen &= load<Floats>(unit.upper + g * unit.stride + i) < seen_above[g];
        if (bits(unseen) == 0) continue;
        for (int64_t g = 0; g < group; ++g) {
            const Floats upper = load<Floats>(unit.upper + g * unit.stride + i);
            unit.lanes[g] += select(unseen, exp((upper - unit.top[g]) * scale + unit.logit_slack[g]), splat(0));
        }
    }
    for (int64_t g = 0; g < group; ++g) unit.sum_of(g).left_out += inflated_sum(unit.lanes[g], end - begin);
}

// Keys that are not exact are dropped. With a rank the keys above `fine` are scored first, as in retrieval_unit.
inline void dropping_unit(Unit& unit, const UnitBounds& from, Private& mine) {
    const float scale = unit.problem->softmax_scale;
    const bool ranked = from.rank != nullptr;
    float *seen = unit.cut, *reach = unit.before, *final_tau = unit.tau;
    clear_sums(unit);
    read_bounds<false>(unit, from);
    unit.my_heads([&](int64_t g) { seen[g] = reach[g] = cut_of(ranked ? from.fine[g] : from.unread[g]); });
    unit.wait();
    collect<AlsoFind::nothing>(unit, seen, nullptr);
    unit.wait();
    unit.my_heads([&](int64_t g) {
        final_tau[g] = cut_of(from.exact[g]);
        if (!ranked) return;
        final_tau[g] = std::fmax(final_tau[g], nth_floor(unit, g, from.rank[g]));
        reach[g] = final_tau[g];
    });
    unit.wait();
    if (ranked) {
        collect<AlsoFind::nothing>(unit, reach, seen);
        unit.wait();
    }
    unit.my_heads([&](int64_t g) {
        if (ranked) final_tau[g] = std::fmax(final_tau[g], nth_floor(unit, g, from.rank[g]));
        if (ranked && reach[g] < seen[g]) seen[g] = reach[g];
        unit.live_above[g] = -kInfinity;
    });
    unit.wait();
    auto keep = [&](int64_t g, int64_t at) LOUVER_ALWAYS_INLINE {
        const Floats upper = unit.uppers(g, at), score = load<Floats>(unit.scores + g * unit.stride + at);
        return (upper == kInfinity) | ((upper >= reach[g]) & ~(score + unit.slacks(g, at) < final_tau[g]));
    };
    find_best_kept(unit, keep);
    unit.wait();
    unit.my_heads([&](int64_t g) {
        const float peak = over_members(unit, g, &Extremes::peak), extent = over_members(unit, g, &Extremes::extent);
        unit.top[g] = peak > -kInfinity ? peak : 0.0f;
        unit.logit_slack[g] = 2 * logit_slack(4 * scale * extent + 90);
    });
    unit.wait();
    auto weigh = [&](int64_t g, Floats logit) LOUVER_ALWAYS_INLINE { return exp(logit + unit.logit_slack[g]); };
    settle_list(unit, unit.live_above, keep, weigh);
    add_unseen(unit, seen);
    attend_list(unit, mine.weights, mine.value_norms, keep);
    unit.wait();
    if (unit.rank == 0) {
        for (int64_t g = 0; g < unit.group.size && !ranked; ++g) final_tau[g] = std::fmax(final_tau[g], reach[g]);
        finish_unit(unit);
    }
}

inline void tiers_member(void* argument, int rank, Team& team) {
    const auto& context = *static_cast<TiersContext*>(argument);
    const Problem& problem = *context.step.problem;
    for_units(problem.batch * problem.num_kv_heads, rank, team.size(), [&](int64_t index, bool shared) {
        if (context.again != nullptr && context.again[index] == 0) return;
        if (shared) team.barrier();
        Private mine = {};
        Unit unit = make_unit(context.step, index, shared, rank, team, mine);
        const UnitBounds from = bounds_of(unit, *context.bounds, *context.cuts);
        if (context.step.rule->drop) {
            dropping_unit(unit, from, mine);
        } else {
            tiers_unit(unit, from, mine);
        }
        unit.wait();
    });
}

inline void attend_tiers(const Problem& problem, const SketchView& sketch, const BoundsView& bounds,
                         const CutsView& cuts, bool drop, const uint8_t* again, const StepOutput& output,
                         int num_threads) {
    Rule rule;
    rule.drop = drop;
    TiersContext context{make_context(problem, sketch, rule, output, false, num_threads), &bounds, &cuts, again};
    parallel(num_threads, tiers_member, &context);
}

}  // namespace louver::LOUVER_ISA
