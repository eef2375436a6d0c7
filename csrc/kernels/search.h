// Range search: the keys whose score reaches a head's threshold, with their scores, in the order of their tokens.
#pragma once

#include "kernels/step.h"

namespace louver::LOUVER_ISA {

struct SearchContext {
    StepContext step;
    const float* tau;
    const FoundKeys* found;
};

// The thread's list, scanned keys first and then the collected ones, in the order of its tokens: order[i] is the place
// of the i-th.
inline void order_list(const Unit& unit, int64_t first_collected, int32_t* order) {
    const int32_t* tokens = unit.tokens + unit.list_begin;
    const auto n = static_cast<int32_t>(unit.my_count());
    int32_t scanned = 0, collected = static_cast<int32_t>(first_collected);
    for (int32_t i = 0; i < n; ++i) {
        const bool take_scanned = scanned < first_collected && (collected == n || tokens[scanned] < tokens[collected]);
        order[i] = take_scanned ? scanned++ : collected++;
    }
}

// Largest |computed - real| of one score, from the sum of its products' sizes: of a key with a size where the query has
// none, |q| |k| says far too much, and keys far below the threshold would be found.
inline float own_slack(const Unit& unit, int64_t g, int64_t token) {
    const int64_t padded = unit.group.padded, dims = unit.keys.head_dim;
    load_row(*unit.keys.view, unit.keys.at(token), dims, padded, unit.buffer);
    Floats total = {};
    for (int64_t d = 0; d < padded; d += kLanes)
        total += abs(load<Floats>(unit.group.q + g * padded + d) * load<Floats>(unit.buffer + d));
    const int64_t lanes = padded / kLanes + 5, terms = dims < lanes ? dims : lanes;
    return kSafety * gamma(static_cast<float>(terms + 2)) * sum(total) + kAbsolute;
}

inline void search_unit(Unit& unit, const float* tau, const FoundKeys& found) {
    const int64_t first_head = unit.row * unit.problem->num_q_heads + unit.head * unit.group.size;
    const int32_t start = unit.problem->kv_start[unit.row];
    scan_unit<false>(unit);
    const int64_t scanned = unit.my_count();
    collect<AlsoFind::nothing>(unit, tau + first_head, nullptr);
    int32_t* order =
        found.order + (unit.row * unit.problem->num_kv_heads + unit.head) * found.capacity + unit.list_begin;
    order_list(unit, scanned, order);
    int64_t closed = 0;
    for (int64_t i = 0; i < unit.my_count(); ++i) closed += unit.tokens[unit.list_begin + i] < unit.closed;
    found.scanned[(unit.row * unit.problem->num_kv_heads + unit.head) * found.threads + unit.rank] = closed;
    for (int64_t g = 0; g < unit.group.size; ++g) {
        const int64_t place = (first_head + g) * found.capacity + unit.list_begin;
        const float* upper = unit.upper + g * unit.stride;
        const float least = tau[first_head + g];
        int64_t n = 0;
        for (int64_t i = 0; i < unit.my_count(); ++i) {
            const int64_t at = unit.list_begin + order[i];
            const int32_t token = unit.tokens[at];
            if (token < unit.closed && upper[token] < least) continue;
            const float score = unit.scores[g * unit.stride + at];
            if (score + unit.slack(g, at) < least) continue;
            if (score < least && score + own_slack(unit, g, token) < least) continue;
            found.tokens[place + n] = start + token, found.scores[place + n] = score;
            n += 1;
        }
        found.counts[(first_head + g) * found.threads + unit.rank] = n;
        found.begins[(first_head + g) * found.threads + unit.rank] = place;
    }
}

inline void search_member(void* argument, int rank, Team& team) {
    const auto& context = *static_cast<SearchContext*>(argument);
    const Problem& problem = *context.step.problem;
    for_units(problem.batch * problem.num_kv_heads, rank, team.size(), [&](int64_t index, bool shared) {
        if (shared) team.barrier();
        Private mine = {};
        Unit unit = make_unit(context.step, index, shared, rank, team, mine);
        search_unit(unit, context.tau, *context.found);
        unit.wait();
    });
}

// Every key whose score could reach tau [batch, num_q_heads].
inline void search(const Problem& problem, const SketchView& sketch, const float* tau, const FoundKeys& found,
                   int num_threads) {
    Rule rule;
    rule.drop = true;
    const StepOutput output;
    SearchContext context{make_context(problem, sketch, rule, output, true, num_threads), tau, &found};
    parallel(num_threads, search_member, &context);
}

}  // namespace louver::LOUVER_ISA
