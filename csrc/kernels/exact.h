// Keys and values as stored, of the tokens a list names: scores with their rounding, and weighted sums.
#pragma once

#include "kernels/query.h"

namespace louver::LOUVER_ISA {

constexpr int kHeadTile = 4;   // heads whose accumulators share the registers
constexpr int64_t kAhead = 6;  // tokens prefetched before their turn

// One (row, KV head)'s tokens in row coordinates: index i is position kv_start + i.
struct Rows {
    const CacheView* view;
    int64_t row, head, start, head_dim, padded;
    const char* at(int64_t index) const { return view->token(row, head, start + index); }
    bool direct() const { return view->stride_dim == 1 && head_dim % kLanes == 0; }
    void prefetch(int64_t index) const {
        const char* p = at(index);
        if (direct())
            for (int64_t b = 0; b < head_dim * view->item_bytes; b += 64) __builtin_prefetch(p + b);
    }
};

// Largest |computed - real| of a float32 score over the chains below, per unit of |q| |k|.
inline float score_error(int64_t padded) {
    return kSafety * gamma(static_cast<float>(padded / kLanes + 10)) * (1 + 3e-5f);
}

template <class Type, int kHeads>
LOUVER_INLINE void score_row(const char* key, const float* q, int64_t padded, float* scores, int64_t stride,
                             float* norm) {
    f32x16 dot[kHeads] = {}, squares = {};
    for (int64_t d = 0; d < padded; d += kLanes) {
        const f32x16 k = Type::load16(key + d * Type::bytes);
        if (norm != nullptr) squares += k * k;
        for (int g = 0; g < kHeads; ++g) dot[g] += k * load<f32x16>(q + g * padded + d);
    }
    if (kHeads == 4) {
        alignas(16) float sums[4];
        sum4(dot, sums);
        for (int g = 0; g < kHeads; ++g) scores[g * stride] = sums[g];
    } else {
        for (int g = 0; g < kHeads; ++g) scores[g * stride] = sum(dot[g]);
    }
    if (norm != nullptr) *norm = std::sqrt(sum(squares)) * kNormInflation + kTinyNorm;
}

template <class Type>
LOUVER_INLINE void score_heads(const char* key, const Group& group, float* scores, int64_t stride, float* norm) {
    int64_t g = 0;
    for (; g + kHeadTile <= group.size; g += kHeadTile)
        score_row<Type, kHeadTile>(key, group.q + g * group.padded, group.padded, scores + g * stride, stride,
                                   g == 0 ? norm : nullptr);
    const float* q = group.q + g * group.padded;
    float* out = scores + g * stride;
    float* first = g == 0 ? norm : nullptr;
    if (group.size - g == 1) score_row<Type, 1>(key, q, group.padded, out, stride, first);
    if (group.size - g == 2) score_row<Type, 2>(key, q, group.padded, out, stride, first);
    if (group.size - g == 3) score_row<Type, 3>(key, q, group.padded, out, stride, first);
}

// scores[g * stride + i] and norms[i] >= |k_i| for the tokens tokens[0 .. count). buffer holds padded floats.
inline void score_tokens(const Rows& keys, const Group& group, const int32_t* tokens, int64_t count, float* scores,
                         int64_t stride, float* norms, float* buffer) {
    with_dtype(keys.view->dtype, [&](auto type) {
        using Type = decltype(type);
        for (int64_t i = 0; i < count; ++i) {
            if (i + kAhead < count) keys.prefetch(tokens[i + kAhead]);
            const char* key = keys.at(tokens[i]);
            if (keys.direct()) {
                score_heads<Type>(key, group, scores + i, stride, norms + i);
            } else {
                load_row(*keys.view, key, keys.head_dim, keys.padded, buffer);
                score_heads<Float32>(reinterpret_cast<const char*>(buffer), group, scores + i, stride, norms + i);
            }
            if (!(norms[i] < kInfinity)) {
                load_row(*keys.view, key, keys.head_dim, keys.padded, buffer);
                norms[i] = huge_norm_above(buffer, keys.padded);
            }
        }
    });
}

template <class Type, int kHeads, int kVectors>
LOUVER_INLINE void add_tile(const char* const* rows, int64_t count, const float* weights, int64_t stride, float* out,
                            int64_t padded, int64_t d) {
    f32x16 total[kHeads][kVectors];
    for (int g = 0; g < kHeads; ++g)
        for (int j = 0; j < kVectors; ++j) total[g][j] = splat(0);
    for (int64_t i = 0; i < count; ++i) {
        f32x16 v[kVectors];
        for (int j = 0; j < kVectors; ++j) v[j] = Type::load16(rows[i] + (d + j * kLanes) * Type::bytes);
        for (int g = 0; g < kHeads; ++g) {
            const float w = weights[g * stride + i];
            for (int j = 0; j < kVectors; ++j) total[g][j] += w * v[j];
        }
    }
    for (int g = 0; g < kHeads; ++g)
        for (int j = 0; j < kVectors; ++j) {
            float* to = out + g * padded + d + j * kLanes;
            store(to, load<f32x16>(to) + total[g][j]);  // tile by tile, so that rounding grows with the sum of both
        }
}

template <class Type, int kHeads>
LOUVER_INLINE void add_heads(const char* const* rows, int64_t count, const float* weights, int64_t stride, float* out,
                             int64_t padded) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= padded; d += 4 * kLanes)
        add_tile<Type, kHeads, 4>(rows, count, weights, stride, out, padded, d);
    for (; d < padded; d += kLanes) add_tile<Type, kHeads, 1>(rows, count, weights, stride, out, padded, d);
}

