// The op `attend_mass`: a step that drops keys which provably share at most a given part of the softmax mass.
//
//     1. scan; the keys that any total would ask for, by a sample of the bounds, are scored: a far better least total
//     2. of the others those stay unseen whose ceilings are little enough of it; what is above them is scored
//     3. of what was scored the lightest are dropped, as far as the share goes
//
// The share dropped is then certified (finish.h, finish_dropped); a KV head that misses it, or would read what dense
// attention reads, keeps every key. Nothing rests on the sums that choose thresholds.
#pragma once

#include <utility>

#include "kernels/tiers.h"

namespace louver::LOUVER_ISA {

constexpr double kUnseenShare = 0.8;  // of the share may be spent on keys that are never scored
constexpr int64_t kMassBins = 1024;
constexpr float kMassNats = 24;  // below the highest bound; what is lower falls into the last bin

struct MassContext {
    StepContext step;
    const AskedMass* asked;
    char* room;          // behind the step's memory
    int64_t room_bytes;  // per thread
};

// One unit's step, as one of its threads sees it.
class MassStep {
  public:
    // listed: shared, [group, stride], about the weights of the list's keys.
    MassStep(Unit& unit, const AskedMass& asked, float* listed, Private& mine)
        : unit_(unit), asked_(asked), listed_(listed), mine_(mine), scale_(unit.problem->softmax_scale) {}

    void run() {
        clear_sums(unit_);
        scan_unit<true>(unit_);
        unit_.wait();
        unit_.my_heads([&](int64_t g) { set_top(g), unit_.cut[g] = first_cut(g); });
        unit_.wait();
        collect<AlsoFind::nothing>(unit_, unit_.cut, nullptr);
        weigh_list();
        unit_.my_heads([&](int64_t g) {
            unit_.before[g] = unit_.cut[g];
            unit_.live_above[g] = std::fmin(std::fmin(unit_.cut[g], floor_of_best(g)), unseen_below(g));
        });
        unit_.wait();
        std::swap(unit_.cut, unit_.live_above);
        collect<AlsoFind::nothing>(unit_, unit_.cut, unit_.before);
        unit_.wait();
        unit_.my_heads([&](int64_t g) {
            const float peak = over_members(unit_, g, &Extremes::peak);
            if (peak > -kInfinity && std::fabs(peak - unit_.top[g]) * scale_ > kRebaseNats) unit_.top[g] = peak;
        });
        unit_.wait();
        weigh_list();
        add_unseen(unit_, unit_.cut);
        unit_.wait();
        unit_.my_heads([&](int64_t g) {
            unit_.live_above[g] = -kInfinity;
            unit_.tau[g] = std::fmin(least_kept(g), floor_of_best(g));
        });
        unit_.wait();
        if (!(drop_and_certify() && met())) keep_everything();
    }

  private:
    // What may be dropped, of what is kept; less what rounding may take.
    double part(int64_t g, double share) const {
        const double margin = 2e-3 + 2 * static_cast<double>(unit_.logit_slack[g]) +
                              4 * static_cast<double>(kUnit) * static_cast<double>(unit_.length);
        return share / (1 - share) * (1 - (margin < 0.5 ? margin : 0.5));
    }

    // No bound and no score of a kept key is below it: with keep_best it is no less than any floor.
    float floor_of_best(int64_t g) const {
        return unit_.rule->keep_best ? over_members(unit_, g, &Extremes::lower) : kInfinity;
    }

    // Weights relative to the largest estimate or score.
    void set_top(int64_t g) const {
        Floats highest = splat(-kInfinity);
        for (int64_t i = 0; i < unit_.closed; i += kLanes) {
            const Ints known =
                (load<Floats>(unit_.upper + g * unit_.stride + i) < kInfinity) & first_lanes(unit_.closed - i);
            highest =
                max(highest, select(known, load<Floats>(unit_.estimate + g * unit_.stride + i), splat(-kInfinity)));
        }
        const float peak = over_members(unit_, g, &Extremes::peak), top = std::fmax(peak, largest(highest));
        unit_.top[g] = top > -kInfinity && top < kInfinity ? top : 0.0f;
        unit_.logit_slack[g] = 2 * logit_slack(4 * scale_ * over_members(unit_, g, &Extremes::extent) + 90);
    }

