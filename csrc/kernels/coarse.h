// Sketched values: weighted sums of packed 4-bit codes in integers, with weights of 8 bits per block and head.
#pragma once

#include "kernels/simd.h"

namespace louver::LOUVER_ISA {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

constexpr int64_t kStrip = 64;

// Four rows of 64 packed bytes, byte-transposed: register r, dword i holds the bytes of four tokens for byte 16 (i / 4)
// + 4 r + i % 4 of the row.
LOUVER_INLINE void interleave4(const __m512i* rows, __m512i* out) {
    const __m512i low_a = _mm512_unpacklo_epi8(rows[0], rows[1]), high_a = _mm512_unpackhi_epi8(rows[0], rows[1]);
    const __m512i low_b = _mm512_unpacklo_epi8(rows[2], rows[3]), high_b = _mm512_unpackhi_epi8(rows[2], rows[3]);
    out[0] = _mm512_unpacklo_epi16(low_a, low_b), out[1] = _mm512_unpackhi_epi16(low_a, low_b);
    out[2] = _mm512_unpacklo_epi16(high_a, high_b), out[3] = _mm512_unpackhi_epi16(high_a, high_b);
}

// Their dwords in the order of the row's bytes.
LOUVER_INLINE void in_row_order(__m512i* x) {
    const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(x[0], x[1], 0xee), d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
    x[0] = _mm512_shuffle_i32x4(a, b, 0x88), x[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    x[2] = _mm512_shuffle_i32x4(c, d, 0x88), x[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// Up to four heads over 64 packed bytes. Weights are unsigned and codes, at most 15, count as signed. kPaired: the rows
// are of 32 bytes, and a register holds two of them, tokens i and i + 4 of every eight.
template <int kHeads, bool kPaired>
LOUVER_INLINE void add_strip(const uint8_t* codes, const int32_t* rows, int64_t count, int64_t at, int64_t width,
                             const uint8_t* weights, int64_t stride, int32_t* total, int64_t half) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __mmask64 mask = width == 64 ? ~0ull : (1ull << width) - 1;
    const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    auto row = [&](int64_t i) LOUVER_ALWAYS_INLINE {
        if constexpr (kPaired) {
            auto at32 = [&](int64_t j) { return _mm256_loadu_si256((const __m256i*)(codes + rows[j])); };
            return _mm512_inserti64x4(_mm512_castsi256_si512(at32(i)), at32(i + 4), 1);
        } else {
            return _mm512_maskz_loadu_epi8(mask, codes + rows[i] + at);
        }
    };
    auto weight = [&](int g, int64_t i) LOUVER_ALWAYS_INLINE {
        const uint8_t* from = weights + g * stride + i;
        if constexpr (kPaired) {
            return _mm512_permutexvar_epi32(halves, _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i*)from)));
        } else {
            return _mm512_set1_epi32(load<int32_t>(from));
        }
    };
    for (int high = 0; high < 2; ++high) {  // the sums of one nibble of each byte at a time: sixteen
        __m512i sums[kHeads][4];
        for (int g = 0; g < kHeads; ++g)
            for (int r = 0; r < 4; ++r) sums[g][r] = _mm512_setzero_si512();
        for (int64_t i = 0; i < count; i += kPaired ? 8 : 4) {
            __m512i packed[4] = {row(i), row(i + 1), row(i + 2), row(i + 3)};
            if (high) {
                for (int r = 0; r < 4; ++r) packed[r] = _mm512_srli_epi16(packed[r], 4);
            }
            for (int r = 0; r < 4; ++r) packed[r] = _mm512_and_si512(packed[r], nibble);
            __m512i nibbles[4];
            interleave4(packed, nibbles);
            for (int g = 0; g < kHeads; ++g) {
                const __m512i w = weight(g, i);
                for (int r = 0; r < 4; ++r) asm("vpdpbusd %2, %1, %0" : "+v"(sums[g][r]) : "v"(w), "v"(nibbles[r]));
            }
        }
        for (int g = 0; g < kHeads; ++g) {
            int32_t* to = total + g * 2 * half + high * half + at;
            in_row_order(sums[g]);
            if (kPaired) {
                _mm512_storeu_si512(to, _mm512_add_epi32(sums[g][0], sums[g][2]));
                _mm512_storeu_si512(to + 16, _mm512_add_epi32(sums[g][1], sums[g][3]));
            } else if (width == 64) {
                for (int r = 0; r < 4; ++r) _mm512_storeu_si512(to + 16 * r, sums[g][r]);
            } else {
                for (int r = 0; r < 4; ++r)
                    _mm512_mask_storeu_epi32(to + 16 * r, static_cast<__mmask16>(mask >> 16 * r), sums[g][r]);
            }
        }
    }
}

template <int kHeads>
LOUVER_INLINE void add_strip(const uint8_t* codes, const int32_t* rows, int64_t count, int64_t at, int64_t width,
                             const uint8_t* weights, int64_t stride, int32_t* total, int64_t half) {
    if (half == 32) return add_strip<kHeads, true>(codes, rows, count, at, width, weights, stride, total, half);
    add_strip<kHeads, false>(codes, rows, count, at, width, weights, stride, total, half);
}

