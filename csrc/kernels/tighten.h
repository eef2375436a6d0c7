// Bounds made tight by scores (kernels/reference/tighten.py): keys above a cut are scored, and bounded by their score
// and its rounding.
#pragma once

#include "kernels/exact.h"
#include "kernels/schedule.h"

namespace louver::LOUVER_ISA {

struct TightenContext {
    const Problem* problem;
    const BoundsView* bounds;
    const float* cut;  // [batch, num_q_heads]
    bool retire;
    float *estimate, *half_width;  // as in bounds, scored keys in place of theirs
    uint8_t* state;                // [batch, num_q_heads, sketched]
    float* known;                  // [batch, num_q_heads, longest]
    int64_t longest;
    char* memory;
    int64_t bytes_per_thread;
};

constexpr int64_t kTightenTile = 64;  // keys of a block looked at together

inline int64_t tighten_floats(int64_t group, int64_t padded) {
    return padded_dims(group_floats(group, padded) + group * kTightenTile + kTightenTile + 4 * (padded + group + 1)) +
           64;
}

// Score tile keys `tokens` and put their scores in the place of wider bounds; decided ones become known.
inline void score_tile(const TightenContext& context, const Group& group, const Rows& keys, int64_t first_head,
                       const uint8_t* undecided, const int32_t* tokens, int64_t n, float* work) {
    float *scores = work, *norms = scores + group.size * kTightenTile, *buffer = norms + kTightenTile;
    const int64_t sketched = context.bounds->sketched;
    for (int64_t i = 0; i < n; ++i) keys.prefetch(tokens[i]);
    score_tokens<true>(keys, group, tokens, n, scores, kTightenTile, norms, buffer, Ahead{});
    for (int64_t g = 0; g < group.size; ++g) {
        const float each = score_error(group.padded) * group.norm[g];
        for (int64_t i = 0; i < n; ++i) {
            const int64_t token = tokens[i], at = (first_head + g) * sketched + token;
            const float score = scores[g * kTightenTile + i], slack = each * norms[i] + kAbsolute;
            if (token >= sketched || undecided[token] == 0) {
                context.known[(first_head + g) * context.longest + token] = score - slack;
            } else if (slack < context.bounds->half_width[at]) {
                context.estimate[at] = score, context.half_width[at] = slack;
            }
        }
    }
}

inline void tighten_member(void* argument, int rank, Team& team) {
    const auto& context = *static_cast<TightenContext*>(argument);
    const Problem& problem = *context.problem;
    const BoundsView& bounds = *context.bounds;
    const int64_t size = problem.group_size(), padded = padded_dims(problem.head_dim), sketched = bounds.sketched;
    float* memory = reinterpret_cast<float*>(context.memory + rank * context.bytes_per_thread);
    float* work = memory + group_floats(size, padded);
    for_units(problem.batch * problem.num_kv_heads, rank, team.size(), [&](int64_t unit, bool shared) {
        const int64_t row = unit / problem.num_kv_heads, head = unit % problem.num_kv_heads;
        const int64_t first_head = row * problem.num_q_heads + head * size, length = problem.row_len(row);
        const Group group = read_group(problem, row, head, memory);
        const Rows keys{&problem.keys, row, head, problem.kv_start[row], problem.head_dim, padded};
        const uint8_t* undecided = bounds.undecided + unit * sketched;
        const int64_t all = length > sketched ? length : sketched;
        const Part part = part_of(all, kTightenTile, shared ? rank : 0, shared ? team.size() : 1);
        for (int64_t begin = part.begin; begin < part.end; begin += kTightenTile) {
            const int64_t end = begin + kTightenTile < part.end ? begin + kTightenTile : part.end;
            int32_t tokens[kTightenTile];
            int64_t n = 0;
            const int64_t held = end < sketched ? end : sketched;  // of the tile, what bounds speak of
            for (int64_t i = begin; i < held; ++i) {
                bool reached = false;
                for (int64_t g = 0; g < size; ++g) {
                    const int64_t at = (first_head + g) * sketched + i;
                    const float upper = bounds.estimate[at] + bounds.half_width[at];
                    const bool mine = !(upper < context.cut[first_head + g]);
                    reached |= mine;
                    context.estimate[at] = bounds.estimate[at], context.half_width[at] = bounds.half_width[at];
                    const bool retired = context.retire && !mine;
                    context.state[at] = static_cast<uint8_t>(undecided[i] == 0 ? kDecided
                                                             : retired         ? kRetired
                                                                               : kUndecided);
                }
                if (i < length && (reached || undecided[i] == 0)) tokens[n++] = static_cast<int32_t>(i);
            }
            for (int64_t i = begin > sketched ? begin : sketched; i < end && i < length; ++i)
                tokens[n++] = static_cast<int32_t>(i);
            if (n > 0) score_tile(context, group, keys, first_head, undecided, tokens, n, work);
        }
    });
}

inline void tighten(const Problem& problem, const BoundsView& bounds, const float* cut, bool retire, float* estimate,
                    float* half_width, uint8_t* state, float* known, int64_t longest, int num_threads) {
    TightenContext context{&problem, &bounds, cut, retire, estimate, half_width, state, known, longest, nullptr, 0};
    context.bytes_per_thread = 4 * (tighten_floats(problem.group_size(), padded_dims(problem.head_dim)) + 64) / 64 * 64;
    context.memory = scratch(context.bytes_per_thread * num_threads);
    parallel(num_threads, tighten_member, &context);
}

}  // namespace louver::LOUVER_ISA
