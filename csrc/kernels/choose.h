// A choice of cuts for a KV head's step under error:EPS: from the terms of its certificate a first aim, then cuts tried
// until they would certify what is allowed, at the least bytes. Nothing proven rests on it.
#pragma once

#include "kernels/spend.h"

namespace louver::LOUVER_ISA {

constexpr int kTries = 5;             // of cuts, for a choice
constexpr double kOfAllowed = 0.98;   // aimed at: sketched values, unknown at first, move the output a little
constexpr float kFirstSlack = 1.04f;  // times that, for the first choice, which only the second can correct

constexpr float kOfTried = 0.99f;     // of what is allowed, so that the next try is not a hair above
constexpr float kFirstAim = 1.5f;     // times what is allowed: the terms' sum exceeds their joint maximum
constexpr int64_t kSampledFrom = 32;  // blocks, of which a first choice tries every second

// As one thread of the unit sees it; every member is called by all of them.
class Chooser {
  public:
    // exact and live are this thread's, masks of a block; terms [group] are shared.
    Chooser(Unit& unit, const Asked& asked, const Trials& trials, TermSums* terms, Ints* exact, Ints* live)
        : unit_(unit), asked_(asked), trials_(trials), terms_(terms), exact_(exact), live_(live) {}

    void forget_terms() { have_terms_ = false; }

    // The output so far, with the mean value for what is not exact; what may be certified of it.
    void guess_output() {
        sum_ends(unit_, trials_);
        unit_.wait();
        const Problem& problem = *unit_.problem;
        const int64_t group = unit_.group.size, padded = unit_.group.padded;
        const float* mean =
            unit_.sketch->value_mean + (unit_.row * unit_.sketch->heads + unit_.head) * unit_.sketch->dims;
        const float arithmetic = 0.5f * unit_of(problem.q_dtype);
        unit_.my_heads([&](int64_t g) {
            double rest = 0, total = 0;
            for (int m = 0; m < unit_.size; ++m)
                rest += trials_.sums[m * group + g].promoted, total += unit_.sums[m * group + g].total;
            const double over = total + rest > 0 ? 1 / (total + rest) : 0.0;
            double squares = 0, away = 0;
            for (int64_t d = 0; d < problem.head_dim; ++d) {
                double x = rest * static_cast<double>(mean[d]);
                for (int m = 0; m < unit_.size; ++m) x += static_cast<double>(unit_.out[(m * group + g) * padded + d]);
                x *= over;
                squares += x * x, away += (static_cast<double>(mean[d]) - x) * (static_cast<double>(mean[d]) - x);
            }
            trials_.whole[g] = total + rest;
            trials_.away[g] = static_cast<float>(std::sqrt(away));
            trials_.allowed[g] =
                static_cast<float>(kOfAllowed * std::sqrt(squares)) * std::fmax(asked_.error - arithmetic, 0.0f);
            if (!(trials_.allowed[g] < kInfinity)) trials_.allowed[g] = 0;
        });
        unit_.wait();
    }

    // The cheapest cuts found that would certify what is allowed, into best_cut and best_live; true where they would
    // read what dense attention reads. rough: near what is allowed will do, from above.
    bool choose(bool rough, bool sinking) {
        const float slack = rough ? kFirstSlack : 1.0f;
        const int64_t group = unit_.group.size, dense = unit_.length * asked_.bytes[kOpen];
        if (!have_terms_) unit_.my_heads([&](int64_t g) { sum_terms(unit_, trials_, g, terms_[g]); });
        have_terms_ = true;
        int64_t best = -1;
        for (int tries = 0; tries < kTries; ++tries) {
            unit_.my_heads([&](int64_t g) {
                const double allowed = static_cast<double>(trials_.aim[g] * trials_.allowed[g]) * trials_.whole[g];
                const PairOfCuts pair = cheapest(terms_[g], trials_.away[g], allowed,
                                                 static_cast<float>(asked_.bytes[kScanned] + asked_.bytes[kExact]),
                                                 static_cast<float>(asked_.bytes[kCoarse]));
                trials_.cut[g] = std::fmin(unit_.cut[g], pair.exact);
                trials_.live[g] = std::fmin(trials_.cut[g], pair.unread);
                if (sinking) trials_.live[g] = std::fmin(trials_.live[g], unit_.live_above[g]);
            });
            unit_.wait();
            try_cuts(unit_, trials_, rough && unit_.num_blocks >= kSampledFrom ? 2 : 1, exact_, live_);
            unit_.wait();
            TrialCounts counts = {};
            for (int m = 0; m < unit_.size; ++m) {
                const TrialCounts& each = trials_.counts[m];
                counts.exact += each.exact, counts.coarse += each.coarse, counts.value_blocks += each.value_blocks;
            }
            const int64_t bytes = bytes_of(counts);
            bool enough = true, near = false;
            for (int64_t g = 0; g < group; ++g) {
                const float ratio = ratio_of(g), allowed = slack * trials_.allowed[g];
                enough &= ratio <= allowed;
                near |= ratio >= 0.95f * allowed;
            }
            const bool last = tries + 1 == kTries, take = rough || (best < 0 ? enough || last : enough && bytes < best);
            const bool stop = bytes < dense && ((enough && near) || (rough && tries > 0));
            if (take) best = bytes;
            unit_.wait();
            unit_.my_heads([&](int64_t g) {
                const float ratio = ratio_of(g), step = kOfTried * slack * trials_.allowed[g] / ratio;
                if (take) {
                    trials_.best_cut[g] = trials_.cut[g], trials_.best_live[g] = trials_.live[g];
                    trials_.ratio[g] = ratio;
                }
                const float factor = step > 0.25f ? std::fmin(step, 4.0f) : 0.25f;
                trials_.aim[g] = std::fmin(std::fmax(trials_.aim[g] * factor, 1e-3f), 1e3f);
            });
            if (stop) break;
        }
        unit_.wait();
        return best >= dense && unit_.length > 0;
    }

  private:
    double listed(int64_t g) const {
        double total = 0;
        for (int m = 0; m < unit_.size; ++m) total += unit_.sums[m * unit_.group.size + g].total;
        return total;
    }

    int64_t bytes_of(const TrialCounts& counts) const {
        const int64_t* each = asked_.bytes;
        return unit_.num_blocks * each[kBlocks] + (unit_.length - unit_.closed) * each[kOpen] +
               counts.exact * (each[kScanned] + each[kExact]) + counts.coarse * each[kCoarse] +
               counts.value_blocks * each[kValueBlocks];
    }

    // What the cuts tried last would certify of head g.
    float ratio_of(int64_t g) const {
        double above = 0, below = listed(g);
        for (int m = 0; m < unit_.size; ++m) {
            const TrialSums& each = trials_.sums[m * unit_.group.size + g];
            above += each.numerator + each.missed, below += each.total + each.promoted;
        }
        return above == 0 ? 0.0f : static_cast<float>(above / below);
    }

    Unit& unit_;
    const Asked& asked_;
    const Trials& trials_;
    TermSums* terms_;
    Ints *exact_, *live_;
    bool have_terms_ = false;
};

}  // namespace louver::LOUVER_ISA
