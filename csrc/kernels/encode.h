// Encoding full blocks of keys and values into frames, as src/louver/sketch/encode.py does: the frame is free, the
// promise is that a decoded radius is at least the real norm of what the codes miss. Norms are taken in float64 and
// rounded up.
#pragma once

#include <cstdlib>

#include "kernels/exact.h"
#include "kernels/scan.h"
#include "kernels/schedule.h"

namespace louver::LOUVER_ISA {

constexpr double kNormSlack = 1 + 0x1p-40;
constexpr int kClipSteps = 7;  // the scale that spans the range, one eighth of an octave above it, and five below

inline float scale_of(int code) {
    Bytes x = {};
    x[0] = static_cast<uint8_t>(code);
    return scales_of(x)[0];
}

inline float round_up(double x) {
    const float y = static_cast<float>(x);
    return y < x ? std::nextafterf(y, kInfinity) : y;
}

// One block of n tokens x dims channels in float32 (row-major, rows padded), and which tokens a frame can hold.
struct Block {
    const float* x;
    const uint8_t* valid;
    int64_t tokens, dims, padded;
};

// Codes of kLanes channels of one token in a frame: round((x - center) / scale) + 8, within 0..15, as floats.
LOUVER_INLINE Floats code_lanes(Floats x, Floats center, Floats inverse_scale) {
    const Floats y = (x - center) * inverse_scale;
    return to_float(round_to_int(min(max(y, splat(-8.0f)), splat(7.0f))));
}

// Fit a frame to kLanes channels; write centers (float16) and scale codes, and codes - 8 to codes [tokens, padded].
// column holds kLanes floats a token: rows of a power of two of bytes would fight for the same places of the
// first-level cache.
inline void fit_channels(const Block& block, int64_t d, bool clip, uint16_t* center_out, uint8_t* scale_out,
                         float* codes, float* column) {
    Floats low = splat(kInfinity), high = splat(-kInfinity);
    int64_t n = 0;
    for (int64_t i = 0; i < block.tokens; ++i) {
        if (!block.valid[i]) continue;
        const Floats x = load<Floats>(block.x + i * block.padded + d);
        low = min(low, x), high = max(high, x);
        store(column + kLanes * n++, x);
    }
    const Ints empty = low > high;
    low = select(empty, splat(0), low), high = select(empty, splat(0), high);
    const Floats middle = (low + high) * 0.5f, range = (high - low) * (1.0f / 16);
    Ints full;
    for (int lane = 0; lane < kLanes; ++lane) {
        const float reach = range[lane] > 0x1p-30f ? range[lane] : 0x1p-30f;
        full[lane] = static_cast<int>(std::ceil(8 * (std::log2(reach) + 18)));
    }
    Floats best_error = splat(kInfinity), best_scale = {}, best_center = {};
    Ints best_code = {};
    for (int step = 0; step < (clip ? kClipSteps : 1); ++step) {
        Ints code = full + (1 - step);
        code = code < 0 ? Ints{} : code > 255 ? Ints{} + 255 : code;
        const Floats scale = scales_of(__builtin_convertvector((UInts)code, Bytes));
        const Floats center = from_half(to_halves(middle + 0.5f * scale)), inverse = 1.0f / scale;
        auto squared_miss = [&](int64_t i) LOUVER_ALWAYS_INLINE {
            const Floats x = load<Floats>(column + kLanes * i);
            const Floats miss = x - (code_lanes(x, center, inverse) * scale + center);
            return miss * miss;
        };
        Floats error = {}, other = {};  // two, because each addition waits for the one before it
        int64_t i = 0;
        for (; i + 2 <= n && clip; i += 2) error += squared_miss(i), other += squared_miss(i + 1);
        if (i < n && clip) error += squared_miss(i);
        error += other;
        const Ints better = clip ? error < best_error : ~Ints{};
        best_error = select(better, error, best_error);
        best_scale = select(better, scale, best_scale), best_center = select(better, center, best_center);
        best_code = better ? code : best_code;
    }
    const Floats inverse = 1.0f / best_scale;
    for (int64_t i = 0; i < block.tokens; ++i) {
        const Floats x = load<Floats>(block.x + i * block.padded + d);
        store(codes + i * block.padded + d, block.valid[i] ? code_lanes(x, best_center, inverse) : splat(0));
    }
    for (int lane = 0; lane < kLanes && d + lane < block.dims; ++lane) {
        center_out[d + lane] = to_half(best_center[lane]);
        scale_out[d + lane] = static_cast<uint8_t>(best_code[lane]);
    }
}

// Fit and pack a block; codes [tokens, padded] keeps codes - 8 for the norms.
inline void fit_block(const Block& block, bool clip, uint8_t* packed, uint16_t* center, uint8_t* scale, float* codes,
                      float* column) {
    const int64_t half = block.dims / 2, padded = block.padded, tokens = block.tokens;
    for (int64_t d = 0; d < padded; d += kLanes) fit_channels(block, d, clip, center, scale, codes, column);
    for (int64_t i = 0; i < tokens; ++i) {
        const float *low = codes + i * padded, *high = low + half;
        int64_t j = 0;
        for (; j + kLanes <= half; j += kLanes) {
            const Ints a = round_to_int(load<Floats>(low + j)) + 8, b = round_to_int(load<Floats>(high + j)) + 8;
            store_bytes(packed + i * half + j, a | b << 4);
        }
        for (; j < half; ++j) {
            const int code = (static_cast<int>(low[j]) + 8) | (static_cast<int>(high[j]) + 8) << 4;
            packed[i * half + j] = static_cast<uint8_t>(code);
        }
    }
}

constexpr int kHalfLanes = kLanes / 2;
typedef float HalfFloats __attribute__((vector_size(4 * kHalfLanes)));
typedef double Doubles __attribute__((vector_size(8 * kHalfLanes)));

LOUVER_INLINE Doubles widen(const float* p) { return __builtin_convertvector(load<HalfFloats>(p), Doubles); }

// What the code misses in one channel, float64: the code times the scale is exact, the rest as the reference does it.
LOUVER_INLINE double residual(const Block& block, const float* codes, const double* center, const double* scale,
                              int64_t i, int64_t d) {
    const int64_t at = i * block.padded + d;
    return static_cast<double>(block.x[at]) - (static_cast<double>(codes[at]) * scale[d] + center[d]);
}
LOUVER_INLINE Doubles residuals(const Block& block, const float* codes, const double* center, const double* scale,
                                int64_t i, int64_t d) {
    const int64_t at = i * block.padded + d;
    return widen(block.x + at) - (widen(codes + at) * load<Doubles>(scale + d) + load<Doubles>(center + d));
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
    float *x, *y, *codes;                      // [frame_len, padded] each: keys, values, codes
    float* column;                             // [frame_len, kLanes]
    double *center, *scale, *inverse, *norms;  // [padded] x 3, [frame_len, slices]
    uint8_t* valid;                            // [frame_len]
};

inline void widen_frame(const uint16_t* center, const uint8_t* scale, int64_t dims, EncodeScratch& scratch) {
    for (int64_t d = 0; d < dims; ++d) {
        Shorts half = {};
        half[0] = center[d];
        scratch.center[d] = from_half(half)[0];
        scratch.scale[d] = scale_of(scale[d]);
    }
}

// Radii of a block: code * unit, in real arithmetic, is at least the norm of the residual in each slice.
inline void encode_radii(const Block& block, const SketchView& sketch, const float* weight, EncodeScratch& scratch,
                         uint8_t* radius, float* unit) {
    for (int64_t d = 0; d < block.dims; ++d) {
        float u = 1;
        if (sketch.metric == Metric::frame) u = static_cast<float>(scratch.scale[d]) * weight[d];
        if (sketch.metric == Metric::diagonal) u = weight[d];
        scratch.inverse[d] = 1 / static_cast<double>(u);
    }
    for (int64_t s = 0; s < sketch.slices; ++s) {
        const int64_t begin = sketch.slice_begin(s), end = sketch.slice_begin(s + 1);
        double widest = 0;
        for (int64_t i = 0; i < block.tokens; ++i) {
            auto many = [&](int64_t d) LOUVER_ALWAYS_INLINE {
                const Doubles e = residuals(block, scratch.codes, scratch.center, scratch.scale, i, d);
                return e * e * load<Doubles>(scratch.inverse + d);
            };
            auto one = [&](int64_t d) LOUVER_ALWAYS_INLINE {
                const double e = residual(block, scratch.codes, scratch.center, scratch.scale, i, d);
                return e * e * scratch.inverse[d];
            };
            const double total = block.valid[i] ? sum_channels(begin, end, many, one) : 0.0;
            const double norm = std::sqrt(total) * kNormSlack;
            scratch.norms[i] = norm;
            widest = norm > widest ? norm : widest;
        }
        float one = round_up(widest / (kNoBound - 2));
        one = one > 0x1p-100f ? one : 0x1p-100f;
        unit[s] = one;
        for (int64_t i = 0; i < block.tokens; ++i) {
            double code = std::ceil(scratch.norms[i] / one);
            if (code * static_cast<double>(one) < scratch.norms[i]) code += 1;
            if (!(code < kNoBound)) code = kNoBound;  // cannot happen; if it did, the key would be exact
            radius[i * sketch.slices + s] = block.valid[i] ? static_cast<uint8_t>(code) : kNoBound;
        }
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
    return 4 * sketch.frame_len * (3 * padded + kLanes) + 24 * padded + 9 * sketch.frame_len + 512;
}

inline EncodeScratch encode_scratch(const SketchView& sketch, char* memory) {
    const int64_t padded = padded_dims(sketch.dims), area = sketch.frame_len * padded;
    EncodeScratch out;
    out.x = reinterpret_cast<float*>(memory), out.y = out.x + area, out.codes = out.y + area;
    out.column = out.codes + area;
    out.center = reinterpret_cast<double*>(out.column + sketch.frame_len * kLanes), out.scale = out.center + padded;
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
        fit_block(block, sketch.clip, sketch.value_codes + index * sketch.frame_len * (dims / 2),
                  sketch.value_center + index * dims, sketch.value_scale + index * dims, scratch.codes, scratch.column);
        widen_frame(sketch.value_center + index * dims, sketch.value_scale + index * dims, dims, scratch);
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
            const Doubles e = residuals(block, scratch.codes, scratch.center, scratch.scale, i, d);
            return e * e;
        };
        auto square_missed = [&](int64_t d) LOUVER_ALWAYS_INLINE {
            const double e = residual(block, scratch.codes, scratch.center, scratch.scale, i, d);
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
    fit_block(block, sketch.clip, sketch.key_codes + index * sketch.frame_len * (dims / 2),
              sketch.key_center + index * dims, sketch.key_scale + index * dims, scratch.codes, scratch.column);
    widen_frame(sketch.key_center + index * dims, sketch.key_scale + index * dims, dims, scratch);
    encode_radii(block, sketch, sketch.query_weight + (row * sketch.heads + head) * dims, scratch,
                 sketch.key_radius + index * sketch.frame_len * sketch.slices,
                 sketch.radius_unit + index * sketch.slices);
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
