// Exact scores of, and exact attention over, keys that a selection names: each query head has its own.
#pragma once

#include "kernels/dense.h"

namespace louver::LOUVER_ISA {

struct SelectionContext {
    const Problem* problem;
    const NamedKeys* named;
    float* scores;  // one per named key
    char* out;      // null where scores are wanted
    float* lse;
    float* memory;
    int64_t floats_per_thread;
};

inline int64_t selection_floats(int64_t padded) {
    return padded_dims(group_floats(1, padded) + stream_floats(1, padded) + dense_floats(1, padded) + kLanes);
}

inline void selection_member(void* argument, int rank, Team& team) {
    const auto& context = *static_cast<SelectionContext*>(argument);
    const Problem& problem = *context.problem;
    Problem alone = problem;  // every query head a group of its own
    alone.num_kv_heads = problem.num_q_heads;
    const int64_t padded = padded_dims(problem.head_dim);
    float* memory = context.memory + rank * context.floats_per_thread;
    float* stream_memory = memory + group_floats(1, padded);
    float* scores = stream_memory + stream_floats(1, padded);
    float* buffer = scores + kDenseTile;
    const Part mine = part_of(problem.batch * problem.num_q_heads, 1, rank, team.size());
    for (int64_t index = mine.begin; index < mine.end; ++index) {
        const int64_t row = index / problem.num_q_heads, q_head = index % problem.num_q_heads;
        const int64_t head = q_head / problem.group_size();
        const Group group = read_group(alone, row, q_head, memory);
        const Rows keys{&problem.keys, row, head, 0, problem.head_dim, padded};
        const Rows values{&problem.values, row, head, 0, problem.head_dim, padded};
        Stream stream = make_stream(stream_memory, 1, padded);
        const int64_t end = context.named->indptr[index + 1];
        for (int64_t i = context.named->indptr[index]; i < end; i += kDenseTile) {
            const int64_t n = end - i < kDenseTile ? end - i : kDenseTile;
            int32_t tokens[kDenseTile];
            for (int64_t j = 0; j < n; ++j) {
                tokens[j] = static_cast<int32_t>(context.named->indices[i + j]);
                keys.prefetch(tokens[j]);
            }
            if (context.out == nullptr) {
                score_tokens<false>(keys, group, tokens, n, context.scores + i, n, nullptr, buffer, Ahead{});
                continue;
            }
            score_tokens<false>(keys, group, tokens, n, scores, kDenseTile, nullptr, buffer, Ahead{&values, tokens, n});
            fold_logits(stream, 1, padded, scores, kDenseTile, n, problem.softmax_scale);
            add_tokens(values, tokens, n, scores, kDenseTile, 1, stream.out, nullptr, buffer, Ahead{});
        }
        if (context.out != nullptr) write_stream(alone, stream, row, q_head, context.out, context.lse);
    }
}

inline void run_selection(const Problem& problem, const NamedKeys& named, float* scores, char* out, float* lse,
                          int num_threads) {
    const int64_t floats = selection_floats(padded_dims(problem.head_dim));
    SelectionContext context{&problem, &named, scores, out, lse, nullptr, floats};
    context.memory = reinterpret_cast<float*>(scratch(4 * floats * num_threads));
    parallel(num_threads, selection_member, &context);
}

// The score of every named key.
inline void score(const Problem& problem, const NamedKeys& named, float* scores, int num_threads) {
    run_selection(problem, named, scores, nullptr, nullptr, num_threads);
}

// Attention over the named keys; a head that names none gives 0 and -infinity.
inline void attend_selection(const Problem& problem, const NamedKeys& named, char* out, float* lse, int num_threads) {
    run_selection(problem, named, nullptr, out, lse, num_threads);
}

}  // namespace louver::LOUVER_ISA
