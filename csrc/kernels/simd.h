// A register's worth of lanes at a time, in the compiler's vector extension: one source for every instruction set,
// aarch64 included. What the extension cannot say has an intrinsic where there is one. Included once per instruction
// set, inside its own namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "views.h"

namespace louver::LOUVER_ISA {

// As many as one register holds: of wider vectors the compiler keeps every intermediate result in memory.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UInts __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef int16_t SignedShorts __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

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
// Ask for the line at p. With AVX-512 into the second-level cache, which waits for three times as many lines at once.
LOUVER_INLINE void touch_line(const void* p) {
#if defined(__AVX512F__)
    __builtin_prefetch(p, 0, 2);
#else
    __builtin_prefetch(p);
#endif
}
LOUVER_INLINE Floats gather(const float* from, Ints index) {
#if defined(__AVX512F__)
    return (Floats)_mm512_i32gather_ps((__m512i)index, from, 4);
#elif defined(__AVX2__)
    return (Floats)_mm256_i32gather_ps(from, (__m256i)index, 4);
#else
    Floats out;
    for (int i = 0; i < kLanes; ++i) out[i] = from[index[i]];
    return out;
#endif
}
LOUVER_INLINE Floats splat(float x) { return Floats{} + x; }
// Elements of fewer bits, one to a lane: of a conversion of vectors the compiler makes halves.
LOUVER_INLINE Ints widen(SignedShorts x) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepi16_epi32((__m256i)x);
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepi16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, Ints);
#endif
}
LOUVER_INLINE Ints widen(Bytes x) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu8_epi32((__m128i)x);
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)x));
#else
    return (Ints) __builtin_convertvector(x, UInts);
#endif
}
LOUVER_INLINE Ints widen(Shorts x) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return (Ints) __builtin_convertvector(x, UInts);
#endif
}
LOUVER_INLINE Ints as_int(Floats x) { return (Ints)x; }
LOUVER_INLINE Floats as_float(Ints x) { return (Floats)x; }
LOUVER_INLINE Floats to_float(Ints x) { return __builtin_convertvector(x, Floats); }
LOUVER_INLINE Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
// The second where one is NaN, as of one instruction where there is one: of a comparison and a choice the compiler
// makes three where it knows more about b.
LOUVER_INLINE Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
LOUVER_INLINE Floats min(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}
LOUVER_INLINE Floats abs(Floats x) { return as_float(as_int(x) & 0x7fffffff); }

alignas(64) static constexpr int32_t kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
alignas(64) static constexpr int32_t kLaneBits[16] = {1,   2,   4,    8,    16,   32,   64,    128,
                                                      256, 512, 1024, 2048, 4096, 8192, 16384, 32768};

// Lanes i < n are true.
LOUVER_INLINE Ints first_lanes(int64_t n) {
    return load<Ints>(kLaneNumbers) < static_cast<int32_t>(n < 0 ? 0 : n > kLanes ? kLanes : n);
}

// The inverse of bits().
LOUVER_INLINE Ints lanes_of(uint32_t mask) { return (load<Ints>(kLaneBits) & static_cast<int32_t>(mask)) != 0; }

// Store the first n lanes.
LOUVER_INLINE void store_some(float* p, Floats x, int64_t n) {
    if (n >= kLanes) {
        store(p, x);
    } else {
        std::memcpy(p, &x, static_cast<size_t>(4 * n));
    }
}

// The first n of kLanes floats, or bytes; the others are zero and not read.
LOUVER_INLINE Floats load_some(const float* p, int64_t n) {
    if (n >= kLanes) return load<Floats>(p);
    Floats x = {};
    std::memcpy(&x, p, static_cast<size_t>(4 * n));
    return x;
}
LOUVER_INLINE Ints some_bytes(const uint8_t* p, int64_t n) {
    Bytes x = {};
    std::memcpy(&x, p, static_cast<size_t>(n < kLanes ? n : kLanes));
    return widen(x);
}

// One bit per true lane.
LOUVER_INLINE uint32_t bits(Ints mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
    uint32_t out = 0;
    for (int i = 0; i < kLanes; ++i) out |= static_cast<uint32_t>(mask[i] & 1) << i;
    return out;
#endif
}