#elif defined(__AVX2__)

constexpr int64_t kStrip = 16;

// Up to four heads over 16 packed bytes. Weights are unsigned and codes, at most 15, count as signed; sixteen products
// of 255 * 15 fit 16 bits without a sign.
template <int kHeads>
LOUVER_INLINE void add_strip(const uint8_t* codes, const int32_t* rows, int64_t count, int64_t at, int64_t width,
                             const uint8_t* weights, int64_t stride, int32_t* total, int64_t half) {
    const __m256i nibble = _mm256_set1_epi8(15), low_half = _mm256_set1_epi32(0xffff);
    auto row = [&](int64_t i) LOUVER_ALWAYS_INLINE {
        __m128i x = _mm_setzero_si128();
        if (width == 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + rows[i] + at));
        std::memcpy(&x, codes + rows[i] + at, static_cast<size_t>(width));
        return x;
    };
    // A copy of a length that is not known becomes a loop of its own.
    auto put = [&](int32_t* to, const __m256i* sums) LOUVER_ALWAYS_INLINE {
        if (width == 16) {
            std::memcpy(to, sums, 64);
        } else {
            std::memcpy(to, sums, static_cast<size_t>(4 * width));
        }
    };
    __m256i even[kHeads][2], odd[kHeads][2];  // channels 2 j and 2 j + 1 of a vector of sixteen
    for (int g = 0; g < kHeads; ++g)
        for (int nib = 0; nib < 2; ++nib) even[g][nib] = odd[g][nib] = _mm256_setzero_si256();
    const int64_t end = (count + 3) / 4 * 4;
    for (int64_t begin = 0; begin < end; begin += 16) {
        __m256i part[kHeads][2];
        for (int g = 0; g < kHeads; ++g) part[g][0] = part[g][1] = _mm256_setzero_si256();
        for (int64_t i = begin; i < begin + 16 && i < end; i += 2) {
            const __m128i a = row(i), b = row(i + 1);
            const __m256i pairs = _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
            const __m256i low = _mm256_and_si256(pairs, nibble);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble);
            for (int g = 0; g < kHeads; ++g) {
                const __m256i w = _mm256_set1_epi16(load<int16_t>(weights + g * stride + i));
                part[g][0] = _mm256_add_epi16(part[g][0], _mm256_maddubs_epi16(w, low));
                part[g][1] = _mm256_add_epi16(part[g][1], _mm256_maddubs_epi16(w, high));
            }
        }
        for (int g = 0; g < kHeads; ++g)
            for (int nib = 0; nib < 2; ++nib) {
                even[g][nib] = _mm256_add_epi32(even[g][nib], _mm256_and_si256(part[g][nib], low_half));
                odd[g][nib] = _mm256_add_epi32(odd[g][nib], _mm256_srli_epi32(part[g][nib], 16));
            }
    }
    for (int g = 0; g < kHeads; ++g)
        for (int nib = 0; nib < 2; ++nib) {
            const __m256i a = _mm256_unpacklo_epi32(even[g][nib], odd[g][nib]);
            const __m256i b = _mm256_unpackhi_epi32(even[g][nib], odd[g][nib]);
            const __m256i sums[2] = {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
            put(total + g * 2 * half + nib * half + at, sums);
        }
}

#endif

// total[g * 2 * half + j] = sum_i weight[g * stride + i] * code of channel j of token i, low nibbles first, then the
// high ones. rows: where each token's packed codes begin; rows and weights have room to the next multiple of 8 (weight
// 0 there). The largest sum, 255 * 15 * count, is far inside int32.
inline void add_codes(const uint8_t* codes, const int32_t* rows, int64_t count, int64_t half, const uint8_t* weights,
                      int64_t stride, int64_t group, int32_t* total) {
#if defined(__AVX2__)
    for (int64_t at = 0; at < half; at += kStrip) {
        const int64_t width = half - at < kStrip ? half - at : kStrip;
        int64_t g = 0;
        for (; g + 4 <= group; g += 4)
            add_strip<4>(codes, rows, count, at, width, weights + g * stride, stride, total + g * 2 * half, half);
        const uint8_t* rest = weights + g * stride;
        if (group - g == 1) add_strip<1>(codes, rows, count, at, width, rest, stride, total + g * 2 * half, half);
        if (group - g == 2) add_strip<2>(codes, rows, count, at, width, rest, stride, total + g * 2 * half, half);
        if (group - g == 3) add_strip<3>(codes, rows, count, at, width, rest, stride, total + g * 2 * half, half);
    }
#else
    std::memset(total, 0, static_cast<size_t>(4 * group * 2 * half));
    for (int64_t g = 0; g < group; ++g) {
        int32_t* low = total + g * 2 * half;
        int32_t* high = low + half;
        for (int64_t i = 0; i < count; ++i) {
            const int32_t w = weights[g * stride + i];
            const uint8_t* packed = codes + rows[i];
            for (int64_t j = 0; j < half; ++j) {
                low[j] += w * (packed[j] & 15);
                high[j] += w * (packed[j] >> 4);
            }
        }
    }
#endif
}

}  // namespace louver::LOUVER_ISA