// out[g * padded + d] += sum_i weights[g * stride + i] value_i[d] over count rows of Type, padded channels each.
template <class Type>
LOUVER_INLINE void add_rows(const char* const* rows, int64_t count, const float* weights, int64_t stride, int64_t heads,
                            float* out, int64_t padded) {
    int64_t g = 0;
    for (; g + kHeadTile <= heads; g += kHeadTile)
        add_heads<Type, kHeadTile>(rows, count, weights + g * stride, stride, out + g * padded, padded);
    const float* w = weights + g * stride;
    if (heads - g == 1) add_heads<Type, 1>(rows, count, w, stride, out + g * padded, padded);
    if (heads - g == 2) add_heads<Type, 2>(rows, count, w, stride, out + g * padded, padded);
    if (heads - g == 3) add_heads<Type, 3>(rows, count, w, stride, out + g * padded, padded);
}

constexpr int64_t kValueTile = 32;  // rows summed at a time: they stay in the first-level cache between channel tiles

// Add the weighted values of tokens[0 .. count) to out [heads, padded]. Where norms is given, norms[i] >= |v_i|.
// buffer holds kValueTile * padded floats.
inline void add_tokens(const Rows& values, const int32_t* tokens, int64_t count, const float* weights, int64_t stride,
                       int64_t heads, float* out, float* norms, float* buffer) {
    const char* rows[kValueTile];
    with_dtype(values.view->dtype, [&](auto type) {
        using Type = decltype(type);
        for (int64_t i = 0; i < count; i += kValueTile) {
            const int64_t n = count - i < kValueTile ? count - i : kValueTile;
            for (int64_t j = 0; j < n; ++j) rows[j] = values.at(tokens[i + j]);
            for (int64_t j = i + n; j < i + n + kValueTile && j < count; ++j) values.prefetch(tokens[j]);
            const bool direct = values.direct();
            for (int64_t j = 0; j < n && !direct; ++j) {
                load_row(*values.view, rows[j], values.head_dim, values.padded, buffer + j * values.padded);
                rows[j] = reinterpret_cast<const char*>(buffer + j * values.padded);
            }
            if (norms != nullptr)
                for (int64_t j = 0; j < n; ++j) {
                    f32x16 squares = {};
                    for (int64_t d = 0; d < values.padded; d += kLanes) {
                        const f32x16 v =
                            direct ? Type::load16(rows[j] + d * Type::bytes) : Float32::load16(rows[j] + 4 * d);
                        squares += v * v;
                    }
                    norms[i + j] = std::sqrt(sum(squares)) * kNormInflation + kTinyNorm;
                }
            if (direct) add_rows<Type>(rows, n, weights + i, stride, heads, out, values.padded);
            if (!direct) add_rows<Float32>(rows, n, weights + i, stride, heads, out, values.padded);
        }
    });
}

}  // namespace louver::LOUVER_ISA