// 1 / x for positive x, times kReciprocalBelow at most that and less by a factor of 1 - 2^-10 at most.
#if defined(__AVX512F__)
constexpr double kReciprocalBelow = 1 - 0x1p-13;  // good to 2^-14
#elif defined(__AVX2__)
constexpr double kReciprocalBelow = 1 - 0x1p-11;  // good to 1.5 * 2^-12
#else
constexpr double kReciprocalBelow = 1 - 0x1p-13;
#endif
LOUVER_INLINE Floats reciprocal_near(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_rcp_ps((__m256)x);
#else
    return 1.0f / x;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Per mask of eight lanes, the numbers of those it names.
struct PackOrder {
    uint8_t lanes[256][8];
    constexpr PackOrder() : lanes() {
        for (int mask = 0; mask < 256; ++mask)
            for (int lane = 0, n = 0; lane < 8; ++lane)
                if (mask >> lane & 1) lanes[mask][n++] = static_cast<uint8_t>(lane);
    }
};
static constexpr PackOrder kPackOrder;
#endif

// The lanes of x that mask names, side by side from p on, and whatever after them: kLanes are written. Also of Ints.
template <class Element, class Vector>
LOUVER_INLINE void store_packed(Element* p, Vector x, uint32_t mask) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), (__m512)x));
#elif defined(__AVX2__)
    const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPackOrder.lanes[mask & 255]));
    _mm256_storeu_ps(reinterpret_cast<float*>(p), _mm256_permutevar8x32_ps((__m256)x, _mm256_cvtepu8_epi32(order)));
#else
    store(p, Vector{});
    for (; mask != 0; mask &= mask - 1) *p++ = x[__builtin_ctz(mask)];
#endif
}

#if defined(__AVX2__)
template <class Operation>
LOUVER_INLINE float across(__m256 x, Operation op) {
    __m128 y = op(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = op(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(op(y, _mm_shuffle_ps(y, y, 1)));
}
#endif

LOUVER_INLINE float sum(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
    return across((__m256)x, [](__m128 a, __m128 b) LOUVER_ALWAYS_INLINE { return _mm_add_ps(a, b); });
#else
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) x[i] += x[i + width];
    return x[0];
#endif
}
LOUVER_INLINE float largest(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#elif defined(__AVX2__)
    return across((__m256)x, [](__m128 a, __m128 b) LOUVER_ALWAYS_INLINE { return _mm_max_ps(a, b); });
#else
    float out = x[0];
    for (int i = 1; i < kLanes; ++i) out = x[i] > out ? x[i] : out;
    return out;
#endif
}

// Four sums, or four maxima, at once: their latencies overlap.
#if defined(__AVX512F__)
LOUVER_INLINE __m256 low_half(Floats x) { return _mm512_castps512_ps256((__m512)x); }
LOUVER_INLINE __m256 high_half(Floats x) { return _mm512_extractf32x8_ps((__m512)x, 1); }
#endif
LOUVER_INLINE void sum4(const Floats* x, float* out) {
#if defined(__AVX2__)
    __m256 half[4];
#if defined(__AVX512F__)
    for (int i = 0; i < 4; ++i) half[i] = _mm256_add_ps(low_half(x[i]), high_half(x[i]));
#else
    for (int i = 0; i < 4; ++i) half[i] = (__m256)x[i];
#endif
    // Not by horizontal additions, which take four times as long.
    auto pair = [](__m256 a, __m256 b)
                    LOUVER_ALWAYS_INLINE { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); };
    const __m256 a = pair(half[0], half[1]), b = pair(half[2], half[3]);
    const __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    for (int i = 0; i < 4; ++i) out[i] = sum(x[i]);
#endif
}
#if defined(__AVX512F__)
// The sums of sixteen vectors, in their order: halves of two are added at a time, so that four rounds leave one
// register.
LOUVER_INLINE Floats sum16(const Floats* x) {
    __m512 four[4];
    for (int i = 0; i < 4; ++i) {
        __m512 two[2];
        for (int j = 0; j < 2; ++j) {
            const __m512 a = (__m512)x[4 * i + 2 * j], b = (__m512)x[4 * i + 2 * j + 1];
            two[j] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        const __m512d a = _mm512_castps_pd(two[0]), b = _mm512_castps_pd(two[1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 half[2];
    for (int i = 0; i < 2; ++i)
        half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x44),
                                _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xee));
    return (Floats)_mm512_add_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88),
                                 _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
}
#endif
LOUVER_INLINE void largest4(const Floats* x, float* out) {
#if defined(__AVX2__)
    __m256 half[4];
#if defined(__AVX512F__)
    for (int i = 0; i < 4; ++i) half[i] = _mm256_max_ps(low_half(x[i]), high_half(x[i]));
#else
    for (int i = 0; i < 4; ++i) half[i] = (__m256)x[i];
#endif
    const __m256 a = _mm256_max_ps(_mm256_unpacklo_ps(half[0], half[1]), _mm256_unpackhi_ps(half[0], half[1]));
    const __m256 b = _mm256_max_ps(_mm256_unpacklo_ps(half[2], half[3]), _mm256_unpackhi_ps(half[2], half[3]));
    const __m256 c = _mm256_max_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1)));
