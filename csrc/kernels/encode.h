// Encoding full blocks of keys and values into frames, as src/louver/sketch/encode.py does: the frame is free, the
// promise is that a decoded radius is at least the real norm of what the codes miss. Norms are taken in float64 and
// rounded up.
#pragma once

#include <cstdlib>

#include "kernels/exact.h"
#include "kernels/fit.h"
#include "kernels/scan.h"
#include "kernels/schedule.h"

namespace louver::LOUVER_ISA {

constexpr double kNormSlack = 1 + 0x1p-40;

inline float round_up(double x) {
    const float y = static_cast<float>(x);
    return y < x ? std::nextafterf(y, kInfinity) : y;
}
inline float round_down(double x) {
    const float y = static_cast<float>(x);
    return y > x ? std::nextafterf(y, -kInfinity) : y;
}

constexpr int kHalfLanes = kLanes / 2;
typedef float HalfFloats __attribute__((vector_size(4 * kHalfLanes)));
typedef double Doubles __attribute__((vector_size(8 * kHalfLanes)));

LOUVER_INLINE Doubles widen(const float* p) { return __builtin_convertvector(load<HalfFloats>(p), Doubles); }

// What the code misses in one channel, float64: the decoded value is exact, so only the difference rounds.
LOUVER_INLINE double residual(const Block& block, const float* codes, const double* center, const double* scale,
                              int64_t i, int64_t d) {
    const int64_t at = i * block.padded + d;
    return static_cast<double>(block.x[at]) - (static_cast<double>(codes[at]) + center[d]) * scale[d];
}
LOUVER_INLINE Doubles residuals(const Block& block, const float* codes, const double* center, const double* scale,
                                int64_t i, int64_t d) {
    const int64_t at = i * block.padded + d;
    return widen(block.x + at) - (widen(codes + at) + load<Doubles>(center + d)) * load<Doubles>(scale + d);
}

// The sum of many(d), kHalfLanes channels from d on, and of one(d) where fewer are left, for channels begin .. end.
template <class Many, class One>
LOUVER_INLINE double sum_channels(int64_t begin, int64_t end, Many many, One one) {
    Doubles lanes = {}, other = {};
    int64_t d = begin;
    for (; d + 2 * kHalfLanes <= end; d += 2 * kHalfLanes) lanes += many(d), other += many(d + kHalfLanes);
    lanes += other;
    double total = 0;
    for (int lane = 0; lane < kHalfLanes; ++lane) total += lanes[lane];
    for (; d < end; ++d) total += one(d);
    return total;
}

struct EncodeScratch {
    float *x, *y;  // [frame_len, padded] each: keys, values
    FitScratch fit;
    double *center, *scale, *inverse, *norms;  // [padded] x 3, [frame_len]; the first in scales
    uint8_t* valid;                            // [frame_len]
};

inline void decode_frame(const Coded& coded, int64_t dims, EncodeScratch& scratch) {
    for (int64_t d = 0; d < dims; d += kLanes) {
        const FrameLanes lanes = frame_lanes(coded.frame + d, *coded.widest, dims - d);
        for (int lane = 0; lane < kLanes && d + lane < dims; ++lane) {
            scratch.center[d + lane] = 0.5 * static_cast<double>(lanes.center[lane]);
            scratch.scale[d + lane] = static_cast<double>(lanes.scale[lane]);
        }
    }
}

// Where a block's radii go.
struct Radii {
    uint8_t* codes;  // [half_len, slices]
    float *least, *unit;
};

// The least radius that codes of one slice need, and the unit above it: least + code * unit, in real arithmetic, is at
// least each valid key's norm. Codes go to the low nibbles of the block's first half, then to the high ones.
inline void code_radii(const Block& block, const double* norms, int64_t half_len, int64_t slices, uint8_t* codes,
                       float* least_out, float* unit_out) {
    double smallest = static_cast<double>(kInfinity), largest = 0;
    for (int64_t i = 0; i < block.tokens; ++i) {
        if (!block.valid[i]) continue;
        smallest = norms[i] < smallest ? norms[i] : smallest, largest = norms[i] > largest ? norms[i] : largest;
    }
    const float low = round_down(smallest);
    const float least = low >= 0x1p-100f && low < kInfinity ? low : 0.0f;
    const double base = static_cast<double>(least), widest = largest > base ? largest - base : 0.0;
    const float wanted = round_up(widest * (1 + 0x1p-20) / (kNoBound - 1)),
                unit = wanted > 0x1p-100f ? wanted : 0x1p-100f;
    *least_out = least, *unit_out = unit;
    for (int64_t i = 0; i < block.tokens; ++i) {
        const double above = norms[i] - base;
        double code = std::ceil(above / static_cast<double>(unit));
        if (code * static_cast<double>(unit) < above) code += 1;
        if (!(code < kNoBound)) code = kNoBound;  // cannot happen; if it did, the key would be exact
        const auto nibble = static_cast<uint8_t>(block.valid[i] ? code : kNoBound);
        if (i < half_len) codes[i * slices] = nibble;
        if (i >= half_len) codes[(i - half_len) * slices] |= static_cast<uint8_t>(nibble << 4);
    }
}

// Radii of a block: at least the norm of the residual in each slice.
inline void encode_radii(const Block& block, const SketchView& sketch, const float* weight, EncodeScratch& scratch,
                         const Radii& to) {
    for (int64_t d = 0; d < block.dims; ++d) {
        float u = 1;
        if (sketch.metric == Metric::frame) u = static_cast<float>(scratch.scale[d]) * weight[d];
        if (sketch.metric == Metric::diagonal) u = weight[d];
        scratch.inverse[d] = 1 / static_cast<double>(u);
    }
    for (int64_t s = 0; s < sketch.slices; ++s) {
        const int64_t begin = sketch.slice_begin(s), end = sketch.slice_begin(s + 1);
        for (int64_t i = 0; i < block.tokens; ++i) {
            auto many = [&](int64_t d) LOUVER_ALWAYS_INLINE {
                const Doubles e = residuals(block, scratch.fit.codes, scratch.center, scratch.scale, i, d);
                return e * e * load<Doubles>(scratch.inverse + d);
            };
            auto one = [&](int64_t d) LOUVER_ALWAYS_INLINE {
                const double e = residual(block, scratch.fit.codes, scratch.center, scratch.scale, i, d);
                return e * e * scratch.inverse[d];
            };
            const double total = block.valid[i] ? sum_channels(begin, end, many, one) : 0.0;
            scratch.norms[i] = std::sqrt(total) * kNormSlack;
        }
        code_radii(block, scratch.norms, sketch.half_len(), sketch.slices, to.codes + s, to.least + s, to.unit + s);
    }
}

struct EncodeContext {
    const CacheView *keys, *values;  // values null where there are none
    const SketchView* sketch;
    const int32_t *kv_start, *kv_len;
    std::atomic<int64_t> next{0};
    char* memory;
    int64_t bytes_per_thread;
};

inline int64_t encode_bytes(const SketchView& sketch) {
    const int64_t padded = padded_dims(sketch.dims);
    const int64_t floats = 2 * sketch.frame_len * padded + fit_floats(sketch.frame_len, padded);
    return 4 * floats + 24 * padded + 9 * sketch.frame_len + 512;
}

inline EncodeScratch encode_scratch(const SketchView& sketch, char* memory) {
    const int64_t padded = padded_dims(sketch.dims), area = sketch.frame_len * padded;
    EncodeScratch out;
    out.x = reinterpret_cast<float*>(memory), out.y = out.x + area;
    float* fit = out.y + area;
    out.fit = fit_scratch(sketch.frame_len, padded, fit);
    out.center = reinterpret_cast<double*>(fit + fit_floats(sketch.frame_len, padded)), out.scale = out.center + padded;
    out.inverse = out.scale + padded, out.norms = out.inverse + padded;
    out.valid = reinterpret_cast<uint8_t*>(out.norms + sketch.frame_len);
    return out;
}

inline void read_block(const CacheView& view, int64_t row, int64_t head, int64_t position, const SketchView& sketch,
                       float* x, uint8_t* valid) {
    const int64_t padded = padded_dims(sketch.dims);
    for (int64_t i = 0; i < sketch.frame_len; ++i) {
        load_row(view, view.token(row, head, position + i), sketch.head_dim, padded, x + i * padded);
        Floats outside = {};
        for (int64_t d = 0; d < padded; d += kLanes) {
            const Floats magnitude = abs(load<Floats>(x + i * padded + d));
            outside += select(magnitude <= kLargestFramed, splat(0), splat(1));  // true for NaN too
        }
        if (sum(outside) != 0) valid[i] = 0;
    }
}

inline void encode_values(const SketchView& sketch, int64_t index, int64_t row, int64_t head, EncodeScratch& scratch) {
    const int64_t padded = padded_dims(sketch.dims), dims = sketch.dims;
    const Block block{scratch.y, scratch.valid, sketch.frame_len, dims, padded};
    const float* mean = sketch.value_mean + (row * sketch.heads + head) * dims;
    double spread = 0, error = 0;
    const bool coded = sketch.coded_values;
    if (coded) {
        const Coded to{sketch.value_codes + index * sketch.frame_len * (dims / 2), sketch.value_frame + index * dims,
                       sketch.value_scale + index};
        fit_block(block, sketch.clip, to, scratch.fit);
        decode_frame(to, dims, scratch);
    }
    for (int64_t i = 0; i < sketch.frame_len; ++i) {
        if (!scratch.valid[i]) continue;
        const float* y = scratch.y + i * padded;
        auto squares_away = [&](int64_t d) LOUVER_ALWAYS_INLINE {
            const Doubles e = widen(y + d) - widen(mean + d);
            return e * e;
        };
        auto square_away = [&](int64_t d) LOUVER_ALWAYS_INLINE {
            const double e = static_cast<double>(y[d]) - mean[d];
            return e * e;
        };
        auto squares_missed = [&](int64_t d) LOUVER_ALWAYS_INLINE {
            const Doubles e = residuals(block, scratch.fit.codes, scratch.center, scratch.scale, i, d);
            return e * e;
        };
        auto square_missed = [&](int64_t d) LOUVER_ALWAYS_INLINE {
            const double e = residual(block, scratch.fit.codes, scratch.center, scratch.scale, i, d);
            return e * e;
        };
        const double away = sum_channels(0, dims, squares_away, square_away);
        const double missed = coded ? sum_channels(0, dims, squares_missed, square_missed) : 0.0;
        spread = away > spread ? away : spread;
        error = missed > error ? missed : error;
    }
    sketch.value_spread[index] = round_up(std::sqrt(spread) * kNormSlack);
    if (coded) sketch.value_error[index] = round_up(std::sqrt(error) * kNormSlack);
}

inline void encode_one(const EncodeContext& context, int64_t row, int64_t head, int64_t b, EncodeScratch& scratch) {
    const SketchView& sketch = *context.sketch;
    const int64_t index = sketch.block(row, head, b), position = context.kv_start[row] + b * sketch.frame_len;
    const int64_t dims = sketch.dims, padded = padded_dims(dims);
    std::memset(scratch.valid, 1, static_cast<size_t>(sketch.frame_len));
    read_block(*context.keys, row, head, position, sketch, scratch.x, scratch.valid);
    sketch.value_spread[index] = kInfinity;
    if (context.values != nullptr) {
        read_block(*context.values, row, head, position, sketch, scratch.y, scratch.valid);
        encode_values(sketch, index, row, head, scratch);
    }
    const Block block{scratch.x, scratch.valid, sketch.frame_len, dims, padded};
    const Coded to{sketch.key_codes + index * sketch.frame_len * (dims / 2), sketch.key_frame + index * dims,
                   sketch.key_scale + index};
    fit_block(block, sketch.clip, to, scratch.fit);
    decode_frame(to, dims, scratch);
    const Radii radii{sketch.key_radius + index * sketch.half_len() * sketch.slices,
                      sketch.radius_least + index * sketch.slices, sketch.radius_unit + index * sketch.slices};
    encode_radii(block, sketch, sketch.query_weight + (row * sketch.heads + head) * dims, scratch, radii);
}

// Threads take blocks one by one from a common counter.
inline void encode_member(void* argument, int rank, Team&) {
    auto& context = *static_cast<EncodeContext*>(argument);
    const SketchView& sketch = *context.sketch;
    EncodeScratch scratch = encode_scratch(sketch, context.memory + rank * context.bytes_per_thread);
    int64_t passed = 0, mine = context.next.fetch_add(1);
    for (int64_t row = 0; row < sketch.batch; ++row) {
        const int64_t full = (context.kv_len[row] - context.kv_start[row]) / sketch.frame_len;
        const int64_t fresh = full > sketch.num_blocks[row] ? full - sketch.num_blocks[row] : 0;
        for (; mine < passed + fresh * sketch.heads; mine = context.next.fetch_add(1)) {
            const int64_t item = mine - passed;
            encode_one(context, row, item / fresh, sketch.num_blocks[row] + item % fresh, scratch);
        }
        passed += fresh * sketch.heads;
    }
}

// Close the blocks that are full and advance num_blocks.
inline void encode_block(const CacheView& keys, const CacheView* values, const SketchView& sketch,
                         const int32_t* kv_start, const int32_t* kv_len, int num_threads) {
    EncodeContext context;
    context.keys = &keys, context.values = values, context.sketch = &sketch;
    context.kv_start = kv_start, context.kv_len = kv_len;
    context.bytes_per_thread = (encode_bytes(sketch) + 63) / 64 * 64;
    context.memory = scratch(context.bytes_per_thread * num_threads);
    parallel(num_threads, encode_member, &context);
    for (int64_t row = 0; row < sketch.batch; ++row) {
        const int64_t full = (kv_len[row] - kv_start[row]) / sketch.frame_len;
        if (full > sketch.num_blocks[row]) sketch.num_blocks[row] = static_cast<int32_t>(full);
    }
}

}  // namespace louver::LOUVER_ISA
