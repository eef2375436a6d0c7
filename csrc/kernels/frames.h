// A block's frame, decoded: per channel a scale and a center in halves of it (src/louver/sketch/layout.py).
#pragma once

#include "kernels/simd.h"

namespace louver::LOUVER_ISA {

// SCALES at whole numbers 0 .. 7, of 2^0: eighths of an octave.
alignas(64) static constexpr float kEighths[16] = {1.0f,          0x1.172b84p0f, 0x1.306fep0f,  0x1.4bfdaep0f,
                                                   0x1.6a09e6p0f, 0x1.8ace54p0f, 0x1.ae89fap0f, 0x1.d5818ep0f};
constexpr int kOctavesBelowOne = 18;

// SCALES[code]; powers of two scale without rounding.
LOUVER_INLINE Floats scales_of(Ints code) {
#if defined(__AVX2__)
    const Floats eighths = __builtin_shuffle(load<Floats>(kEighths), code & 7);
#else
    const Floats eighths = gather(kEighths, code & 7);
#endif
    return as_float(as_int(eighths) + (((code >> 3) - kOctavesBelowOne) << 23));
}

// The least code whose scale is no less than x, for normal x.
LOUVER_INLINE Ints scale_codes_above(Floats x) {
    const Ints word = as_int(x), exponent = (word >> 23) - 127;
    const Floats fraction = as_float((word & 0x7fffff) | 0x3f800000);  // in 1 .. 2
    Ints code = 8 * (exponent + kOctavesBelowOne);
    for (int i = 0; i < 8; ++i) code -= Ints(fraction > kEighths[i]);
    return code;
}

constexpr int kFalls = 64;     // scales a channel may have: the block's widest, and eighths of an octave below it
constexpr int kCenters = 512;  // half scales a center may be above zero or below

struct FrameLanes {
    Floats center, scale;  // the first in half scales, a whole number
};

// kLanes channels of a frame, of which n are there; the others have a scale of 0.
LOUVER_INLINE FrameLanes frame_lanes(const int16_t* frame, uint8_t widest, int64_t n) {
    SignedShorts packed = {};
    if (n >= kLanes) {
        packed = load<SignedShorts>(frame);
    } else {
        std::memcpy(&packed, frame, static_cast<size_t>(2 * (n < 0 ? 0 : n)));
    }
    const Ints x = widen(packed);
    Floats scale = scales_of(static_cast<int32_t>(widest) - (x & (kFalls - 1)));
    if (n < kLanes) scale = select(first_lanes(n), scale, splat(0));
    return FrameLanes{to_float(x >> 6), scale};
}

}  // namespace louver::LOUVER_ISA
