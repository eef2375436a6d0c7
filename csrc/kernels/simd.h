// Sixteen lanes at a time, in the compiler's vector extension: one source for every instruction set, aarch64 included.
// What the extension cannot say has an intrinsic where there is one. Included once per instruction set, inside its own
// namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "views.h"

namespace louver::LOUVER_ISA {

constexpr int kLanes = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

#define LOUVER_ALWAYS_INLINE __attribute__((always_inline))
#define LOUVER_INLINE inline LOUVER_ALWAYS_INLINE

template <class Vector>
LOUVER_INLINE Vector load(const void* p) {
    Vector x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
template <class Vector>
LOUVER_INLINE void store(void* p, Vector x) {
    std::memcpy(p, &x, sizeof(x));
}
LOUVER_INLINE f32x16 gather(const float* from, i32x16 index) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_i32gather_ps((__m512i)index, from, 4);
#else
    f32x16 out;
    for (int i = 0; i < kLanes; ++i) out[i] = from[index[i]];
    return out;
#endif
}
LOUVER_INLINE f32x16 splat(float x) { return f32x16{} + x; }
LOUVER_INLINE i32x16 as_int(f32x16 x) { return (i32x16)x; }
LOUVER_INLINE f32x16 as_float(i32x16 x) { return (f32x16)x; }
LOUVER_INLINE f32x16 to_float(i32x16 x) { return __builtin_convertvector(x, f32x16); }
LOUVER_INLINE f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) { return mask ? yes : no; }
LOUVER_INLINE f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }
LOUVER_INLINE f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }
LOUVER_INLINE f32x16 abs(f32x16 x) { return as_float(as_int(x) & 0x7fffffff); }

// Lanes i < n are true.
LOUVER_INLINE i32x16 first_lanes(int64_t n) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < static_cast<int32_t>(n < 0 ? 0 : n > kLanes ? kLanes : n);
}

// The inverse of bits().
LOUVER_INLINE i32x16 lanes_of(uint32_t mask) {
    const i32x16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    return (bit & static_cast<int32_t>(mask)) != 0;
}

// Store the first n lanes.
LOUVER_INLINE void store_some(float* p, f32x16 x, int64_t n) {
    if (n >= kLanes) {
        store(p, x);
    } else {
        std::memcpy(p, &x, static_cast<size_t>(4 * n));
    }
}

// One bit per true lane.
LOUVER_INLINE uint32_t bits(i32x16 mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask);
#else
    uint32_t out = 0;
    for (int i = 0; i < kLanes; ++i) out |= static_cast<uint32_t>(mask[i] & 1) << i;
    return out;
#endif
}

// At most 1 / x for positive x, and less by a factor of 1 - 2^-12 at most.
LOUVER_INLINE f32x16 reciprocal_below(f32x16 x) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_rcp14_ps((__m512)x) * (1 - 0x1p-13f);  // good to 2^-14
#else
    return (1 - 0x1p-13f) / x;
#endif
}

// The lanes of x that mask names, side by side from p on, and zeros: 16 lanes are written.
LOUVER_INLINE void store_packed(float* p, f32x16 x, uint32_t mask) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), (__m512)x));
#else
    store(p, f32x16{});
    for (; mask != 0; mask &= mask - 1) *p++ = x[__builtin_ctz(mask)];
#endif
}

LOUVER_INLINE float sum(f32x16 x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) x[i] += x[i + width];
    return x[0];
#endif
}
LOUVER_INLINE float largest(f32x16 x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float out = x[0];
    for (int i = 1; i < kLanes; ++i) out = x[i] > out ? x[i] : out;
    return out;
#endif
}

// Four sums, or four maxima, at once: their latencies overlap.
LOUVER_INLINE void sum4(const f32x16* x, float* out) {
#if defined(__AVX512F__)
    __m256 half[4];
    for (int i = 0; i < 4; ++i)
        half[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)x[i]), _mm512_extractf32x8_ps((__m512)x[i], 1));
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    for (int i = 0; i < 4; ++i) out[i] = sum(x[i]);
#endif
}
LOUVER_INLINE void largest4(const f32x16* x, float* out) {
#if defined(__AVX512F__)
    __m256 half[4];
    for (int i = 0; i < 4; ++i)
        half[i] = _mm256_max_ps(_mm512_castps512_ps256((__m512)x[i]), _mm512_extractf32x8_ps((__m512)x[i], 1));
    const __m256 a = _mm256_max_ps(_mm256_unpacklo_ps(half[0], half[1]), _mm256_unpackhi_ps(half[0], half[1]));
    const __m256 b = _mm256_max_ps(_mm256_unpacklo_ps(half[2], half[3]), _mm256_unpackhi_ps(half[2], half[3]));
    const __m256 c = _mm256_max_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1)));
#else
    for (int i = 0; i < 4; ++i) out[i] = largest(x[i]);
#endif
}

