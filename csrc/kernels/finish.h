// From every thread's sums to the result of a unit: output, certificate, arithmetic bound, counts. The formulas are
// those of kernels/reference/certificate.py; docs/guarantee.md has the proofs, section "CPU backend" what differs.
#pragma once

#include "kernels/unit.h"

namespace louver::LOUVER_ISA {

// Fold the list's exact keys into this thread's sums and output. keep(g, at) has a lane for each of the kLanes entries
// from `at` on, true where head g attends it; weights [group, kValueTile] is scratch. from: how much of the list has
// been folded in before.
template <class Keep>
inline void attend_list(Unit& unit, float* weights, float* value_norms, Keep keep, int64_t from = 0) {
    const float scale = unit.problem->softmax_scale;
    const int64_t group = unit.group.size, end = unit.list_begin + unit.my_count();
    for (int64_t i = 0; i < kValueTile; ++i) value_norms[i] = 0;
    for (int64_t at = unit.list_begin + from; at < end; at += kValueTile) {
        const int64_t n = end - at < kValueTile ? end - at : kValueTile;
        for (int64_t g = 0; g < group; ++g)
            for (int64_t i = 0; i < kValueTile; i += kLanes) {
                const Ints kept = keep(g, at + i) & first_lanes(n - i);
                const Floats logit = (load<Floats>(unit.scores + g * unit.stride + at + i) - unit.top[g]) * scale;
                const Floats w = select(logit < kLowestExponent, splat(0), exp(logit));
                store(weights + g * kValueTile + i, select(kept, w, splat(0)));
            }
        const int64_t next = end - at - n;  // values of the next tile
        add_tokens(unit.values, unit.tokens + at, n, weights, kValueTile, group, unit.my_out(), value_norms,
                   unit.buffer, Ahead{&unit.values, unit.tokens + at + n, next < kValueTile ? next : kValueTile});
        for (int64_t g = 0; g < group; ++g) {
            Floats total = {}, floors = {}, rounding = {}, rounding_value = {}, size = {};
            for (int64_t i = 0; i < n; i += kLanes) {
                const Ints kept = keep(g, at + i) & first_lanes(n - i);
                const Floats w = load<Floats>(weights + g * kValueTile + i), norm = load<Floats>(value_norms + i);
                const Floats off = scale * unit.slacks(g, at + i);
                const Floats score = load<Floats>(unit.scores + g * unit.stride + at + i);
                const Floats logit = abs((score - unit.top[g]) * scale);
                // e^d - 1 <= d + d^2 for d <= 1; beyond, the bound means nothing anyway.
                const Floats d = off + (5 * kUnit * (logit + off) + 0x1p-21f);
                const Floats growth = select(d < 1.0f, d + d * d, splat(kInfinity));
                const Floats surplus = select(kept, w * (growth + 8 * kUnit) + 1e-37f, splat(0));
                total += w;
                floors += select(kept & (d < 1.0f), w * (1 - d), splat(0));
                rounding += surplus;
                rounding_value += select(kept, surplus * norm, splat(0));
                size += select(kept, w * norm, splat(0));
            }
            Sums& sums = unit.sum_of(g);
            alignas(16) float four[4];
            const Floats vectors[4] = {total, floors, rounding, rounding_value};
            sum4(vectors, four);
            sums.total += static_cast<double>(four[0]), sums.floors += static_cast<double>(four[1]);
            sums.rounding += static_cast<double>(four[2]), sums.rounding_value += static_cast<double>(four[3]);
            sums.size += static_cast<double>(sum(size));
        }
    }
}

LOUVER_INLINE void add(Sums& into, const Sums& other) {
    into.total += other.total, into.floors += other.floors;
    into.rounding += other.rounding, into.rounding_value += other.rounding_value;
    into.surplus += other.surplus, into.surplus_spread += other.surplus_spread;
    into.moved += other.moved, into.moved_spread += other.moved_spread;
    into.value_miss += other.value_miss, into.size += other.size;
    into.unread += other.unread, into.unread_ceilings += other.unread_ceilings;
    into.left_out += other.left_out;
}

// Zero what this thread contributes.
inline void clear_sums(Unit& unit) {
    for (int64_t g = 0; g < unit.group.size; ++g) unit.sum_of(g) = Sums{};
    std::memset(unit.my_out(), 0, static_cast<size_t>(4 * unit.group.size * unit.group.padded));
    for (int i = 0; i < kNumCounts; ++i) unit.counts[unit.rank * kNumCounts + i] = 0;
}

// What dropping keys moved the output by, and the share of the mass it can be.
inline void finish_dropped(const Unit& unit, const Sums& sums, float away, float* dropped, float* certificate) {
    if (sums.left_out == 0) return;  // NaN counts as something
    double share = sums.left_out / (sums.floors + sums.left_out);
    if (sums.floors == 0 || !(share <= 1)) share = 1;
    float furthest = 0;
    for (int64_t b = 0; b < unit.num_blocks; ++b) {
        const float spread = unit.sketch->value_spread[unit.sketch->block(unit.row, unit.head, b)];
        furthest = spread > furthest ? spread : furthest;
    }
    const float bound = static_cast<float>(share) * (1 + 3e-5f) + 0x1p-125f;  // the share may underflow
    *dropped = bound < 1 ? bound : 1.0f;
    *certificate = bound * (furthest + away);
}

// Called by one thread when all have contributed.
inline void finish_unit(Unit& unit) {
    // The longest chain of float32 additions into an output channel: within a tile, over tiles, each part of the list
    // ending in one that may not be full, and over blocks.
    const float chain = static_cast<float>(kValueTile + unit.length / kValueTile + unit.num_blocks + unit.parts);
    const Problem& problem = *unit.problem;
    const int64_t group = unit.group.size, padded = unit.group.padded, dims = problem.head_dim;
    const int64_t item = problem.q_dtype == DType::float32 ? 4 : 2;
    const float* mean = unit.sketch->value_mean + (unit.row * unit.sketch->heads + unit.head) * unit.sketch->dims;
    const StepOutput& to = *unit.output;
    for (int64_t g = 0; g < group; ++g) {
        Sums sums = {};
        for (int member = 0; member < unit.size; ++member) add(sums, unit.sums[member * group + g]);
        const bool empty = !(sums.total != 0);  // NaN counts as something
        const double total = empty ? 1.0 : sums.total;
        const int64_t index = unit.row * problem.num_q_heads + unit.head * group + g;
        double squares = 0, away_squares = 0, lost_squares = 0;
        for (int64_t d = 0; d < dims; ++d) {
            double x = sums.unread * static_cast<double>(mean[d]);
            for (int member = 0; member < unit.size; ++member)
                x += static_cast<double>(unit.out[(member * group + g) * padded + d]);
            const float y = static_cast<float>(x / total);
            const double wide = static_cast<double>(y), away = static_cast<double>(mean[d]) - wide;
            squares += wide * wide, away_squares += away * away;
            char* at = to.out + (index * dims + d) * item;
            store_scalar(problem.q_dtype, at, y);
            const double lost = static_cast<double>(load_scalar(problem.q_dtype, at)) - wide;
            lost_squares += lost * lost;
        }
        const float out_norm = root_above(squares) + kTinyNorm;
        const float accumulation =
            gamma(chain + 16) * (static_cast<float>(sums.size / total) * (1 + 1e-5f) + 2 * out_norm);
        const float away = root_above(away_squares) + accumulation + kTinyNorm;
        const double floors = sums.floors > 0 ? sums.floors * (1 - 1e-5) : 0.0;
        const double over = floors > 0 ? 1 / floors : empty ? 0.0 : static_cast<double>(kInfinity);
        auto bounded = [](double x) { return x == x ? static_cast<float>(x * (1 + 1e-5)) : kInfinity; };
        float certificate = 0, dropped = 0;
        const double off = sums.surplus + sums.moved;  // 0 where all is exact, whatever away is
        const double missed = sums.surplus_spread + sums.moved_spread +
                              (off != 0 ? off * static_cast<double>(away) : 0.0) + sums.value_miss;
        if (missed != 0) certificate = bounded(missed * over);
        const double rounding = sums.rounding_value + sums.rounding * static_cast<double>(out_norm + accumulation);
        // The output is rounded to float32 once, then to its dtype; the second is known.
        float arithmetic = (rounding != 0 ? bounded(rounding * over) : 0.0f) + accumulation + kUnit * out_norm;
        finish_dropped(unit, sums, away + arithmetic, &dropped, &certificate);
        arithmetic += root_above(lost_squares) + kTinyNorm;
        if (!(arithmetic == arithmetic)) arithmetic = kInfinity;
        if (!(certificate == certificate)) certificate = kInfinity;
        to.lse[index] = empty ? -kInfinity : problem.softmax_scale * unit.top[g] + static_cast<float>(std::log(total));
        to.certificate[index] = certificate;
        to.arithmetic[index] = arithmetic;
        to.dropped[index] = dropped;
        to.tau[index] = unit.tau[g];
        unit.away[g] = away;
    }
    int64_t* counts = to.counts + (unit.row * problem.num_kv_heads + unit.head) * kNumCounts;
    for (int i = 0; i < kNumCounts; ++i) {
        counts[i] = 0;
        for (int member = 0; member < unit.size; ++member) counts[i] += unit.counts[member * kNumCounts + i];
    }
    counts[kKeys] = unit.length, counts[kBlocks] = unit.num_blocks, counts[kOpen] = unit.length - unit.closed;
}

}  // namespace louver::LOUVER_ISA
