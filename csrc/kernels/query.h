// A KV head's group of queries in float32, and what the kernels need of each besides.
#pragma once

#include "kernels/rounding.h"

namespace louver::LOUVER_ISA {

// Whether keys of bfloat16 are scored by two multiply-adds in float32 for a register of pairs, and not by the
// instruction that takes pairs: dispatch.cpp knows where which pays.
#if defined(__AVX512F__) && !defined(__AVX512BF16__)
constexpr bool kReadsApart = true;
#else
constexpr bool kReadsApart = false;
#endif

struct Group {
    int64_t size = 0, padded = 0;        // heads, and channels padded to whole vectors
    const float* q = nullptr;            // [size, padded]
    const float* norm = nullptr;         // [size], at least |q|
    const uint16_t* bfloat16 = nullptr;  // [size, padded], the same queries; null where they are not exactly that
    const float* apart = nullptr;        // [size, padded], of every 2 * kLanes channels the even ones first; or null
    float longest = 0;                   // keys shorter than this have scores no partial sum of which overflows
};

inline int64_t padded_dims(int64_t dims) { return (dims + kLanes - 1) / kLanes * kLanes; }

inline int64_t group_floats(int64_t size, int64_t padded) {
    return size * padded + padded_dims(size) + size * padded + kLanes;
}

// A norm from its squares' sum, taken in float64 where one chain of additions in float32 would outgrow kNormInflation.
LOUVER_INLINE float root_above(double squares) { return static_cast<float>(std::sqrt(squares)) * kNormInflation; }

// The norm whose squares overflowed, once more.
inline float huge_norm_above(const float* x, int64_t padded) {
    double total = 0;
    for (int64_t d = 0; d < padded; ++d) total += static_cast<double>(x[d]) * static_cast<double>(x[d]);
    return root_above(total);
}

// At least the Euclidean norm of x[padded].
LOUVER_INLINE float norm_above(const float* x, int64_t padded) {
    Floats total = {};
    for (int64_t d = 0; d < padded; d += kLanes) {
        const Floats v = load<Floats>(x + d);
        total += v * v;
    }
    const float norm = std::sqrt(sum(total)) * kNormInflation + kTinyNorm;
    return norm < kInfinity ? norm : huge_norm_above(x, padded);
}

// Whether bfloat16 products of these queries lose nothing: the instruction takes subnormal numbers for zero, which is
// within kAbsolute only if no query channel is one and none is huge.
LOUVER_INLINE bool safe_as_bfloat16(const Problem& problem, const float* q, int64_t count, int64_t padded) {
    if (problem.q_dtype != DType::bfloat16 || problem.head_dim % (2 * kLanes) != 0) return false;
    for (int64_t i = 0; i < count * padded; ++i) {
        const float x = std::fabs(q[i]);
        if (!(x <= 0x1p20f) || (x != 0 && x < 0x1p-126f)) return false;
    }
    return true;
}

// Read the queries of KV head `head` of row `row` into memory, which holds group_floats.
inline Group read_group(const Problem& problem, int64_t row, int64_t head, float* memory) {
    const int64_t size = problem.group_size(), dims = problem.head_dim, padded = padded_dims(dims);
    CacheView view;
    view.data = problem.q;
    view.dtype = problem.q_dtype;
    view.item_bytes = problem.q_dtype == DType::float32 ? 4 : 2;
    float* norms = memory + size * padded;
    for (int64_t g = 0; g < size; ++g) {
        const int64_t index = (row * problem.num_q_heads + head * size + g) * dims;
        load_row(view, view.data + index * view.item_bytes, dims, padded, memory + g * padded);
        norms[g] = norm_above(memory + g * padded, padded);
    }
    float largest = 0;
    for (int64_t g = 0; g < size; ++g) largest = norms[g] > largest ? norms[g] : largest;
    Group group;
    group.size = size, group.padded = padded, group.q = memory, group.norm = norms;
    group.longest = 0x1p126f / largest;
    float* copy = norms + padded_dims(size);
    if (kReadsApart) {
        if (dims % (2 * kLanes) != 0) return group;
        for (int64_t i = 0; i < size * dims; ++i) {
            const int64_t channel = i % (2 * kLanes);
            copy[i - channel + channel / 2 + channel % 2 * kLanes] = memory[i];
        }
        group.apart = copy;
    } else if (safe_as_bfloat16(problem, memory, size, padded)) {
        const char* from = problem.q + (row * problem.num_q_heads + head * size) * dims * 2;
        std::memcpy(copy, from, static_cast<size_t>(2 * size * dims));
        group.bfloat16 = reinterpret_cast<const uint16_t*>(copy);
    }
    return group;
}

}  // namespace louver::LOUVER_ISA
