// Groups of keys in subspaces (kernels/reference/groups.py): which keys' bounds, gathered from their groups, reach a
// threshold, added up over the subspaces or in each of them.
#pragma once

#include "kernels/schedule.h"
#include "kernels/simd.h"

namespace louver::LOUVER_ISA {

constexpr int64_t kGroupTile =
    1024;  // keys at a time: their sums stay in the first-level cache, with a table of bounds

struct GroupsContext {
    const GroupsView* groups;
    const float* slack;  // [heads, rows], or [heads, subspaces, rows]
    const float* tau;    // [heads, rows], or [heads, rows, subspaces]
    bool all;            // in each subspace; else in the sum
    uint8_t* out;        // [heads, rows, keys]
};

// The groups of n keys from `first` on, padded to whole vectors with group 0.
template <class Index>
inline void load_groups(const GroupsView& groups, int64_t head, int64_t s, int64_t first, int64_t n, int32_t* to) {
    const auto* from = static_cast<const Index*>(groups.group) + (head * groups.subspaces + s) * groups.keys + first;
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    for (int64_t i = n; i < (n + kLanes - 1) / kLanes * kLanes; ++i) to[i] = 0;
}

inline void reach_tile(const GroupsContext& context, int64_t head, int64_t first, int64_t n, float* sums) {
    const GroupsView& groups = *context.groups;
    const int64_t rows = groups.rows;
    alignas(64) int32_t at[kGroupTile];
    for (int64_t s = 0; s < groups.subspaces; ++s) {
        if (groups.wide) {
            load_groups<int32_t>(groups, head, s, first, n, at);
        } else {
            load_groups<int16_t>(groups, head, s, first, n, at);
        }
        for (int64_t row = 0; row < rows; ++row) {
            const float* upper = groups.upper + ((head * groups.subspaces + s) * rows + row) * groups.count;
            float* sum = sums + row * kGroupTile;
            uint8_t* out = context.out + (head * rows + row) * groups.keys + first;
            const float slack =
                context.slack[context.all ? (head * groups.subspaces + s) * rows + row : head * rows + row];
            const float tau = context.tau[context.all ? (head * rows + row) * groups.subspaces + s : head * rows + row];
            const bool last = s + 1 == groups.subspaces;
            for (int64_t i = 0; i < n; i += kLanes) {
                Floats x = gather(upper, load<Ints>(at + i));
                if (!context.all && s > 0) x = load<Floats>(sum + i) + x;  // in order: Fagin's rule relies on it
                if (!context.all) store(sum + i, x);
                if (!context.all && !last) continue;
                const uint32_t below = bits(x + slack < tau);
                const int64_t lanes = n - i < kLanes ? n - i : kLanes;
                for (int64_t lane = 0; lane < lanes; ++lane) {
                    const auto reached = static_cast<uint8_t>(~below >> lane & 1);
                    out[i + lane] = context.all && s > 0 ? out[i + lane] & reached : reached;
                }
            }
        }
    }
}

inline void groups_member(void* argument, int rank, Team& team) {
    const auto& context = *static_cast<GroupsContext*>(argument);
    const GroupsView& groups = *context.groups;
    const int64_t tiles = (groups.keys + kGroupTile - 1) / kGroupTile;
    float* sums = reinterpret_cast<float*>(scratch(4 * groups.rows * kGroupTile));
    for (int64_t i = rank; i < groups.heads * tiles; i += team.size()) {
        const int64_t first = i % tiles * kGroupTile, left = groups.keys - first;
        reach_tile(context, i / tiles, first, left < kGroupTile ? left : kGroupTile, sums);
    }
}

inline void groups_reach(const GroupsView& groups, const float* slack, const float* tau, bool all, uint8_t* out,
                         int num_threads) {
    GroupsContext context{&groups, slack, tau, all, out};
    parallel(num_threads, groups_member, &context);
}

}  // namespace louver::LOUVER_ISA
