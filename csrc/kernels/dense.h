// Dense decode attention: grouped heads, streaming softmax, one pass over keys and values. Float32 accumulation.
#pragma once

#include "kernels/exact.h"
#include "kernels/schedule.h"

namespace louver::LOUVER_ISA {

constexpr int64_t kDenseTile = kLanes == 16 ? 32 : 64;  // keys scored before their values are read

// The state of a streaming softmax for a group: sums are in units of e^peak.
struct Stream {
    float *out, *total, *peak;  // [group, padded], [group], [group]
};

inline int64_t stream_floats(int64_t group, int64_t padded) { return group * (padded + 2); }

inline Stream make_stream(float* memory, int64_t group, int64_t padded) {
    Stream stream{memory, memory + group * padded, memory + group * (padded + 1)};
    std::memset(memory, 0, static_cast<size_t>(4 * stream_floats(group, padded)));
    for (int64_t g = 0; g < group; ++g) stream.peak[g] = -kInfinity;
    return stream;
}

// Turn logits[g, n] of one tile into weights e^(logit - peak), rescaling what the stream holds. NaN stays NaN.
inline void fold_logits(Stream& stream, int64_t group, int64_t padded, float* logits, int64_t stride, int64_t n,
                        float softmax_scale) {
    for (int64_t g = 0; g < group; ++g) {
        float* x = logits + g * stride;
        Floats top = splat(-kInfinity);
        for (int64_t i = 0; i < n; i += kLanes) {
            Floats v = load<Floats>(x + i) * softmax_scale;
            if (n - i < kLanes) v = select(first_lanes(n - i), v, splat(-kInfinity));
            store(x + i, v);
            top = max(top, v);
        }
        const float peak = largest(top) > stream.peak[g] ? largest(top) : stream.peak[g];
        if (peak > stream.peak[g] && stream.total[g] != 0) {
            const float shrink = exp1(stream.peak[g] - peak);
            stream.total[g] *= shrink;
            for (int64_t d = 0; d < padded; d += kLanes)
                store(stream.out + g * padded + d, load<Floats>(stream.out + g * padded + d) * shrink);
        }
        stream.peak[g] = peak;
        const float shift = peak == -kInfinity ? 0.0f : peak;
        Floats total = {};
        for (int64_t i = 0; i < n; i += kLanes) {
            const Floats v = load<Floats>(x + i);
            const Floats w = select(v < kLowestExponent + shift, splat(0), exp(v - shift));
            store(x + i, w);
            total += w;
        }
        stream.total[g] += sum(total);
    }
}

// The addresses of a tile's keys and values; past its end those of its last token.
struct TileRows {
    const char *keys[kDenseTile], *values[kDenseTile];
    static void name(const Rows& from, int64_t begin, int64_t n, const char** to) {
        const char* first = from.at(begin);
        const int64_t stride = from.view->stride_token * from.view->item_bytes;
        const bool paged = from.view->block_table != nullptr;
        for (int64_t i = 0; i < n; ++i) to[i] = paged ? from.at(begin + i) : first + i * stride;
        for (int64_t i = n; i < kDenseTile; ++i) to[i] = to[n - 1];
    }
};

// Rows asked for, into the second-level cache, as others are read.
struct NextRows {
    const char* const* rows;
    LOUVER_INLINE void touch(int64_t i, int64_t first, int64_t bytes) const {
        for (int64_t b = first; b < first + bytes; b += 64) __builtin_prefetch(rows[i] + b, 0, 2);
    }
};

// stream_tokens of rows that are read where they are. While a tile's keys are scored its values are asked for, and
// while those are added the next tile's keys; line by line, as a burst of them would wait for what can be on its way at
// once.
template <class Type>
inline void stream_rows(Stream& stream, const Group& group, const Rows& keys, const Rows& values, int64_t begin,
                        int64_t end, float softmax_scale, float* scores) {
    TileRows tiles[2];
    auto length = [&](int64_t i) { return end - i < kDenseTile ? end - i : kDenseTile; };
    auto name = [&](int64_t i, TileRows& tile) {
        TileRows::name(keys, i, length(i), tile.keys);
        TileRows::name(values, i, length(i), tile.values);
    };
    if (begin < end) name(begin, tiles[0]);
    int now = 0;
    for (int64_t i = begin; i < end; i += kDenseTile, now = 1 - now) {
        const int64_t n = length(i);
        const TileRows& tile = tiles[now];
        const TileRows& next = tiles[i + n < end ? 1 - now : now];
        if (i + n < end) name(i + n, tiles[1 - now]);
        for (int64_t j = 0; j < n; j += 4) {
            const NextRows ahead{tile.values + j};
            score_group<Type, false>(tile.keys + j, group, scores + j, kDenseTile, nullptr,
                                     [&](int64_t b) LOUVER_ALWAYS_INLINE {
                                         for (int64_t k = 0; k < 4; ++k) ahead.touch(k, b, 64);
                                     });
        }
        fold_logits(stream, group.size, group.padded, scores, kDenseTile, n, softmax_scale);
        for (int64_t j = 0; j < n; j += kValueTile)
            add_rows<Type>(tile.values + j, n - j < kValueTile ? n - j : kValueTile, scores + j, kDenseTile, group.size,
                           stream.out, group.padded, NextRows{next.keys + j});
    }
}

// Add tokens begin .. end of one (row, KV head) to a stream. memory: see dense_floats.
inline void stream_tokens(Stream& stream, const Group& group, const Rows& keys, const Rows& values, int64_t begin,
                          int64_t end, float softmax_scale, float* memory) {
    float* scores = memory;
    if (kLanes == 16 && keys.direct() && values.direct() && keys.view->dtype == values.view->dtype) {
        with_dtype(keys.view->dtype, [&](auto type) {
            stream_rows<decltype(type)>(stream, group, keys, values, begin, end, softmax_scale, scores);
        });
        return;
    }
    float* buffer = scores + group.size * kDenseTile;
    int32_t tokens[2 * kDenseTile];
    for (int64_t i = begin; i < end; i += kDenseTile) {
        const int64_t n = end - i < kDenseTile ? end - i : kDenseTile;
        const int64_t next = end - i - n < kDenseTile ? end - i - n : kDenseTile;
        for (int64_t j = 0; j < n + next; ++j) tokens[j] = static_cast<int32_t>(i + j);
        score_tokens<false>(keys, group, tokens, n, scores, kDenseTile, nullptr, buffer, Ahead{&values, tokens, n});
        fold_logits(stream, group.size, group.padded, scores, kDenseTile, n, softmax_scale);
        add_tokens(values, tokens, n, scores, kDenseTile, group.size, stream.out, nullptr, buffer,
                   Ahead{&keys, tokens + n, next});
    }
}

inline int64_t dense_floats(int64_t group, int64_t padded) { return group * kDenseTile + kValueTile * padded + kLanes; }

// Fold `other` into `into`; both over the same group.
inline void merge_streams(Stream& into, const Stream& other, int64_t group, int64_t padded) {
    for (int64_t g = 0; g < group; ++g) {
        if (other.total[g] == 0) continue;
        const float peak = into.peak[g] > other.peak[g] ? into.peak[g] : other.peak[g];
        const float a = into.total[g] == 0 ? 0.0f : exp1(into.peak[g] - peak), b = exp1(other.peak[g] - peak);
        into.total[g] = into.total[g] * a + other.total[g] * b;
        for (int64_t d = 0; d < padded; ++d)
            into.out[g * padded + d] = into.out[g * padded + d] * a + other.out[g * padded + d] * b;
        into.peak[g] = peak;
    }
}

struct DenseContext {
    const Problem* problem;
    char* out;
    float* lse;
    float* memory;  // per thread: a group, a stream, scratch
    int64_t floats_per_thread;
};

inline int64_t dense_floats_per_thread(const Problem& problem) {
    const int64_t group = problem.group_size(), padded = padded_dims(problem.head_dim);
    const int64_t floats = group_floats(group, padded) + stream_floats(group, padded) + dense_floats(group, padded);
    return (floats + 2 * kLanes) / kLanes * kLanes;
}

inline void write_stream(const Problem& problem, const Stream& stream, int64_t row, int64_t head, char* out,
                         float* lse) {
    const int64_t group = problem.group_size(), padded = padded_dims(problem.head_dim);
    const int64_t bytes = problem.q_dtype == DType::float32 ? 4 : 2;
    for (int64_t g = 0; g < group; ++g) {
        const int64_t index = row * problem.num_q_heads + head * group + g;
        const float total = stream.total[g], inverse = total == 0 ? 0.0f : 1 / total;
        for (int64_t d = 0; d < problem.head_dim; ++d)
            store_scalar(problem.q_dtype, out + (index * problem.head_dim + d) * bytes,
                         stream.out[g * padded + d] * inverse);
        lse[index] = total == 0 ? -kInfinity : stream.peak[g] + std::log(total);
    }
}

inline void dense_member(void* argument, int rank, Team& team) {
    const auto& context = *static_cast<DenseContext*>(argument);
    const Problem& problem = *context.problem;
    const int64_t group_size = problem.group_size(), padded = padded_dims(problem.head_dim);
    auto memory_of = [&](int member) { return context.memory + member * context.floats_per_thread; };
    auto stream_of = [&](int member) { return memory_of(member) + group_floats(group_size, padded); };
    float* work = stream_of(rank) + stream_floats(group_size, padded);
    for_units(problem.batch * problem.num_kv_heads, rank, team.size(), [&](int64_t unit, bool shared) {
        const int64_t row = unit / problem.num_kv_heads, head = unit % problem.num_kv_heads;
        const Group group = read_group(problem, row, head, memory_of(rank));
        const Rows keys{&problem.keys, row, head, problem.kv_start[row], problem.head_dim, padded};
        const Rows values{&problem.values, row, head, problem.kv_start[row], problem.head_dim, padded};
        const int64_t n = problem.row_len(row);
        const Part part = shared ? part_of(n, kDenseTile, rank, team.size()) : Part{0, n};
        Stream stream = make_stream(stream_of(rank), group_size, padded);
        stream_tokens(stream, group, keys, values, part.begin, part.end, problem.softmax_scale, work);
        if (shared) team.barrier();
        if (shared && rank == 0)
            for (int other = 1; other < team.size(); ++other) {
                float* at = stream_of(other);
                merge_streams(stream, Stream{at, at + group_size * padded, at + group_size * (padded + 1)}, group_size,
                              padded);
            }
        if (!shared || rank == 0) write_stream(problem, stream, row, head, context.out, context.lse);
        if (shared) team.barrier();
    });
}

inline void attend_dense(const Problem& problem, char* out, float* lse, int num_threads) {
    const int64_t floats = dense_floats_per_thread(problem);
    DenseContext context{&problem, out, lse, reinterpret_cast<float*>(scratch(4 * floats * num_threads)), floats};
    parallel(num_threads, dense_member, &context);
}

}  // namespace louver::LOUVER_ISA
