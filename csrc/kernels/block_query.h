// A group's queries in one block's frame, rounded to 8 bits, and everything of a bound that does not depend on the key;
// see scan.h for the formula.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels/codes.h"
#include "kernels/frames.h"
#include "kernels/query.h"

namespace louver::LOUVER_ISA {

// Small copies of whole vectors where the size allows, or a call costs more than the copy.
LOUVER_INLINE void copy_bytes(void* to, const void* from, int64_t n) {
    if (n == 64) {
        std::memcpy(to, from, 64);
    } else if (n == 32) {
        std::memcpy(to, from, 32);
    } else {
        std::memcpy(to, from, static_cast<size_t>(n));
    }
}

constexpr int64_t kMaxDims = 1024;

inline int64_t padded_frame(int64_t frame_len) { return (frame_len + kCodeTokens - 1) / kCodeTokens * kCodeTokens; }

// What one block's frame makes of a group's queries.
struct BlockQuery {
    int8_t* query = nullptr;  // [planes, group, 2 * half_padded]
    float* bias = nullptr;    // [group], sum q (z - s/2) - 7.5 step N
    float* step = nullptr;    // [group]
    float* slack = nullptr;   // [group], what is not the radii's, and the radii's least
    float* reach = nullptr;   // [group, slices], inflated norm times radius unit
    bool finite = true;       // false: some bound could leave float32's range, so every key is exact
};

struct Scan {
    const SketchView* sketch = nullptr;
    Group group;
    int64_t row = 0, head = 0;
    int64_t half = 0, half_padded = 0;
    int64_t slice_dims = 0, longer_slices = 0;  // channels of a slice, and how many slices have one more
    int planes = 1;
    float *energy = nullptr,
          *peak = nullptr;  // [group, padded]: (q / peak)^2 times what the metric fixes; [group, slices]
    BlockQuery block;
    float *scale = nullptr, *shifted = nullptr;  // [padded], of the current block
    int64_t stride = 0;                          // frame_len in whole vectors, of codes too
    int32_t* dots = nullptr;                     // [planes, group, stride]
    float* radii = nullptr;                      // [slices, stride]
    uint32_t* unbounded = nullptr;               // per kLanes tokens, a bit for each key without a finite bound
    const uint8_t* next_codes = nullptr;         // of the block after the one that is scanned
    bool all_bounded = true;                     // no key is without one
};

// Ask for bytes [from, to) of the next block's codes: some lines now and then while this block is worked on, so that
// memory is not idle meanwhile, and no more lines are waited for than the processor keeps track of. Three eighths are
// asked for while the query is prepared, as many while codes are multiplied, the rest while bounds are spilled.
LOUVER_INLINE void touch_next(const Scan& scan, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i += 64) touch_line(scan.next_codes + i);
}

inline int64_t scan_bytes(const SketchView& sketch, int64_t group, int planes) {
    const int64_t half_padded = padded_half(sketch.dims / 2), padded = padded_dims(sketch.dims);
    const int64_t stride = padded_frame(sketch.frame_len);
    const int64_t floats =
        (2 + group) * padded + group * (planes * stride + 3 + 2 * sketch.slices) + (sketch.slices + 1) * stride;
    return planes * group * 2 * half_padded + 4 * floats + 10 * 64;
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
    scan.half = sketch.dims / 2, scan.half_padded = padded_half(scan.half);
    scan.slice_dims = sketch.dims / sketch.slices, scan.longer_slices = sketch.dims % sketch.slices;
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
    scan.stride = padded_frame(sketch.frame_len);
    scan.dots = reinterpret_cast<int32_t*>(take(4 * planes * n * scan.stride));
    scan.radii = reinterpret_cast<float*>(take(4 * sketch.slices * scan.stride));
    scan.unbounded = reinterpret_cast<uint32_t*>(take(4 * scan.stride / kLanes));
    scan.energy = reinterpret_cast<float*>(take(4 * n * group.padded));
    scan.peak = reinterpret_cast<float*>(take(4 * n * sketch.slices));
    fill_energy(scan);
    float* rest = reinterpret_cast<float*>(take(4 * n * (3 + sketch.slices)));
    scan.block.bias = rest, scan.block.step = rest + n, scan.block.slack = rest + 2 * n;
    scan.block.reach = rest + 3 * n;
    return scan;
}