    Floats mass_of(int64_t g, Floats score) const { return exp((score - unit_.top[g]) * scale_); }

    // A threshold below which, by a sample, the ceilings are as much as the share allows if all keys weigh their most.
    float first_cut(int64_t g) const {
        constexpr int kSample = 192;
        Floats uppers[kSample], ceilings[kSample], all = {};
        const int64_t vectors = unit_.closed / kLanes, step = vectors / kSample + 1;
        float low = kInfinity, high = -kInfinity;
        int taken = 0;
        for (int64_t i = 0; i < vectors; i += step, ++taken) {
            const Floats upper = load<Floats>(unit_.upper + g * unit_.stride + i * kLanes);
            const Ints known = upper < kInfinity;
            uppers[taken] = upper, ceilings[taken] = select(known, mass_of(g, upper), splat(0));
            all += ceilings[taken];
            low = std::fmin(low, -largest(-upper)),
            high = std::fmax(high, largest(select(known, upper, splat(-kInfinity))));
        }
        const double allowed = part(g, kUnseenShare * asked_.share) * static_cast<double>(sum(all));
        return halve(Range{low, high}, [&](float t) {
            Floats below = {};
            for (int i = 0; i < taken; ++i) below += select(uppers[i] < t, ceilings[i], splat(0));
            return static_cast<double>(sum(below)) <= allowed;
        });
    }

    // Weights of this thread's list, negative where a key is kept in any case.
    void weigh_list() {
        const int64_t end = unit_.list_begin + unit_.my_count();
        for (int64_t g = 0; g < unit_.group.size; ++g)
            for (int64_t at = unit_.list_begin; at < end; at += kLanes) {
                const Floats mass = mass_of(g, load<Floats>(unit_.scores + g * unit_.stride + at));
                const Ints decided = unit_.uppers(g, at) == kInfinity;
                store_some(listed_ + g * unit_.stride + at, select(decided, -mass, mass), end - at);
            }
        unit_.wait();
    }

    // The weight of head g's list.
    double list_mass(int64_t g) const {
        double out = 0;
        unit_.lists([&](int64_t begin, int64_t n) {
            Floats total = {};
            for (int64_t i = 0; i < n; i += kLanes)
                total += abs(load_some(listed_ + g * unit_.stride + begin + i, n - i));
            out += static_cast<double>(sum(total));
        });
        return out;
    }

