// Integer dot products of packed 4-bit codes with 8-bit queries: exact, so they need no slack.
#pragma once

#include "kernels/simd.h"

namespace louver::LOUVER_ISA {

// What the query's halves are padded to: the bytes of codes that are multiplied at a time.
constexpr int64_t kCodeBytes = 16;
constexpr int64_t padded_half(int64_t half) { return (half + kCodeBytes - 1) / kCodeBytes * kCodeBytes; }

// dots[g * stride + i] = sum_d code(i, d) query[g, d] for up to kCodeTokens tokens i whose packed codes start at codes
// + i
// * half. query int8 [group, 2 * half_padded]: the channels of the low nibbles, then those of the high ones, each
// padded with zeros to half_padded. Only the codes of `tokens` are read; kCodeTokens dots of each head are written.
constexpr int64_t kCodeTokens = 16;
inline void dot_codes_portable(const uint8_t* codes, int64_t tokens, int64_t half, int64_t half_padded,
                               const int8_t* query, int64_t group, int32_t* dots, int64_t stride) {
    for (int64_t i = 0; i < tokens; ++i)
        for (int64_t g = 0; g < group; ++g) {
            const int8_t* low = query + g * 2 * half_padded;
            const int8_t* high = low + half_padded;
            const uint8_t* packed = codes + i * half;
            int32_t total = 0;
            for (int64_t j = 0; j < half; ++j) total += (packed[j] & 15) * low[j] + (packed[j] >> 4) * high[j];
            dots[g * stride + i] = total;
        }
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// 16 bytes of each of four rows in one register: loads that insert, and one shuffle.
LOUVER_INLINE __m512i four_rows(const uint8_t* codes, int64_t step) {
    auto at = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i * step)); };
    const __m256i first = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
    const __m256i second = _mm256_inserti128_si256(_mm256_castsi128_si256(at(2)), at(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// sum += products of codes with a query's bytes. In assembly, because the compiler copies running sums about.
LOUVER_INLINE void add_products(__m512i& sum, __m512i codes, __m512i query) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(query));
}

constexpr int64_t kDotTokens = 16;  // of one call of dot_heads

// Up to four heads over 16 tokens, `pieces` times 16 packed bytes each. Lane group L of register t holds token 4 L + t,
// so the four partial sums of a token end up in place after two rounds of additions.
// kPieces: as many, known when this is compiled, so that every address is a constant away from another; or 0.
template <int kHeads, int kPieces>
LOUVER_INLINE void dot_heads(const uint8_t* codes, int64_t pieces, const int8_t* query, int32_t* dots, int64_t stride) {
    if (kPieces > 0) pieces = kPieces;
    const int64_t row_bytes = kCodeBytes * pieces;
    const __m512i nibble = _mm512_set1_epi8(15);
    auto values = [&](int g, int half, int64_t c) LOUVER_ALWAYS_INLINE {
        const int8_t* from = query + (2 * g + half) * row_bytes + 16 * c;
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    };
    __m512i total[kHeads][4];
    for (int g = 0; g < kHeads; ++g)
        for (int t = 0; t < 4; ++t) total[g][t] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int64_t c = 0; c < pieces; ++c) {
        __m512i packed[4];
        for (int t = 0; t < 4; ++t) packed[t] = four_rows(codes + t * row_bytes + 16 * c, 4 * row_bytes);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            __m512i nibbles[4];
            for (int t = 0; t < 4; ++t)
                nibbles[t] = _mm512_and_si512(half == 0 ? packed[t] : _mm512_srli_epi16(packed[t], 4), nibble);
            for (int g = 0; g < kHeads; ++g) {
                const __m512i q = values(g, half, c);
                for (int t = 0; t < 4; ++t) add_products(total[g][t], nibbles[t], q);
            }
        }
    }
    for (int g = 0; g < kHeads; ++g) {
        __m512i* x = total[g];
        auto pair = [](__m512i a, __m512i b) LOUVER_ALWAYS_INLINE {
            return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        };
        const __m512i first = pair(x[0], x[1]), second = pair(x[2], x[3]);
        _mm512_storeu_si512(dots + g * stride, _mm512_add_epi32(_mm512_unpacklo_epi64(first, second),
                                                                _mm512_unpackhi_epi64(first, second)));
    }
}

#elif defined(__AVX2__)

// sum += products of codes with the 16 bytes at query, for two registers of codes. In assembly, because the compiler
// multiplies ahead, and then keeps products and sums in memory.
LOUVER_INLINE void add_products(const int8_t* query, __m256i codes0, __m256i codes1, __m256i& sum0, __m256i& sum1) {
    __m256i q, product;
    asm("vbroadcasti128 %[from], %[q]\n\t"
        "vpmaddubsw %[q], %[codes0], %[product]\n\t"
        "vpmaddubsw %[q], %[codes1], %[q]\n\t"
        "vpaddw %[product], %[sum0], %[sum0]\n\t"
        "vpaddw %[q], %[sum1], %[sum1]"
        : [sum0] "+x"(sum0), [sum1] "+x"(sum1), [q] "=&x"(q), [product] "=&x"(product)
        : [from] "m"(*reinterpret_cast<const __m128i_u*>(query)), [codes0] "x"(codes0), [codes1] "x"(codes1));
}

constexpr int64_t kDotTokens = 8;  // of one call of dot_heads

