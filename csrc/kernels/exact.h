// Keys and values as stored, of the tokens a list names: scores with their rounding, and weighted sums.
#pragma once

#include "kernels/query.h"

namespace louver::LOUVER_ISA {

constexpr int64_t kAhead = 12;  // tokens of a list touched before their turn

LOUVER_INLINE void prefetch_row(const char* row, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
}

// One (row, KV head)'s tokens in row coordinates: index i is position kv_start + i.
struct Rows {
    const CacheView* view;
    int64_t row, head, start, head_dim, padded;
    const char* at(int64_t index) const { return view->token(row, head, start + index); }
    bool direct() const { return view->stride_dim == 1 && head_dim % kLanes == 0; }
    void prefetch(int64_t index) const {
        if (direct()) prefetch_row(at(index), head_dim * view->item_bytes);
    }
};

// Largest |computed - real| of a float32 score over the chains below, per unit of |q| |k|.
inline float score_error(int64_t padded) {
    return kSafety * gamma(static_cast<float>(padded / kLanes + 10)) * (1 + 3e-5f);
}

// Scores of four rows for up to four heads, and where asked for their norms; scores[g * stride + i].
template <class Type, int kHeads, bool kNorms>
LOUVER_INLINE void score_four(const char* const* rows, const Group& group, int64_t g, float* scores, int64_t stride,
                              float* norms) {
    const int64_t padded = group.padded;
    Floats dot[kHeads][4] = {}, squares[4] = {};
#if defined(__AVX512BF16__)
    if constexpr (Type::is_bfloat16) {
        if (group.bfloat16 !=
            nullptr) {  // products of two bfloat16 numbers are exact in float32, two channels at a time
            auto pairs = [](const void* p) { return (__m512bh)_mm512_loadu_si512(p); };
            for (int64_t d = 0; d < padded; d += 2 * kLanes) {
                __m512bh k[4];
                for (int i = 0; i < 4; ++i) k[i] = pairs(rows[i] + d * 2);
                for (int i = 0; i < 4 && kNorms; ++i)
                    squares[i] = (Floats)_mm512_dpbf16_ps((__m512)squares[i], k[i], k[i]);
                for (int h = 0; h < kHeads; ++h) {
                    const __m512bh q = pairs(group.bfloat16 + (g + h) * padded + d);
                    for (int i = 0; i < 4; ++i) dot[h][i] = (Floats)_mm512_dpbf16_ps((__m512)dot[h][i], k[i], q);
                }
            }
        }
    }
    if (!Type::is_bfloat16 || group.bfloat16 == nullptr)
#endif
    {
        constexpr int kAtOnce = kRegisters == 32 || kHeads + kNorms < 3 ? 4 : 2;  // rows whose sums stay in registers
        for (int first = 0; first < 4; first += kAtOnce) {
            Floats part[kHeads][kAtOnce] = {}, norm[kAtOnce] = {};
            for (int64_t d = 0; d < padded; d += kLanes) {
                Floats k[kAtOnce];
                for (int i = 0; i < kAtOnce; ++i) k[i] = Type::load_lanes(rows[first + i] + d * Type::bytes);
                for (int i = 0; i < kAtOnce && kNorms; ++i) norm[i] += k[i] * k[i];
                for (int h = 0; h < kHeads; ++h) {
                    const Floats q = load<Floats>(group.q + (g + h) * padded + d);
                    for (int i = 0; i < kAtOnce; ++i) part[h][i] += k[i] * q;
                }
            }
            for (int i = 0; i < kAtOnce; ++i) {
                squares[first + i] = norm[i];
                for (int h = 0; h < kHeads; ++h) dot[h][first + i] = part[h][i];
            }
        }
    }
    for (int h = 0; h < kHeads; ++h) sum4(dot[h], scores + h * stride);
    if (!kNorms) return;
    alignas(16) float sums[4];
    sum4(squares, sums);
    for (int i = 0; i < 4; ++i) norms[i] = std::sqrt(sums[i]) * kNormInflation + kTinyNorm;
}

template <class Type, bool kNorms>
LOUVER_INLINE void score_group(const char* const* rows, const Group& group, float* scores, int64_t stride,
                               float* norms) {
    int64_t g = 0;
    for (; g + 4 <= group.size; g += 4) {
        if (kNorms && g == 0) score_four<Type, 4, true>(rows, group, g, scores, stride, norms);
        if (!kNorms || g != 0) score_four<Type, 4, false>(rows, group, g, scores + g * stride, stride, nullptr);
    }
    const bool first = kNorms && g == 0;
    float* to = scores + g * stride;
    switch (group.size - g) {
        case 1:
            if (first) return score_four<Type, 1, true>(rows, group, g, to, stride, norms);
            return score_four<Type, 1, false>(rows, group, g, to, stride, nullptr);
        case 2:
            if (first) return score_four<Type, 2, true>(rows, group, g, to, stride, norms);
            return score_four<Type, 2, false>(rows, group, g, to, stride, nullptr);
        case 3:
            if (first) return score_four<Type, 3, true>(rows, group, g, to, stride, norms);
            return score_four<Type, 3, false>(rows, group, g, to, stride, nullptr);
    }
}

// What a loop over rows touches in advance: the rows it, or the next loop, will read. Hardware prefetching stops at
// pages.
struct Ahead {
    const Rows* rows = nullptr;
    const int32_t* tokens = nullptr;  // tokens[i] is touched when row i is worked on
    int64_t count = 0;
    void touch(int64_t i) const {
        if (i < count) rows->prefetch(tokens[i]);
    }
};

// scores[g * stride + i] and, where norms is given, norms[i] >= |k_i| of the tokens tokens[0 .. count). buffer holds
// 4 * (padded + group.size + 1) floats.
template <bool kNorms>
inline void score_tokens(const Rows& keys, const Group& group, const int32_t* tokens, int64_t count, float* scores,
                         int64_t stride, float* norms, float* buffer, const Ahead& ahead) {
    const char* rows[4];
    with_dtype(keys.view->dtype, [&](auto type) {
        using Type = decltype(type);
        for (int64_t i = 0; i < count; i += 4) {
            for (int64_t j = 0; j < 4; ++j) ahead.touch(i + j);
            for (int64_t j = 0; j < 4; ++j) rows[j] = keys.at(tokens[i + j < count ? i + j : count - 1]);
            const bool whole = i + 4 <= count;
            float* rest = buffer + 4 * keys.padded;  // where the last few go first: what follows them is not ours
            float *to = whole ? scores + i : rest, *norms_to = whole ? norms + i : rest + 4 * group.size;
            const int64_t step = whole ? stride : 4;
            if (keys.direct()) {
                score_group<Type, kNorms>(rows, group, to, step, norms_to);
            } else {
                for (int64_t j = 0; j < 4; ++j) {
                    load_row(*keys.view, rows[j], keys.head_dim, keys.padded, buffer + j * keys.padded);
                    rows[j] = reinterpret_cast<const char*>(buffer + j * keys.padded);
                }
                score_group<Float32, kNorms>(rows, group, to, step, norms_to);
            }
            for (int64_t j = i; !whole && j < count; ++j) {
                for (int64_t g = 0; g < group.size; ++g) scores[g * stride + j] = rest[4 * g + j - i];
                if (kNorms) norms[j] = rest[4 * group.size + j - i];
            }
            for (int64_t j = i; kNorms && j < i + 4 && j < count; ++j) {
                if (norms[j] < group.longest) continue;
                load_row(*keys.view, keys.at(tokens[j]), keys.head_dim, keys.padded, buffer);
                norms[j] = huge_norm_above(buffer, keys.padded);
                if (!(norms[j] < group.longest)) norms[j] = kInfinity;  // of its score nothing is known
            }
        }
    });
}

template <class Type, int kHeads, int kVectors, bool kTouch>
LOUVER_INLINE void add_tile(const char* const* rows, int64_t count, const float* weights, int64_t stride, float* out,
                            int64_t padded, int64_t d, const Ahead& ahead) {
    Floats total[kHeads][kVectors];
    for (int g = 0; g < kHeads; ++g)
        for (int j = 0; j < kVectors; ++j) total[g][j] = splat(0);
    for (int64_t i = 0; i < count; ++i) {
        if (kTouch) ahead.touch(i);
        Floats v[kVectors];
        for (int j = 0; j < kVectors; ++j) v[j] = Type::load_lanes(rows[i] + (d + j * kLanes) * Type::bytes);
        for (int g = 0; g < kHeads; ++g) {
            const float w = weights[g * stride + i];
            for (int j = 0; j < kVectors; ++j) total[g][j] += w * v[j];
        }
    }
    for (int g = 0; g < kHeads; ++g)
        for (int j = 0; j < kVectors; ++j) {
            float* to = out + g * padded + d + j * kLanes;
            store(to, load<Floats>(to) + total[g][j]);  // tile by tile, so that rounding grows with the sum of both
        }
}

template <class Type, int kHeads>
LOUVER_INLINE void add_heads(const char* const* rows, int64_t count, const float* weights, int64_t stride, float* out,
                             int64_t padded, bool touch, const Ahead& ahead) {
    constexpr int kVectors = kRegisters == 32 || kHeads < 3 ? 4 : 2;  // whose sums stay in registers
    int64_t d = 0;
    for (; d + kVectors * kLanes <= padded; d += kVectors * kLanes) {
        if (touch && d == 0)
            add_tile<Type, kHeads, kVectors, true>(rows, count, weights, stride, out, padded, d, ahead);
        if (!touch || d != 0)
            add_tile<Type, kHeads, kVectors, false>(rows, count, weights, stride, out, padded, d, ahead);
    }
    for (; d < padded; d += kLanes)
        add_tile<Type, kHeads, 1, false>(rows, count, weights, stride, out, padded, d, ahead);
}

// out[g * padded + d] += sum_i weights[g * stride + i] value_i[d] over count rows of Type, padded channels each.
template <class Type>
LOUVER_INLINE void add_rows(const char* const* rows, int64_t count, const float* weights, int64_t stride, int64_t heads,
                            float* out, int64_t padded, const Ahead& ahead) {
    int64_t g = 0;
    for (; g + 4 <= heads; g += 4)
        add_heads<Type, 4>(rows, count, weights + g * stride, stride, out + g * padded, padded, g == 0, ahead);
    const float* w = weights + g * stride;
    float* to = out + g * padded;
    if (heads - g == 1) add_heads<Type, 1>(rows, count, w, stride, to, padded, g == 0, ahead);
    if (heads - g == 2) add_heads<Type, 2>(rows, count, w, stride, to, padded, g == 0, ahead);
    if (heads - g == 3) add_heads<Type, 3>(rows, count, w, stride, to, padded, g == 0, ahead);
}

constexpr int64_t kValueTile = 32;  // rows summed at a time: they stay in the first-level cache between channel tiles

// Add the weighted values of tokens[0 .. count) to out [heads, padded]. Where norms is given, norms[i] >= |v_i|.
// buffer holds kValueTile * padded floats.
inline void add_tokens(const Rows& values, const int32_t* tokens, int64_t count, const float* weights, int64_t stride,
                       int64_t heads, float* out, float* norms, float* buffer, const Ahead& ahead) {
    const char* rows[kValueTile];
    with_dtype(values.view->dtype, [&](auto type) {
        using Type = decltype(type);
        for (int64_t i = 0; i < count; i += kValueTile) {
            const int64_t n = count - i < kValueTile ? count - i : kValueTile;
            for (int64_t j = 0; j < n; ++j) rows[j] = values.at(tokens[i + j]);
            const Ahead now{ahead.rows, ahead.tokens + i, ahead.count - i};
            const bool direct = values.direct();
            for (int64_t j = 0; j < n && !direct; ++j) {
                load_row(*values.view, rows[j], values.head_dim, values.padded, buffer + j * values.padded);
                rows[j] = reinterpret_cast<const char*>(buffer + j * values.padded);
            }
            if (norms != nullptr)
                for (int64_t j = 0; j < n; ++j) {
                    Floats squares = {};
                    for (int64_t d = 0; d < values.padded; d += kLanes) {
                        const Floats v =
                            direct ? Type::load_lanes(rows[j] + d * Type::bytes) : Float32::load_lanes(rows[j] + 4 * d);
                        squares += v * v;
                    }
                    norms[i + j] = std::sqrt(sum(squares)) * kNormInflation + kTinyNorm;
                }
            if (direct) add_rows<Type>(rows, n, weights + i, stride, heads, out, values.padded, now);
            if (!direct) add_rows<Float32>(rows, n, weights + i, stride, heads, out, values.padded, now);
        }
    });
}

}  // namespace louver::LOUVER_ISA
