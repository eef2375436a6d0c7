// Bounds of every key of a block for every head of a group, from codes and radii alone.
//
// A key is sketched as z + (c - 8) s per channel, so with p = q s and p = step i + e, i whole,
//     q . k_sketched = sum q (z - s/2)  +  step (I - 7.5 N)  +  sum e (c - 7.5),     I = sum i c,  N = sum i,
// and the last sum is at most 7.5 sum |e| in absolute value: rounding the query to 8 bits is part of the half-width. I
// and N are exact. Proof with every float32 rounding: docs/guarantee.md, section "CPU backend".
#pragma once

#include "kernels/block_query.h"

namespace louver::LOUVER_ISA {

// Radii of kLanes tokens for slice s, as floats; tokens past `count` get 0.
LOUVER_INLINE Floats radii(const uint8_t* radius, int64_t slices, int64_t s, int64_t count) {
    UInts x = {};
    if (count >= kLanes && slices == 1) {
        x = __builtin_convertvector(load<Bytes>(radius), UInts);
    } else if (count >= kLanes && slices == 2) {
        const UInts pair = __builtin_convertvector(load<Shorts>(radius), UInts);
        x = s == 0 ? pair & 255u : pair >> 8;  // little-endian
    } else {
        for (int i = 0; i < (count < kLanes ? count : kLanes); ++i) x[i] = radius[i * slices + s];
    }
    return to_float((Ints)x);
}

// Radii, dots and unbounded keys of block `index`, for head_bounds.
inline void scan_block(Scan& scan, int64_t index) {
    const SketchView& sketch = *scan.sketch;
    const int64_t frame_len = sketch.frame_len, slices = sketch.slices;
    prepare_block(scan, index);
    const uint8_t* codes = sketch.key_codes + index * frame_len * scan.half;
    const uint8_t* radius = sketch.key_radius + index * frame_len * slices;
    for (int64_t token = 0; token < frame_len; token += kCodeTokens) {
        const int64_t count = frame_len - token < kCodeTokens ? frame_len - token : kCodeTokens;
        for (int64_t line = 0; line < kCodeTokens * scan.half; line += 64)
            __builtin_prefetch(codes + (frame_len + token) * scan.half + line);  // the next block's
        dot_codes(codes + token * scan.half, count, scan.half, scan.half_padded, scan.block.query,
                  scan.planes * scan.group.size, scan.dots + token, scan.stride);
    }
    for (int64_t token = 0; token < frame_len; token += kLanes) {
        const int64_t count = frame_len - token;
        Ints unbounded = scan.block.finite ? ~first_lanes(count) : ~Ints{};
        for (int64_t s = 0; s < slices; ++s) {
            const Floats r = radii(radius + token * slices, slices, s, count);
            unbounded |= r == static_cast<float>(kNoBound);
            store(scan.radii + s * scan.stride + token, r);
        }
        scan.unbounded[token / kLanes] = bits(unbounded);
    }
}

// Call body(token, estimate, half_width) for kLanes tokens at a time of the scanned block, for head g. Lanes of
// unbounded keys mean nothing. kSlices: the sketch's, or 0 for any.
template <int kSlices, class Body>
LOUVER_INLINE void head_bounds_of(const Scan& scan, int64_t g, Body body) {
    const int64_t slices = kSlices == 0 ? scan.sketch->slices : kSlices, stride = scan.stride;
    const float bias = scan.block.bias[g], half_step = scan.block.half_step[g], slack = scan.block.slack[g];
    const int32_t offset = scan.block.offset[g];
    const float* reach = scan.block.reach + g * slices;
    const int32_t *high = scan.dots + g * stride, *low = scan.dots + (scan.group.size + g) * stride;
    for (int64_t token = 0; token < scan.sketch->frame_len; token += kLanes) {
        Ints dot = load<Ints>(high + token);
        if (scan.planes == 2) dot = 256 * dot + load<Ints>(low + token);
        Floats width = splat(slack);
        for (int64_t s = 0; s < slices; ++s) width += reach[s] * load<Floats>(scan.radii + s * stride + token);
        body(token, bias + half_step * to_float(2 * dot - offset), width);
    }
}

template <class Body>
LOUVER_INLINE void head_bounds(const Scan& scan, int64_t g, Body body) {
    if (scan.sketch->slices == 1) return head_bounds_of<1>(scan, g, body);
    if (scan.sketch->slices == 2) return head_bounds_of<2>(scan, g, body);
    head_bounds_of<0>(scan, g, body);
}

}  // namespace louver::LOUVER_ISA