    // The highest bound below which the ceilings of keys that no head has had scored (at unit.cut) are little enough.
    float unseen_below(int64_t g) const {
        const int64_t group = unit_.group.size, stride = unit_.stride;
        const float* upper = unit_.upper + g * stride;
        Floats highest = splat(-kInfinity), lowest = splat(kInfinity);
        for (int64_t i = 0; i < unit_.closed; i += kLanes) {
            const Floats x = load<Floats>(upper + i);
            const Ints open = (x < unit_.cut[g]) & first_lanes(unit_.closed - i);
            highest = max(highest, select(open, x, splat(-kInfinity))),
            lowest = min(lowest, select(open, x, splat(kInfinity)));
        }
        const float high = largest(highest), range = std::fmin(high + largest(-lowest), kMassNats / scale_);
        if (!(high > -kInfinity)) return -kInfinity;
        const float inverse = range > 1e-30f ? kMassBins / range : 0.0f;
        alignas(64) float bins[kMassBins][2] = {};  // ceilings and floors
        for (int64_t i = 0; i < unit_.closed; i += kLanes) {
            Ints open = first_lanes(unit_.closed - i);
            for (int64_t h = 0; h < group; ++h) open &= load<Floats>(unit_.upper + h * stride + i) < unit_.cut[h];
            if (bits(open) == 0) continue;
            const Floats x = load<Floats>(upper + i), most = mass_of(g, x);
            const Floats low = 2 * load<Floats>(unit_.estimate + g * stride + i) - x;
            const Floats least = select((low - unit_.top[g]) * scale_ < kLowestExponent, splat(0), mass_of(g, low));
            const Floats place = min(max((high - x) * inverse, splat(0)), splat(static_cast<float>(kMassBins - 1)));
            const Ints bin = __builtin_convertvector(place, Ints);
            for (uint32_t todo = bits(open); todo != 0; todo &= todo - 1) {
                const int lane = __builtin_ctz(todo);
                bins[bin[lane]][0] += most[lane], bins[bin[lane]][1] += least[lane];
            }
        }
        double kept = list_mass(g), below = 0;
        for (const auto& bin : bins) kept += static_cast<double>(bin[1]);
        const double ratio = part(g, kUnseenShare * asked_.share);
        for (int64_t i = kMassBins; i-- > 0;) {
            below += static_cast<double>(bins[i][0]), kept -= static_cast<double>(bins[i][1]);
            if (below <= ratio * kept) continue;
            // A little below the edge: a bound near it may have been put into the next bin.
            return i + 1 == kMassBins ? -kInfinity : high - (static_cast<float>(i + 1) + 1e-3f) * (range / kMassBins);
        }
        return high;
    }

    // The highest score below which the list's keys, and what is unseen, are as much as may be dropped.
    float least_kept(int64_t g) const {
        const float* scores = unit_.scores + g * unit_.stride;
        const float* masses = listed_ + g * unit_.stride;
        double unseen = 0;
        for (int m = 0; m < unit_.size; ++m) unseen += unit_.sums[m * unit_.group.size + g].left_out;
        const double ratio = part(g, asked_.share), allowed = (ratio * list_mass(g) - unseen) / (1 + ratio);
        if (!(allowed > 0)) return -kInfinity;
        const float peak = over_members(unit_, g, &Extremes::peak);
        return halve(Range{peak - kMassNats / scale_, peak}, [&](float t) {
            double below = 0;
            unit_.lists([&](int64_t begin, int64_t n) {
                Floats total = {};
                for (int64_t i = 0; i < n; i += kLanes) {
                    const Floats mass = load_some(masses + begin + i, n - i),
                                 score = load_some(scores + begin + i, n - i);
                    total += select((mass > 0.0f) & ~(score >= t), mass, splat(0));
                }
                below += static_cast<double>(sum(total));
            });
            return below <= allowed;
        });
    }

    int64_t index_of(int64_t g) const {
        return unit_.row * unit_.problem->num_q_heads + unit_.head * unit_.group.size + g;
    }

    // Keep of the list what reaches tau; false, before values are read, where that reads what dense attention reads.
    bool drop_and_certify() {
        const float* tau = unit_.tau;
        auto keep = [&](int64_t g, int64_t at) LOUVER_ALWAYS_INLINE {
            const Floats score = load<Floats>(unit_.scores + g * unit_.stride + at);
            return (unit_.uppers(g, at) == kInfinity) | ~(score + unit_.slacks(g, at) < tau[g]);
        };
        auto weigh = [&](int64_t g, Floats logit) LOUVER_ALWAYS_INLINE { return exp(logit + unit_.logit_slack[g]); };
        settle_list(unit_, unit_.live_above, keep, weigh);
        unit_.wait();
        const int64_t* each = asked_.bytes;
        int64_t bytes = unit_.num_blocks * each[kBlocks] + (unit_.length - unit_.closed) * each[kOpen];
        for (int m = 0; m < unit_.size; ++m) {
            const int64_t* counts = unit_.counts + m * kNumCounts;
            bytes += counts[kScanned] * each[kScanned] + counts[kExact] * each[kExact];
        }
        if (bytes >= unit_.length * each[kOpen] && unit_.length > 0) return false;
        attend_list(unit_, mine_.weights, mine_.value_norms, keep);
        unit_.wait();
        finish();
        return true;
    }

