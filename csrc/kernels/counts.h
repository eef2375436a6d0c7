// The op `count_tiers` (kernels/reference/counts.py): what a step under given cuts would read, without reading it.
#pragma once

#include "kernels/schedule.h"
#include "kernels/simd.h"

namespace louver::LOUVER_ISA {

enum TierCount { kTierUndecided, kTierExact, kTierCoarse, kTierBlocks, kNumTierCounts };

struct CountsContext {
    int64_t batch, num_kv_heads, group, frame_len;
    const BoundsView* bounds;
    const CutsView* cuts;
    uint8_t* coded;   // [batch, num_kv_heads, sketched], or null: set where a value code would be read
    int64_t* counts;  // [batch, num_kv_heads, kNumTierCounts]
};

inline void counts_member(void* argument, int rank, Team& team) {
    const auto& context = *static_cast<CountsContext*>(argument);
    const BoundsView& bounds = *context.bounds;
    const int64_t sketched = bounds.sketched;
    for (int64_t unit = rank; unit < context.batch * context.num_kv_heads; unit += team.size()) {
        const uint8_t* undecided = bounds.undecided + unit * sketched;
        const float *exact_above = context.cuts->exact + unit * context.group,
                    *unread = context.cuts->unread + unit * context.group;
        int64_t counts[kNumTierCounts] = {};
        for (int64_t base = 0; base < sketched; base += context.frame_len) {
            bool any = false;
            for (int64_t i = base; i < base + context.frame_len; i += kLanes) {
                const int64_t n = base + context.frame_len - i;
                const Ints known = some_bytes(undecided + i, n) != 0;
                Ints exact = {}, read = {};
                for (int64_t g = 0; g < context.group; ++g) {
                    const int64_t at = (unit * context.group + g) * sketched + i;
                    const Floats upper = load_some(bounds.estimate + at, n) + load_some(bounds.half_width + at, n);
                    exact |= ~(upper < exact_above[g]), read |= ~(upper < unread[g]);
                }
                const uint32_t coarse = bits(known & read & ~exact);
                counts[kTierUndecided] += __builtin_popcount(bits(known));
                counts[kTierExact] += __builtin_popcount(bits(known & exact));
                counts[kTierCoarse] += __builtin_popcount(coarse);
                any |= coarse != 0;
                for (uint32_t todo = coarse; context.coded != nullptr && todo != 0; todo &= todo - 1)
                    context.coded[unit * sketched + i + __builtin_ctz(todo)] = 1;
            }
            counts[kTierBlocks] += any;
        }
        std::memcpy(context.counts + unit * kNumTierCounts, counts, sizeof(counts));
    }
}

inline void count_tiers(int64_t batch, int64_t num_kv_heads, int64_t group, int64_t frame_len, const BoundsView& bounds,
                        const CutsView& cuts, uint8_t* coded, int64_t* counts, int num_threads) {
    CountsContext context{batch, num_kv_heads, group, frame_len, &bounds, &cuts, coded, counts};
    parallel(num_threads, counts_member, &context);
}

}  // namespace louver::LOUVER_ISA