// Inflated norms per slice, in the block's metric, times the radius units, of up to four heads from g on; and times the
// least radii, of all slices, into least.
template <int kHeads>
LOUVER_INLINE void slice_reach(Scan& scan, int64_t g, int64_t index, float* least) {
    const SketchView& sketch = *scan.sketch;
    const float inflation = 1 + kSafety * gamma(static_cast<float>(sketch.dims + 18));
    const float *radius_unit = sketch.radius_unit + index * sketch.slices,
                *radius_least = sketch.radius_least + index * sketch.slices;
    double total_least[4] = {};  // wide: as many additions in float32 again would need a margin of their own
    const bool frame = sketch.metric == Metric::frame;
    int64_t begin = 0, end;
    for (int64_t s = 0; s < sketch.slices; ++s, begin = end) {
        end = begin + scan.slice_dims + (s < scan.longer_slices);
        alignas(16) float squares[4] = {};
        if (begin % kLanes == 0 && (end % kLanes == 0 || end == sketch.dims)) {
            Floats total[4] = {};
            for (int64_t d = begin; d < end; d += kLanes) {
                const Floats scale = frame ? load<Floats>(scan.scale + d) : splat(1);
                for (int h = 0; h < kHeads; ++h)
                    total[h] += load<Floats>(scan.energy + (g + h) * scan.group.padded + d) * scale;
            }
            sum4(total, squares);
        } else {
            for (int h = 0; h < kHeads; ++h)
                for (int64_t d = begin; d < end; ++d)
                    squares[h] += scan.energy[(g + h) * scan.group.padded + d] * (frame ? scan.scale[d] : 1.0f);
        }
        for (int h = 0; h < kHeads; ++h) {
            const int64_t at = (g + h) * sketch.slices + s;
            const float norm = std::sqrt(squares[h]) * scan.peak[at] * inflation;
            scan.block.reach[at] = norm * radius_unit[s];
            total_least[h] += static_cast<double>(norm) * static_cast<double>(radius_least[s]);
        }
    }
    for (int h = 0; h < kHeads; ++h) least[h] = static_cast<float>(total_least[h]);
}