// The low byte of each lane.
LOUVER_INLINE void store_bytes(void* p, i32x16 x) {
#if defined(__AVX512F__)
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
#else
    typedef int8_t i8x16 __attribute__((vector_size(16)));
    store(p, __builtin_convertvector(x, i8x16));
#endif
}

// The nearest whole number, ties to even, for |x| < 2^22.
LOUVER_INLINE i32x16 round_to_int(f32x16 x) {
#if defined(__AVX512F__)
    __m512i y = _mm512_cvtps_epi32((__m512)x);
    return (i32x16)y;
#else
    const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23
    return as_int(x + magic) - as_int(magic);
#endif
}

LOUVER_INLINE f32x16 from_half(u16x16 x) {
#if defined(__AVX512F__)
    __m512 y = _mm512_cvtph_ps((__m256i)x);
    return (f32x16)y;
#else
    const u32x16 wide = __builtin_convertvector(x, u32x16);
    const u32x16 sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7fffu) << 13;
    // Subnormals are whole multiples of 2^-24. As floats of the same bits they would be subnormal as well, and read as
    // zero where the thread is told to (torch.set_flush_denormal): a key may be made of them.
    const u32x16 small = (u32x16)as_int(to_float((i32x16)(wide & 0x3ffu)) * 0x1p-24f);
    const u32x16 exponent = wide & 0x7c00u;
    const u32x16 is_small = (u32x16)(exponent == 0u), special = (u32x16)(exponent == 0x7c00u);
    const u32x16 rebiased = magnitude + ((112u << 23) & ~special);
    const u32x16 out = (small & is_small) | ((rebiased | (0x7f800000u & special)) & ~is_small);
    return as_float((i32x16)(out | sign));
#endif
}

struct Float32 {
    static constexpr bool is_bfloat16 = false;
    static constexpr int bytes = 4;
    static LOUVER_INLINE f32x16 load16(const char* p) { return load<f32x16>(p); }
};
struct Float16 {
    static constexpr bool is_bfloat16 = false;
    static constexpr int bytes = 2;
    static LOUVER_INLINE f32x16 load16(const char* p) { return from_half(load<u16x16>(p)); }
};
struct BFloat16 {
    static constexpr bool is_bfloat16 = true;
    static constexpr int bytes = 2;
    static LOUVER_INLINE f32x16 load16(const char* p) {
#if defined(__AVX512F__)
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
        return as_float((i32x16)(__builtin_convertvector(load<u16x16>(p), u32x16) << 16));
#endif
    }
};

// Call body(type) with the C++ type of a dtype.
template <class Body>
LOUVER_INLINE void with_dtype(DType dtype, Body body) {
    switch (dtype) {
        case DType::float32: body(Float32{}); break;
        case DType::float16: body(Float16{}); break;
        case DType::bfloat16: body(BFloat16{}); break;
    }
}

inline float load_scalar(DType dtype, const char* p) {
    if (dtype == DType::float32) return load<float>(p);
    u16x16 x = {};
    x[0] = load<uint16_t>(p);
    if (dtype == DType::float16) return from_half(x)[0];
    return as_float((i32x16)(__builtin_convertvector(x, u32x16) << 16))[0];
}

inline float half_at(const uint16_t* p, int64_t index) {
    return load_scalar(DType::float16, reinterpret_cast<const char*>(p + index));
}

// Float16, round to nearest even.
inline uint16_t to_half(float value) {
#if defined(__F16C__)
    return static_cast<uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(value), 0), 0));
#else
    const uint32_t x = load<uint32_t>(&value);
    const uint32_t sign = (x >> 16) & 0x8000u, magnitude = x & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) return static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // subnormal in float16: let an addition align and round
        const float aligned = load<float>(&magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (load<uint32_t>(&aligned) - 0x3f000000u));
    }
    const uint32_t odd = (magnitude >> 13) & 1;
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
#endif
}

inline void store_scalar(DType dtype, char* p, float value) {
    if (dtype == DType::float32) return store(p, value);
    if (dtype == DType::float16) return store(p, to_half(value));
    uint32_t x = load<uint32_t>(&value);
    if ((x & 0x7fffffffu) > 0x7f800000u) return store(p, static_cast<uint16_t>((x >> 16) | 0x40));  // NaN stays NaN
    return store(p, static_cast<uint16_t>((x + 0x7fffu + ((x >> 16) & 1)) >> 16));
}

// A token's channels as float32 in out[padded], zero past head_dim.
inline void load_row(const CacheView& view, const char* token, int64_t head_dim, int64_t padded, float* out) {
    int64_t d = 0;
    if (view.stride_dim == 1) {
        with_dtype(view.dtype, [&](auto type) {
            for (; d + kLanes <= head_dim; d += kLanes) store(out + d, type.load16(token + d * type.bytes));
        });
    }
    for (; d < head_dim; ++d) out[d] = load_scalar(view.dtype, token + d * view.stride_dim * view.item_bytes);
    for (; d < padded; ++d) out[d] = 0;
}

}  // namespace louver::LOUVER_ISA
