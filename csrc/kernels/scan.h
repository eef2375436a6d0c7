// Bounds of every key of a block for every head of a group, from codes and radii alone.
//
// A key is sketched as z + (c - 8) s per channel, so with p = q s and p = step i + e, i whole,
//     q . k_sketched = sum q (z - s/2)  +  step (I - 7.5 N)  +  sum e (c - 7.5),     I = sum i c,  N = sum i,
// and the last sum is at most 7.5 sum |e| in absolute value: rounding the query to 8 bits is part of the half-width. I
// and N are exact. Proof with every float32 rounding: docs/guarantee.md, section "CPU backend".
#pragma once

#include "kernels/codes.h"
#include "kernels/query.h"

namespace louver::LOUVER_ISA {

// SCALES[code] of sketch/layout.py: eighths of an octave; powers of two scale without rounding.
LOUVER_INLINE f32x16 scales_of(u8x16 codes) {
    const i32x16 code = (i32x16) __builtin_convertvector(codes, u32x16);
    const f32x16 eighths = {1.0f,
                            0x1.172b84p0f,
                            0x1.306fep0f,
                            0x1.4bfdaep0f,
                            0x1.6a09e6p0f,
                            0x1.8ace54p0f,
                            0x1.ae89fap0f,
                            0x1.d5818ep0f,
                            1,
                            1,
                            1,
                            1,
                            1,
                            1,
                            1,
                            1};
    return as_float(as_int(__builtin_shuffle(eighths, code & 7)) + (((code >> 3) - 18) << 23));
}

constexpr int64_t kMaxDims = 1024;

// What one block's frame makes of a group's queries.
struct BlockQuery {
    int8_t* query = nullptr;     // [planes, group, 2 * half_padded]
    float* bias = nullptr;       // [group], sum q (z - s/2)
    float* half_step = nullptr;  // [group]
    int32_t* offset = nullptr;   // [group], 15 N
    float* slack = nullptr;      // [group]
    float* reach = nullptr;      // [group, slices], inflated norm times radius unit
    bool finite = true;          // false: some bound could leave float32's range, so every key is exact
};

struct Scan {
    const SketchView* sketch = nullptr;
    Group group;
    int64_t row = 0, head = 0;
    int64_t half = 0, half_padded = 0;
    int planes = 1;
    float *energy = nullptr,
          *peak = nullptr;  // [group, padded]: (q / peak)^2 times what the metric fixes; [group, slices]
    BlockQuery block;
    float *scale = nullptr, *shifted = nullptr;  // [padded], of the current block
    int32_t* dots = nullptr;                     // [planes, group, kLanes]
};

inline int64_t scan_bytes(const SketchView& sketch, int64_t group, int planes) {
    const int64_t half_padded = (sketch.dims / 2 + 15) / 16 * 16, padded = padded_dims(sketch.dims);
    const int64_t floats = (2 + group) * padded + group * (planes * kLanes + 4 + 2 * sketch.slices);
    return planes * group * 2 * half_padded + 4 * floats + 8 * 64;
}

// The scale that keeps squares in range is each slice's own: one for all would let a slice small beside another vanish.
inline void fill_energy(Scan& scan) {
    const SketchView& sketch = *scan.sketch;
    const float* weight = sketch.query_weight + (scan.row * sketch.heads + scan.head) * sketch.dims;
    for (int64_t g = 0; g < scan.group.size; ++g) {
        const float* q = scan.group.q + g * scan.group.padded;
        float* energy = scan.energy + g * scan.group.padded;
        std::memset(energy, 0, static_cast<size_t>(4 * scan.group.padded));
        for (int64_t s = 0; s < sketch.slices; ++s) {
            float peak = 0;
            for (int64_t d = sketch.slice_begin(s); d < sketch.slice_begin(s + 1); ++d)
                peak = std::fmax(peak, std::fabs(q[d]));
            scan.peak[g * sketch.slices + s] = peak;
            for (int64_t d = sketch.slice_begin(s); d < sketch.slice_begin(s + 1) && peak > 0; ++d) {
                const float x = q[d] / peak;
                energy[d] = x * x * (sketch.metric == Metric::identity ? 1.0f : weight[d]);
            }
        }
    }
}

inline Scan make_scan(const SketchView& sketch, const Group& group, int64_t row, int64_t head, int planes,
                      char* memory) {
    Scan scan;
    scan.sketch = &sketch, scan.group = group, scan.row = row, scan.head = head, scan.planes = planes;
    scan.half = sketch.dims / 2, scan.half_padded = (scan.half + 15) / 16 * 16;
    auto take = [&memory](int64_t bytes) {
        char* out = memory;
        memory += (bytes + 63) / 64 * 64;
        return out;
    };
    const int64_t n = group.size;
    scan.block.query = reinterpret_cast<int8_t*>(take(planes * n * 2 * scan.half_padded));
    std::memset(scan.block.query, 0, static_cast<size_t>(planes * n * 2 * scan.half_padded));
    scan.scale = reinterpret_cast<float*>(take(4 * group.padded));
    scan.shifted = reinterpret_cast<float*>(take(4 * group.padded));
    scan.dots = reinterpret_cast<int32_t*>(take(4 * planes * n * kLanes));
    scan.energy = reinterpret_cast<float*>(take(4 * n * group.padded));
    scan.peak = reinterpret_cast<float*>(take(4 * n * sketch.slices));
    fill_energy(scan);
    float* rest = reinterpret_cast<float*>(take(4 * n * (4 + sketch.slices)));
    scan.block.bias = rest, scan.block.half_step = rest + n, scan.block.slack = rest + 2 * n;
    scan.block.offset = reinterpret_cast<int32_t*>(rest + 3 * n), scan.block.reach = rest + 4 * n;
    return scan;
}

// Squared norms of the group's head g per slice, in the block's metric.
inline void slice_norms(Scan& scan, int64_t g, const float* radius_unit) {
    const SketchView& sketch = *scan.sketch;
    const float* energy = scan.energy + g * scan.group.padded;
    const float inflation = 1 + kSafety * gamma(static_cast<float>(sketch.dims + 16));
    for (int64_t s = 0; s < sketch.slices; ++s) {
        const int64_t begin = sketch.slice_begin(s), end = sketch.slice_begin(s + 1);
        float squares = 0;
        if (begin % kLanes == 0 && (end % kLanes == 0 || end == sketch.dims)) {
            f32x16 total = {};
            for (int64_t d = begin; d < end; d += kLanes) {
                const f32x16 e = load<f32x16>(energy + d);
                total += sketch.metric == Metric::frame ? e * load<f32x16>(scan.scale + d) : e;
            }
            squares = sum(total);
        } else {
            for (int64_t d = begin; d < end; ++d)
                squares += sketch.metric == Metric::frame ? energy[d] * scan.scale[d] : energy[d];
        }
        scan.block.reach[g * sketch.slices + s] =
            std::sqrt(squares) * scan.peak[g * sketch.slices + s] * radius_unit[s] * inflation;
    }
}

// Prepare block `index` (as SketchView::block counts).
inline void prepare_block(Scan& scan, int64_t index) {
    const SketchView& sketch = *scan.sketch;
    const int64_t padded = scan.group.padded, dims = sketch.dims;
    const uint16_t* center = sketch.key_center + index * dims;
    const uint8_t* codes = sketch.key_scale + index * dims;
    f32x16 extent = {};
    for (int64_t d = 0; d < padded; d += kLanes) {
        u8x16 code = {};
        u16x16 half = {};
        const int64_t n = dims - d < kLanes ? dims - d : kLanes;
        std::memcpy(&code, codes + d, static_cast<size_t>(n));
        std::memcpy(&half, center + d, static_cast<size_t>(2 * n));
        f32x16 s = scales_of(code);
        if (n < kLanes) s = select(first_lanes(n), s, splat(0));
        const f32x16 z = from_half(half), reach = abs(z) + 8.0f * s;
        store(scan.scale + d, s);
        store(scan.shifted + d, z - 0.5f * s);
        extent += reach * reach;
    }
    const float block_norm = std::sqrt(sum(extent)) * kNormInflation + kTinyNorm;
    const float chain = static_cast<float>(dims / kLanes);
    alignas(64) int8_t rounded[2][kMaxDims];
    const float levels = scan.planes == 2 ? 32639.0f : 127.0f;  // the largest whose high byte fits
    scan.block.finite = true;
    for (int64_t g = 0; g < scan.group.size; ++g) {
        const float* q = scan.group.q + g * padded;
        f32x16 peak = {}, bias = {};
        for (int64_t d = 0; d < padded; d += kLanes) {
            const f32x16 x = load<f32x16>(q + d);
            peak = max(peak, abs(x * load<f32x16>(scan.scale + d)));
            bias += x * load<f32x16>(scan.shifted + d);
        }
        const float top = largest(peak);
        const bool tiny = top < 1e-30f;
        const float step = tiny ? 0.0f : top / levels, inverse = tiny ? 0.0f : levels / top;
        f32x16 missed = {};
        i32x16 count = {};
        for (int64_t d = 0; d < padded; d += kLanes) {
            const f32x16 p = load<f32x16>(q + d) * load<f32x16>(scan.scale + d);
            const i32x16 i = round_to_int(p * inverse);
            missed += abs(p - step * to_float(i));
            count += i;
            typedef int8_t i8x16 __attribute__((vector_size(16)));
            const i32x16 high = scan.planes == 2 ? (i + 128) >> 8 : i;
            store(rounded[0] + d, __builtin_convertvector(high, i8x16));
            store(rounded[1] + d, __builtin_convertvector(i - (high << 8), i8x16));
        }
        for (int plane = 0; plane < scan.planes; ++plane) {
            int8_t* query = scan.block.query + (plane * scan.group.size + g) * 2 * scan.half_padded;
            std::memcpy(query, rounded[plane], static_cast<size_t>(scan.half));
            std::memcpy(query + scan.half_padded, rounded[plane] + scan.half, static_cast<size_t>(scan.half));
        }
        int32_t total = 0;
        for (int lane = 0; lane < kLanes; ++lane) total += count[lane];
        const float reach = scan.group.norm[g] * block_norm;
        scan.block.bias[g] = sum(bias);
        scan.block.half_step[g] = 0.5f * step;
        scan.block.offset[g] = 15 * total;
        scan.block.slack[g] =
            7.5f * sum(missed) * (1 + kSafety * gamma(chain + 16)) + kSafety * gamma(chain + 52) * reach + kAbsolute;
        slice_norms(scan, g, sketch.radius_unit + index * sketch.slices);
        float widest = 4 * reach;
        for (int64_t s = 0; s < sketch.slices; ++s) widest += 255 * scan.block.reach[g * sketch.slices + s];
        if (!(widest < 1e37f)) scan.block.finite = false;
    }
}

// Radii of 16 tokens for slice s, as floats; tokens past `count` get 0.
LOUVER_INLINE f32x16 radii(const uint8_t* radius, int64_t slices, int64_t s, int64_t count) {
    u32x16 x = {};
    if (count >= kLanes && slices == 1) {
        x = __builtin_convertvector(load<u8x16>(radius), u32x16);
    } else if (count >= kLanes && slices == 2) {
        const u32x16 pair = __builtin_convertvector(load<u16x16>(radius), u32x16);
        x = s == 0 ? pair & 255u : pair >> 8;  // little-endian
    } else {
        for (int i = 0; i < (count < kLanes ? count : kLanes); ++i) x[i] = radius[i * slices + s];
    }
    return to_float((i32x16)x);
}

// Call body(token, unbounded, estimate, half_width) for each 16 tokens of block `index`, where the last two map a head
// to its lanes and `unbounded` marks keys without a finite bound, whose lanes mean nothing.
template <class Body>
LOUVER_INLINE void scan_block(Scan& scan, int64_t index, Body body) {
    const SketchView& sketch = *scan.sketch;
    const int64_t frame_len = sketch.frame_len, slices = sketch.slices;
    prepare_block(scan, index);
    const uint8_t* codes = sketch.key_codes + index * frame_len * scan.half;
    const uint8_t* radius = sketch.key_radius + index * frame_len * slices;
    for (int64_t token = 0; token < frame_len; token += kLanes) {
        const int64_t count = frame_len - token;
        const uint8_t* at = radius + token * slices;
        dot_codes(codes + token * scan.half, count < kLanes ? count : kLanes, scan.half, scan.half_padded,
                  scan.block.query, scan.planes * scan.group.size, scan.dots);
        i32x16 unbounded = scan.block.finite ? ~first_lanes(count) : ~i32x16{};
        constexpr int64_t kHeld = 8;
        f32x16 held[kHeld];
        for (int64_t s = 0; s < slices; ++s) {
            const f32x16 r = radii(at, slices, s, count);
            unbounded |= r == static_cast<float>(kNoBound);
            if (s < kHeld) held[s] = r;
        }
        auto estimate = [&](int64_t g) {
            i32x16 dot = load<i32x16>(scan.dots + g * kLanes);
            if (scan.planes == 2) dot = 256 * dot + load<i32x16>(scan.dots + (scan.group.size + g) * kLanes);
            return scan.block.bias[g] + scan.block.half_step[g] * to_float(2 * dot - scan.block.offset[g]);
        };
        auto half_width = [&](int64_t g) {
            f32x16 width = splat(scan.block.slack[g]);
            for (int64_t s = 0; s < slices; ++s)
                width += scan.block.reach[g * slices + s] * (s < kHeld ? held[s] : radii(at, slices, s, count));
            return width;
        };
        body(token, unbounded, estimate, half_width);
    }
}

}  // namespace louver::LOUVER_ISA