// Eight tokens, four heads at most, `pieces` times 16 packed bytes each. A register holds token t and token t + 4, a
// half each, so that four of them end up as eight sums in order, after two rounds of additions. A product of a code and
// a query is at most 15 * 128, and sixteen of them stay within 16 bits: those of a lane in four pieces.
// kPieces: as many, known when this is compiled, so that every address is a constant away from another; or 0.
template <int kHeads, int kPieces>
LOUVER_INLINE void dot_heads(const uint8_t* codes, int64_t pieces, const int8_t* query, int32_t* dots, int64_t stride) {
    constexpr int kPairs = kHeads > 2 ? 2 : 4;  // at once: their running sums stay in registers
    if (kPieces > 0) pieces = kPieces;
    const int64_t row_bytes = kCodeBytes * pieces;
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    auto row = [&](int t, int64_t c) LOUVER_ALWAYS_INLINE {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + t * row_bytes + 16 * c));
    };
    __m256i total[kHeads][4];
    for (int p0 = 0; p0 < 4; p0 += kPairs)
        for (int64_t first = 0; first < pieces; first += 4) {
            __m256i sums[kHeads][kPairs];
            for (int g = 0; g < kHeads; ++g)
                for (int p = 0; p < kPairs; ++p) sums[g][p] = _mm256_setzero_si256();
            for (int64_t c = first; c < pieces && c < first + 4; ++c) {
                __m256i packed[kPairs];
                for (int p = 0; p < kPairs; ++p) packed[p] = _mm256_set_m128i(row(p0 + p + 4, c), row(p0 + p, c));
                for (int half = 0; half < 2; ++half) {
                    __m256i nibbles[kPairs];
                    for (int p = 0; p < kPairs; ++p)
                        nibbles[p] = _mm256_and_si256(half == 0 ? packed[p] : _mm256_srli_epi16(packed[p], 4), nibble);
                    for (int g = 0; g < kHeads; ++g)
                        for (int p = 0; p < kPairs; p += 2)
                            add_products(query + (2 * g + half) * row_bytes + 16 * c, nibbles[p], nibbles[p + 1],
                                         sums[g][p], sums[g][p + 1]);
                }
            }
            for (int g = 0; g < kHeads; ++g)
                for (int p = 0; p < kPairs; ++p) {
                    const __m256i wide = _mm256_madd_epi16(sums[g][p], ones);
                    total[g][p0 + p] = first == 0 ? wide : _mm256_add_epi32(total[g][p0 + p], wide);
                }
        }
    for (int g = 0; g < kHeads; ++g) {
        const __m256i* x = total[g];
        auto pair = [](__m256i a, __m256i b) LOUVER_ALWAYS_INLINE {
            return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        };
        const __m256i first = pair(x[0], x[1]), second = pair(x[2], x[3]);
        const __m256i sums =
            _mm256_add_epi32(_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dots + g * stride), sums);
    }
}

#endif

#if defined(__AVX2__)

template <int kPieces>
LOUVER_INLINE void dot_all_heads(const uint8_t* codes, int64_t pieces, const int8_t* query, int64_t group,
                                 int32_t* dots, int64_t stride) {
    const int64_t query_bytes = 2 * kCodeBytes * pieces;
    for (int64_t i = 0; i < kCodeTokens;
         i += kDotTokens, codes += kDotTokens * kCodeBytes * pieces, dots += kDotTokens) {
        int64_t g = 0;
        for (; g + 4 <= group; g += 4)
            dot_heads<4, kPieces>(codes, pieces, query + g * query_bytes, dots + g * stride, stride);
        const int8_t* rest = query + g * query_bytes;
        int32_t* to = dots + g * stride;
        if (group - g == 1) dot_heads<1, kPieces>(codes, pieces, rest, to, stride);
        if (group - g == 2) dot_heads<2, kPieces>(codes, pieces, rest, to, stride);
        if (group - g == 3) dot_heads<3, kPieces>(codes, pieces, rest, to, stride);
    }
}

inline void dot_codes(const uint8_t* codes, int64_t tokens, int64_t half, int64_t half_padded, const int8_t* query,
                      int64_t group, int32_t* dots, int64_t stride) {
    alignas(64) uint8_t copy[kCodeTokens * 512];
    if (tokens < kCodeTokens || half != half_padded) {  // reading whole pieces could leave the array
        std::memset(copy, 0, static_cast<size_t>(kCodeTokens * half_padded));
        for (int64_t i = 0; i < tokens; ++i)
            std::memcpy(copy + i * half_padded, codes + i * half, static_cast<size_t>(half));
        codes = copy;
    }
    const int64_t pieces = half_padded / kCodeBytes;
    if (pieces == 2) return dot_all_heads<2>(codes, pieces, query, group, dots, stride);
    if (pieces == 4) return dot_all_heads<4>(codes, pieces, query, group, dots, stride);
    dot_all_heads<0>(codes, pieces, query, group, dots, stride);
}

#else

inline void dot_codes(const uint8_t* codes, int64_t tokens, int64_t half, int64_t half_padded, const int8_t* query,
                      int64_t group, int32_t* dots, int64_t stride) {
    dot_codes_portable(codes, tokens, half, half_padded, query, group, dots, stride);
}

#endif

}  // namespace louver::LOUVER_ISA