    void finish() {
        if (unit_.rank == 0) {
            for (int64_t g = 0; g < unit_.group.size; ++g) unit_.tau[g] = std::fmax(unit_.tau[g], unit_.cut[g]);
            finish_unit(unit_);
        }
        unit_.wait();
    }

    // Whether every head's certificate is what was asked.
    bool met() const {
        for (int64_t g = 0; g < unit_.group.size; ++g)
            if (!(unit_.output->dropped[index_of(g)] <= asked_.share)) return false;
        return true;
    }

    void keep_everything() {
        auto keep = [](int64_t, int64_t) LOUVER_ALWAYS_INLINE { return ~Ints{}; };
        unit_.wait();
        clear_sums(unit_);
        unit_.my_count() = 0;
        const int64_t frame_len = unit_.sketch->frame_len;
        for (int64_t i = unit_.blocks.begin * frame_len; i < unit_.blocks.end * frame_len; ++i) add_token(unit_, i);
        for (int64_t i = unit_.closed; i < unit_.length && unit_.last(); ++i) add_token(unit_, i);
        score_list(unit_, 0);
        unit_.wait();
        unit_.my_heads([&](int64_t g) {
            const float peak = over_members(unit_, g, &Extremes::peak);
            unit_.top[g] = peak > -kInfinity ? peak : 0.0f;
            unit_.tau[g] = unit_.cut[g] = -kInfinity;
        });
        unit_.wait();
        settle_list(unit_, unit_.live_above, keep, [](int64_t, Floats logit) LOUVER_ALWAYS_INLINE { return logit; });
        attend_list(unit_, mine_.weights, mine_.value_norms, keep);
        unit_.wait();
        finish();
    }

    Unit& unit_;
    const AskedMass& asked_;
    float* listed_;
    Private& mine_;
    float scale_;
};

inline int64_t lay_out_listed(float*& listed, int64_t longest, int64_t group, char* memory) {
    Arena arena(memory);
    listed = arena.take<float>(group * (padded_dims(longest) + kLanes));
    return arena.used();
}

inline void mass_member(void* argument, int rank, Team& team) {
    const auto& context = *static_cast<MassContext*>(argument);
    const Problem& problem = *context.step.problem;
    for_units(problem.batch * problem.num_kv_heads, rank, team.size(), [&](int64_t index, bool shared) {
        if (shared) team.barrier();
        Private mine = {};
        Unit unit = make_unit(context.step, index, shared, rank, team, mine);
        float* listed = nullptr;
        lay_out_listed(listed, context.step.longest, unit.group.size,
                       context.room + (shared ? 0 : rank) * context.room_bytes);
        MassStep(unit, *context.asked, listed, mine).run();
        unit.wait();
    });
}

// rule: sinks, recent and keep_best count.
inline void attend_mass(const Problem& problem, const SketchView& sketch, const Rule& rule, const AskedMass& asked,
                        const StepOutput& output, int num_threads) {
    MassContext context{make_context(problem, sketch, rule, output, true, num_threads), &asked, nullptr, 0};
    float* listed = nullptr;
    context.room_bytes = lay_out_listed(listed, context.step.longest, problem.group_size(), nullptr);
    const int64_t bytes = context.step.shared_bytes + context.step.private_bytes;
    context.step.memory = scratch((bytes + context.room_bytes) * num_threads);
    context.room = context.step.memory + bytes * num_threads;
    parallel(num_threads, mass_member, &context);
}

}  // namespace louver::LOUVER_ISA
