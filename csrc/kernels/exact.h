// Keys and values as stored, of the tokens a list names: scores with their rounding, and weighted sums.
#pragma once

#include "kernels/query.h"

namespace louver::LOUVER_ISA {

constexpr int64_t kAhead = 12;  // tokens of a list touched before their turn

LOUVER_INLINE void prefetch_row(const char* row, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) touch_line(row + b);
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

// Channels d .. of a row as vectors. Of bfloat16 pairs of channels come apart where a register holds both, at half the
// instructions of widening: the even ones of two vectors, then the odd ones; in_order puts sums back.
template <class Type, int kVectors>
LOUVER_INLINE void load_apart(const char* row, int64_t d, Floats* v) {
#if defined(__AVX512F__)
    if constexpr (Type::is_bfloat16 && kVectors % 2 == 0) {
        for (int j = 0; j < kVectors; j += 2) {
            const __m512i pairs = _mm512_loadu_si512(row + (d + j * kLanes) * 2);
            v[j] = (Floats)_mm512_slli_epi32(pairs, 16);
            v[j + 1] = (Floats)_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
        }
        return;
    }
#endif
    for (int j = 0; j < kVectors; ++j) v[j] = Type::load_lanes(row + (d + j * kLanes) * Type::bytes);
}
template <class Type, int kVectors>
LOUVER_INLINE void in_order(Floats* v) {
#if defined(__AVX512F__)
    if constexpr (Type::is_bfloat16 && kVectors % 2 == 0) {
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        for (int j = 0; j < kVectors; j += 2) {
            const __m512 even = (__m512)v[j], odd = (__m512)v[j + 1];
            v[j] = (Floats)_mm512_permutex2var_ps(even, low, odd);
            v[j + 1] = (Floats)_mm512_permutex2var_ps(even, high, odd);
        }
    }
#endif
    (void)v;
}

// The sums of dot[h][i], to scores[h * stride + i].
template <int kHeads>
LOUVER_INLINE void store_sums(const Floats (*dot)[4], float* scores, int64_t stride) {
#if defined(__AVX512F__)
    if constexpr (kHeads >= 3) {
        Floats all[16] = {};
        for (int h = 0; h < kHeads; ++h)
            for (int i = 0; i < 4; ++i) all[4 * h + i] = dot[h][i];
        const __m512 sums = (__m512)sum16(all);
        _mm_storeu_ps(scores, _mm512_castps512_ps128(sums));
        _mm_storeu_ps(scores + stride, _mm512_extractf32x4_ps(sums, 1));
        _mm_storeu_ps(scores + 2 * stride, _mm512_extractf32x4_ps(sums, 2));
        if (kHeads == 4) _mm_storeu_ps(scores + 3 * stride, _mm512_extractf32x4_ps(sums, 3));
        return;
    }
#endif
    for (int h = 0; h < kHeads; ++h) sum4(dot[h], scores + h * stride);
}

// Scores of four rows for up to four heads, and where asked for their norms; scores[g * stride + i]. touch(b) is called
// as the rows' bytes from b on are read.
template <class Type, int kHeads, bool kNorms, class Touch>
LOUVER_INLINE void score_four(const char* const* rows, const Group& group, int64_t g, float* scores, int64_t stride,
                              float* norms, Touch touch) {
    const int64_t padded = group.padded;
    Floats dot[kHeads][4] = {}, squares[4] = {};
    bool done = false;
    if constexpr (kReadsApart && Type::is_bfloat16) {
        done = group.apart != nullptr;
        for (int64_t d = 0; done && d < padded; d += 2 * kLanes) {
            touch(2 * d);
            Floats k[4][2];
            for (int i = 0; i < 4; ++i) load_apart<Type, 2>(rows[i], d, k[i]);
            for (int i = 0; i < 4 && kNorms; ++i) squares[i] += k[i][0] * k[i][0], squares[i] += k[i][1] * k[i][1];
            for (int h = 0; h < kHeads; ++h)
                for (int j = 0; j < 2; ++j) {
                    const Floats q = load<Floats>(group.apart + (g + h) * padded + d + j * kLanes);
                    for (int i = 0; i < 4; ++i) dot[h][i] += k[i][j] * q;
                }
        }
    }
#if defined(__AVX512BF16__)
    if constexpr (Type::is_bfloat16) {  // products of two bfloat16 numbers are exact in float32, two channels at a time
        done = group.bfloat16 != nullptr;
        auto pairs = [](const void* p) { return (__m512bh)_mm512_loadu_si512(p); };
        for (int64_t d = 0; done && d < padded; d += 2 * kLanes) {
            touch(2 * d);
            __m512bh k[4];
            for (int i = 0; i < 4; ++i) k[i] = pairs(rows[i] + d * 2);
            for (int i = 0; i < 4 && kNorms; ++i) squares[i] = (Floats)_mm512_dpbf16_ps((__m512)squares[i], k[i], k[i]);
            for (int h = 0; h < kHeads; ++h) {
                const __m512bh q = pairs(group.bfloat16 + (g + h) * padded + d);
                for (int i = 0; i < 4; ++i) dot[h][i] = (Floats)_mm512_dpbf16_ps((__m512)dot[h][i], k[i], q);
            }
        }
    }
#endif
    if (!done) {
        constexpr int kAtOnce = kRegisters == 32 || kHeads + kNorms < 3 ? 4 : 2;  // rows whose sums stay in registers
        for (int first = 0; first < 4; first += kAtOnce) {
            Floats part[kHeads][kAtOnce] = {}, norm[kAtOnce] = {};
            for (int64_t d = 0; d < padded; d += kLanes) {
                if (first == 0) touch(d * Type::bytes);
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
    store_sums<kHeads>(dot, scores, stride);
    if (!kNorms) return;
    alignas(16) float sums[4];
    sum4(squares, sums);
    for (int i = 0; i < 4; ++i) norms[i] = std::sqrt(sums[i]) * kNormInflation + kTinyNorm;
}

struct NoTouch {
    void operator()(int64_t) const {}
};

template <class Type, bool kNorms, class Touch = NoTouch>
LOUVER_INLINE void score_group(const char* const* rows, const Group& group, float* scores, int64_t stride, float* norms,
                               Touch touch = {}) {
    int64_t g = 0;
    for (; g + 4 <= group.size; g += 4) {
        float* to = scores + g * stride;
        if (g != 0) score_four<Type, 4, false>(rows, group, g, to, stride, nullptr, NoTouch{});
        if (g == 0) score_four<Type, 4, kNorms>(rows, group, g, to, stride, norms, touch);
    }
    float* to = scores + g * stride;
    auto rest = [&](auto heads) LOUVER_ALWAYS_INLINE {
        constexpr int kHeads = decltype(heads)::value;
        if (g != 0) score_four<Type, kHeads, false>(rows, group, g, to, stride, nullptr, NoTouch{});
        if (g == 0) score_four<Type, kHeads, kNorms>(rows, group, g, to, stride, norms, touch);
    };
    switch (group.size - g) {
        case 1: return rest(std::integral_constant<int, 1>{});
        case 2: return rest(std::integral_constant<int, 2>{});
        case 3: return rest(std::integral_constant<int, 3>{});
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
    void touch(int64_t i, int64_t first, int64_t) const {
        if (first == 0) touch(i);
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

template <class Type, int kHeads, int kVectors, class Touch>
LOUVER_INLINE void add_tile(const char* const* rows, int64_t count, const float* weights, int64_t stride, float* out,
                            int64_t padded, int64_t d, bool touch, const Touch& ahead) {
    Floats total[kHeads][kVectors];
    for (int g = 0; g < kHeads; ++g)
        for (int j = 0; j < kVectors; ++j) total[g][j] = splat(0);
    for (int64_t i = 0; i < count; ++i) {
        if (touch) ahead.touch(i, d * Type::bytes, kVectors * kLanes * Type::bytes);
        Floats v[kVectors];
        load_apart<Type, kVectors>(rows[i], d, v);
        for (int g = 0; g < kHeads; ++g) {
            const float w = weights[g * stride + i];
            for (int j = 0; j < kVectors; ++j) total[g][j] += w * v[j];
        }
    }
    for (int g = 0; g < kHeads; ++g) {
        in_order<Type, kVectors>(total[g]);
        for (int j = 0; j < kVectors; ++j) {
            float* to = out + g * padded + d + j * kLanes;
            store(to, load<Floats>(to) + total[g][j]);  // tile by tile, so that rounding grows with the sum of both
        }
    }
}

template <class Type, int kHeads, class Touch>
LOUVER_INLINE void add_heads(const char* const* rows, int64_t count, const float* weights, int64_t stride, float* out,
                             int64_t padded, bool touch, const Touch& ahead) {
    constexpr int kVectors = kRegisters == 32 || kHeads < 3 ? 4 : 2;  // whose sums stay in registers
    int64_t d = 0;
    for (; d + kVectors * kLanes <= padded; d += kVectors * kLanes)
        add_tile<Type, kHeads, kVectors>(rows, count, weights, stride, out, padded, d, touch, ahead);
    for (; d < padded; d += kLanes)
        add_tile<Type, kHeads, 1>(rows, count, weights, stride, out, padded, d, touch, ahead);
}

// out[g * padded + d] += sum_i weights[g * stride + i] value_i[d] over count rows of Type, padded channels each.
// ahead.touch(i, b, n) is called as n bytes of row i from b on are read.
template <class Type, class Touch>
LOUVER_INLINE void add_rows(const char* const* rows, int64_t count, const float* weights, int64_t stride, int64_t heads,
                            float* out, int64_t padded, const Touch& ahead) {
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
