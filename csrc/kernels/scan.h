// Bounds of every key of a block for every head of a group, from codes and radii alone.
//
// A key is sketched as z + (c - 8) s per channel, so with p = q s and p = step i + e, i whole,
//     q . k_sketched = [sum q (z - s/2) - 7.5 step N]  +  step I  +  sum e (c - 7.5),     I = sum i c,  N = sum i,
// and the last sum is at most 7.5 sum |e| in absolute value: rounding the query to 8 bits is part of the half-width. I
// and N are exact. Proof with every float32 rounding: docs/guarantee.md, section "CPU backend".
#pragma once

#include "kernels/block_query.h"

namespace louver::LOUVER_ISA {

// Whether any of n bytes of radii holds kNoBound.
inline bool lacks_bound(const uint8_t* radius, int64_t n) {
    uint8_t found = 0;
    for (int64_t i = 0; i < n; ++i) found |= ((radius[i] & 15) == kNoBound) | ((radius[i] >> 4) == kNoBound);
    return found != 0;
}

// A block's radius codes as floats [slices, stride]: two tokens to a byte, one of each half of the block.
template <int kSlices>
LOUVER_INLINE void unpack_radii(const uint8_t* radius, int64_t half, int64_t stride, float* to) {
    for (int64_t token = 0; token < half; token += kLanes) {
        Ints x;  // little-endian
        if constexpr (kSlices == 1) x = widen(load<Bytes>(radius + token));
        if constexpr (kSlices == 2) x = widen(load<Shorts>(radius + 2 * token));
        for (int s = 0; s < kSlices; ++s) {
            store(to + s * stride + token, to_float(x >> (8 * s) & 15));
            store(to + s * stride + half + token, to_float(x >> (8 * s + 4) & 15));
        }
    }
}

// Of block `index`: radii, and which keys have no bound.
inline void read_radii(Scan& scan, int64_t index) {
    const SketchView& sketch = *scan.sketch;
    const int64_t frame_len = sketch.frame_len, half = sketch.half_len(), slices = sketch.slices;
    const uint8_t* radius = sketch.key_radius + index * half * slices;
    if (slices <= 2 && half % kLanes == 0 && frame_len == 2 * half) {
        if (slices == 1) unpack_radii<1>(radius, half, scan.stride, scan.radii);
        if (slices == 2) unpack_radii<2>(radius, half, scan.stride, scan.radii);
    } else {
        for (int64_t t = 0; t < frame_len; ++t)
            for (int64_t s = 0; s < slices; ++s)
                scan.radii[s * scan.stride + t] =
                    static_cast<float>(t < half ? radius[t * slices + s] & 15 : radius[(t - half) * slices + s] >> 4);
    }
    scan.all_bounded = scan.block.finite && !lacks_bound(radius, half * slices);
    for (int64_t token = 0; token < frame_len; token += kLanes) {
        Ints unbounded = scan.block.finite ? ~first_lanes(frame_len - token) : ~Ints{};
        for (int64_t s = 0; s < slices && !scan.all_bounded; ++s)
            unbounded |= load<Floats>(scan.radii + s * scan.stride + token) == static_cast<float>(kNoBound);
        scan.unbounded[token / kLanes] = bits(unbounded);
    }
}

// Ask for all of block `index` but its codes. Each is a few lines of a row that is next read a block later: too far
// apart for the processor to ask by itself.
LOUVER_INLINE void touch_block(const SketchView& sketch, int64_t index) {
    const int64_t frame = 2 * sketch.dims, radius = sketch.half_len() * sketch.slices;
    for (int64_t line = 0; line < frame; line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(sketch.key_frame + index * sketch.dims) + line);
    for (int64_t line = 0; line < radius; line += 64) __builtin_prefetch(sketch.key_radius + index * radius + line);
    __builtin_prefetch(sketch.key_scale + index);
    __builtin_prefetch(sketch.radius_least + index * sketch.slices);
    __builtin_prefetch(sketch.radius_unit + index * sketch.slices);
}

// Radii, dots and unbounded keys of block `index`, for head_bounds.
inline void scan_block(Scan& scan, int64_t index) {
    const SketchView& sketch = *scan.sketch;
    const int64_t frame_len = sketch.frame_len;
    touch_block(sketch, index + 1);
    const uint8_t* codes = sketch.key_codes + index * frame_len * scan.half;
    scan.next_codes = codes + frame_len * scan.half;
    prepare_block(scan, index);
    for (int64_t token = 0; token < frame_len; token += kCodeTokens) {
        const int64_t count = frame_len - token < kCodeTokens ? frame_len - token : kCodeTokens;
        touch_next(scan, (frame_len + token) * scan.half * 3 / 8, (frame_len + token + count) * scan.half * 3 / 8);
        dot_codes(codes + token * scan.half, count, scan.half, scan.half_padded, scan.block.query,
                  scan.planes * scan.group.size, scan.dots + token, scan.stride);
    }
    read_radii(scan, index);
}

// At least any half-width of the scanned block, for head g.
inline float widest_bound(const Scan& scan, int64_t g) {
    float out = scan.block.slack[g];
    for (int64_t s = 0; s < scan.sketch->slices; ++s) out += kNoBound * scan.block.reach[g * scan.sketch->slices + s];
    return out;
}

// Call body(token, estimate, half_width) for kLanes tokens at a time of the scanned block, for head g. Lanes of
// unbounded keys mean nothing. kSlices: the sketch's, or 0 for any; kPlanes: the scan's.
template <int kSlices, int kPlanes, class Body>
LOUVER_INLINE void head_bounds_of(const Scan& scan, int64_t g, Body body) {
    const int64_t slices = kSlices == 0 ? scan.sketch->slices : kSlices, stride = scan.stride;
    const int64_t frame_len = scan.sketch->frame_len;
    const float bias = scan.block.bias[g], step = scan.block.step[g], slack = scan.block.slack[g];
    const float *reach = scan.block.reach + g * slices, *radii = scan.radii;
    const int32_t *high = scan.dots + g * stride, *low = scan.dots + (scan.group.size + g) * stride;
    for (int64_t token = 0; token < frame_len; token += kLanes) {
        Ints dot = load<Ints>(high + token);
        if (kPlanes == 2) dot = 256 * dot + load<Ints>(low + token);
        Floats width = splat(slack);
        for (int64_t s = 0; s < slices; ++s) width += reach[s] * load<Floats>(radii + s * stride + token);
        body(token, bias + step * to_float(dot), width);
    }
}

template <int kPlanes, class Body>
LOUVER_INLINE void head_bounds_in(const Scan& scan, int64_t g, Body body) {
    if (scan.sketch->slices == 1) return head_bounds_of<1, kPlanes>(scan, g, body);
    if (scan.sketch->slices == 2) return head_bounds_of<2, kPlanes>(scan, g, body);
    head_bounds_of<0, kPlanes>(scan, g, body);
}

template <class Body>
LOUVER_INLINE void head_bounds(const Scan& scan, int64_t g, Body body) {
    if (scan.planes == 1) return head_bounds_in<1>(scan, g, body);
    head_bounds_in<2>(scan, g, body);
}

}  // namespace louver::LOUVER_ISA