#else
    for (int i = 0; i < 4; ++i) out[i] = largest(x[i]);
#endif
}

// The low byte of each lane.
LOUVER_INLINE void store_bytes(void* p, Ints x) {
#if defined(__AVX512F__)
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
    const __m256i order = _mm256_set1_epi32(0x0c080400);
    const __m256i packed = _mm256_shuffle_epi8((__m256i)x, order);
    _mm_storel_epi64(static_cast<__m128i*>(p),
                     _mm_unpacklo_epi32(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
#else
    typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));
    store(p, __builtin_convertvector(x, SignedBytes));
#endif
}

// The nearest whole number, ties to even, for |x| < 2^22.
LOUVER_INLINE Ints round_to_int(Floats x) {
#if defined(__AVX512F__)
    __m512i y = _mm512_cvtps_epi32((__m512)x);
    return (Ints)y;
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtps_epi32((__m256)x);
#else
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23
    return as_int(x + magic) - as_int(magic);
#endif
}

LOUVER_INLINE Floats from_half(Shorts x) {
#if defined(__AVX512F__)
    __m512 y = _mm512_cvtph_ps((__m256i)x);
    return (Floats)y;
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtph_ps((__m128i)x);
#else
    const UInts wide = __builtin_convertvector(x, UInts);
    const UInts sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7fffu) << 13;
    // Subnormals are whole multiples of 2^-24. As floats of the same bits they would be subnormal as well, and read as
    // zero where the thread is told to (torch.set_flush_denormal): a key may be made of them.
    const UInts small = (UInts)as_int(to_float((Ints)(wide & 0x3ffu)) * 0x1p-24f);
    const UInts exponent = wide & 0x7c00u;
    const UInts is_small = (UInts)(exponent == 0u), special = (UInts)(exponent == 0x7c00u);
    const UInts rebiased = magnitude + ((112u << 23) & ~special);
    const UInts out = (small & is_small) | ((rebiased | (0x7f800000u & special)) & ~is_small);
    return as_float((Ints)(out | sign));
#endif
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

struct Float32 {
    static constexpr bool is_bfloat16 = false;
    static constexpr int bytes = 4;
    static LOUVER_INLINE Floats load_lanes(const char* p) { return load<Floats>(p); }
};
struct Float16 {
    static constexpr bool is_bfloat16 = false;
    static constexpr int bytes = 2;
    static LOUVER_INLINE Floats load_lanes(const char* p) { return from_half(load<Shorts>(p)); }
};
struct BFloat16 {
    static constexpr bool is_bfloat16 = true;
    static constexpr int bytes = 2;
    static LOUVER_INLINE Floats load_lanes(const char* p) {
#if defined(__AVX512F__)
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
        return as_float((Ints)(__builtin_convertvector(load<Shorts>(p), UInts) << 16));
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
    Shorts x = {};
    x[0] = load<uint16_t>(p);
    if (dtype == DType::float16) return from_half(x)[0];
    return as_float((Ints)(__builtin_convertvector(x, UInts) << 16))[0];
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
            for (; d + kLanes <= head_dim; d += kLanes) store(out + d, type.load_lanes(token + d * type.bytes));
        });
    }
    for (; d < head_dim; ++d) out[d] = load_scalar(view.dtype, token + d * view.stride_dim * view.item_bytes);
    for (; d < padded; ++d) out[d] = 0;
}

}  // namespace louver::LOUVER_ISA
