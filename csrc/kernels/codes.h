// Integer dot products of packed 4-bit codes with 8-bit queries: exact, so they need no slack.
#pragma once

#include "kernels/simd.h"

namespace louver::LOUVER_ISA {

// dots[g * kLanes + i] = sum_d code(i, d) query[g, d] for 16 tokens i whose packed codes start at codes + i * half.
// query int8 [group, 2 * half_padded]: the channels of the low nibbles, then those of the high ones, each padded with
// zeros to half_padded, a multiple of 4. Only the first `tokens` lanes are computed, and only their codes read.
inline void dot_codes_portable(const uint8_t* codes, int64_t tokens, int64_t half, int64_t half_padded,
                               const int8_t* query, int64_t group, int32_t* dots) {
    for (int64_t i = 0; i < tokens; ++i)
        for (int64_t g = 0; g < group; ++g) {
            const int8_t* low = query + g * 2 * half_padded;
            const int8_t* high = low + half_padded;
            const uint8_t* packed = codes + i * half;
            int32_t total = 0;
            for (int64_t j = 0; j < half; ++j) total += (packed[j] & 15) * low[j] + (packed[j] >> 4) * high[j];
            dots[g * kLanes + i] = total;
        }
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// Row i of the result holds dword i of the 16 rows given.
LOUVER_INLINE void transpose16(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// Up to four heads over one strip of 64 packed bytes (fewer: zero past the end) of 16 tokens.
template <int kHeads>
LOUVER_INLINE void dot_strip(const __m512i* columns, int64_t num_columns, const int8_t* query, int64_t half_padded,
                             __m512i* total) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t c = 0; c < num_columns; ++c) {
        const __m512i low = _mm512_and_si512(columns[c], nibble);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(columns[c], 4), nibble);
        for (int g = 0; g < kHeads; ++g) {
            const int8_t* at = query + g * 2 * half_padded + 4 * c;
            total[g] = _mm512_dpbusd_epi32(total[g], low, _mm512_set1_epi32(load<int32_t>(at)));
            total[g] = _mm512_dpbusd_epi32(total[g], high, _mm512_set1_epi32(load<int32_t>(at + half_padded)));
        }
    }
}

inline void dot_codes(const uint8_t* codes, int64_t tokens, int64_t half, int64_t half_padded, const int8_t* query,
                      int64_t group, int32_t* dots) {
    for (int64_t g = 0; g < group; ++g) _mm512_storeu_si512(dots + g * kLanes, _mm512_setzero_si512());
    for (int64_t strip = 0; strip < half; strip += 64) {
        const int64_t width = half - strip < 64 ? half - strip : 64;
        const __mmask64 mask = width == 64 ? ~0ull : (1ull << width) - 1;
        __m512i rows[16];
        for (int i = 0; i < 16; ++i) rows[i] = _mm512_maskz_loadu_epi8(i < tokens ? mask : 0, codes + i * half + strip);
        transpose16(rows);
        const int64_t columns = (width + 3) / 4;
        for (int64_t g = 0; g < group;) {
            const int8_t* from = query + g * 2 * half_padded + strip;
            __m512i total[4];
            const int heads = group - g >= 4 ? 4 : static_cast<int>(group - g);
            for (int i = 0; i < heads; ++i) total[i] = _mm512_loadu_si512(dots + (g + i) * kLanes);
            if (heads == 4) dot_strip<4>(rows, columns, from, half_padded, total);
            if (heads == 3) dot_strip<3>(rows, columns, from, half_padded, total);
            if (heads == 2) dot_strip<2>(rows, columns, from, half_padded, total);
            if (heads == 1) dot_strip<1>(rows, columns, from, half_padded, total);
            for (int i = 0; i < heads; ++i) _mm512_storeu_si512(dots + (g + i) * kLanes, total[i]);
            g += heads;
        }
    }
}

#else

inline void dot_codes(const uint8_t* codes, int64_t tokens, int64_t half, int64_t half_padded, const int8_t* query,
                      int64_t group, int32_t* dots) {
    dot_codes_portable(codes, tokens, half, half_padded, query, group, dots);
}

#endif

}  // namespace louver::LOUVER_ISA