// The block's queries of up to four heads from g on. block_norm >= | |z| + 8 s |. kPlain: one plane, and halves of
// whole vectors.
template <int kHeads, bool kPlain>
LOUVER_INLINE void round_queries(Scan& scan, int64_t g, float block_norm, int64_t index) {
    const int64_t padded = scan.group.padded, slices = scan.sketch->slices;
    const float chain = static_cast<float>(padded / kLanes);
    const float levels = !kPlain && scan.planes == 2 ? 32639.0f : 127.0f;  // the largest whose high byte fits
    const float* q = scan.group.q + g * padded;
    const int64_t sixteenth = scan.sketch->frame_len * scan.half / 16;
    Floats peak[4] = {}, bias[4] = {}, missed[4] = {}, count[4] = {};
    if (g == 0) touch_next(scan, sixteenth, 3 * sixteenth);
    for (int64_t d = 0; d < padded; d += kLanes) {
        const Floats s = load<Floats>(scan.scale + d), shifted = load<Floats>(scan.shifted + d);
        for (int h = 0; h < kHeads; ++h) {
            const Floats x = load<Floats>(q + h * padded + d);
            peak[h] = max(peak[h], abs(x * s));
            bias[h] += x * shifted;
        }
    }
    alignas(16) float top[4], bias_sum[4], missed_sum[4], count_sum[4], least[4];
    largest4(peak, top);
    sum4(bias, bias_sum);
    float step[4], inverse[4];
    for (int h = 0; h < kHeads; ++h) {
        const bool tiny = top[h] < 1e-30f;
        step[h] = tiny ? 0.0f : top[h] / levels, inverse[h] = tiny ? 0.0f : levels / top[h];
    }
    // Where a vector does not lie in one half of the query, it goes there by a copy.
    const int64_t half = scan.half, half_padded = scan.half_padded;
    const bool direct = kPlain || half % kLanes == 0;
    const int planes = kPlain ? 1 : scan.planes;
    alignas(64) int8_t rounded[2][kHeads][kMaxDims];
    auto place = [&](int plane, int h, int64_t d) LOUVER_ALWAYS_INLINE {
        int8_t* query = scan.block.query + (plane * scan.group.size + g + h) * 2 * half_padded;
        return !direct ? rounded[plane][h] + d : d < half ? query + d : query + half_padded + d - half;
    };
    if (g == 0) touch_next(scan, 3 * sixteenth, 6 * sixteenth);
    for (int64_t d = 0; d < padded; d += kLanes) {
        const Floats s = load<Floats>(scan.scale + d);
        for (int h = 0; h < kHeads; ++h) {
            const Floats p = load<Floats>(q + h * padded + d) * s;
            const Ints i = round_to_int(p * inverse[h]);
            const Floats whole = to_float(i);
            missed[h] += abs(p - step[h] * whole);
            count[h] += whole;  // exact below 2^24, and bounded beyond: docs/guarantee.md, 13
            const Ints high = planes == 2 ? (i + 128) >> 8 : i;
            store_bytes(place(0, h, d), high);
            if (planes == 2) store_bytes(place(1, h, d), i - (high << 8));
        }
    }
    sum4(missed, missed_sum);
    sum4(count, count_sum);
    slice_reach<kHeads>(scan, g, index, least);
    for (int h = 0; h < kHeads; ++h) {
        for (int plane = 0; plane < planes && !direct; ++plane) {
            int8_t* query = scan.block.query + (plane * scan.group.size + g + h) * 2 * scan.half_padded;
            copy_bytes(query, rounded[plane][h], scan.half);
            copy_bytes(query + scan.half_padded, rounded[plane][h] + scan.half, scan.half);
        }
        const float reach = scan.group.norm[g + h] * block_norm;
        scan.block.step[g + h] = step[h];
        scan.block.bias[g + h] = static_cast<float>(
            static_cast<double>(bias_sum[h]) - 7.5 * static_cast<double>(step[h]) * static_cast<double>(count_sum[h]));
        const float slack =
            7.5f * missed_sum[h] * (1 + kSafety * gamma(chain + 16)) + kSafety * gamma(chain + 52) * reach + kAbsolute;
        scan.block.slack[g + h] = slack + least[h];
        float widest = 4 * reach + least[h];
        for (int64_t s = 0; s < slices; ++s) widest += kNoBound * scan.block.reach[(g + h) * slices + s];
        if (!(widest < 1e37f)) scan.block.finite = false;
    }
}

// Prepare block `index` (as SketchView::block counts).
inline void prepare_block(Scan& scan, int64_t index) {
    const SketchView& sketch = *scan.sketch;
    const int64_t padded = scan.group.padded, dims = sketch.dims;
    const int16_t* frame = sketch.key_frame + index * dims;
    Floats extent = {};
    touch_next(scan, 0, sketch.frame_len * scan.half / 16);
    for (int64_t d = 0; d < padded; d += kLanes) {
        const FrameLanes lanes = frame_lanes(frame + d, sketch.key_scale[index], dims - d);
        const Floats reach = (0.5f * abs(lanes.center) + 8.0f) * lanes.scale;
        store(scan.scale + d, lanes.scale);
        store(scan.shifted + d, 0.5f * (lanes.center - 1.0f) * lanes.scale);
        extent += reach * reach;
    }
    const float block_norm = std::sqrt(sum(extent)) * kNormInflation + kTinyNorm;
    scan.block.finite = true;
    auto round = [&](auto plain) LOUVER_ALWAYS_INLINE {
        constexpr bool kPlain = decltype(plain)::value;
        int64_t g = 0;
        for (; g + 4 <= scan.group.size; g += 4) round_queries<4, kPlain>(scan, g, block_norm, index);
        if (scan.group.size - g == 1) round_queries<1, kPlain>(scan, g, block_norm, index);
        if (scan.group.size - g == 2) round_queries<2, kPlain>(scan, g, block_norm, index);
        if (scan.group.size - g == 3) round_queries<3, kPlain>(scan, g, block_norm, index);
    };
    if (scan.planes == 1 && scan.half % kLanes == 0) return round(std::true_type{});
    round(std::false_type{});
}

}  // namespace louver::LOUVER_ISA
