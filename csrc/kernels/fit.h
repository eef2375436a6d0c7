// Fitting frames to blocks of keys or values, and their codes: fit_frames of src/louver/sketch/encode.py. The choice is
// free; what it misses is measured afterwards (encode.h).
#pragma once

#include "kernels/frames.h"

namespace louver::LOUVER_ISA {

constexpr int kClipSteps = 7;  // the scale that spans the range, one eighth of an octave above it, and five below

// One block of n tokens x dims channels in float32 (row-major, rows padded), and which tokens a frame can hold.
struct Block {
    const float* x;
    const uint8_t* valid;
    int64_t tokens, dims, padded;
};

// Where a block's frame and codes go.
struct Coded {
    uint8_t* packed;  // [tokens, dims / 2]
    int16_t* frame;   // [dims]
    uint8_t* widest;
};

struct FitScratch {
    float* codes;          // [tokens, padded], codes - 8, left for the norms
    float* column;         // [tokens, kLanes]
    float* middle;         // [padded]
    int32_t *full, *fine;  // [padded], the codes of the scale that spans the range, and of the finest allowed
};

inline int64_t fit_floats(int64_t tokens, int64_t padded) { return tokens * (padded + kLanes) + 3 * padded; }

inline FitScratch fit_scratch(int64_t tokens, int64_t padded, float* memory) {
    FitScratch out;
    out.codes = memory, out.column = out.codes + tokens * padded, out.middle = out.column + tokens * kLanes;
    out.full = reinterpret_cast<int32_t*>(out.middle + padded), out.fine = out.full + padded;
    return out;
}

LOUVER_INLINE Ints at_least(Ints x, Ints least) { return x < least ? least : x; }
LOUVER_INLINE Ints at_most(Ints x, Ints most) { return x > most ? most : x; }

// Ranges of all channels, as the codes of scales; returns the code of the block's widest.
inline int32_t find_ranges(const Block& block, const FitScratch& scratch) {
    Ints widest = {};
    for (int64_t d = 0; d < block.padded; d += kLanes) {
        Floats low = splat(kInfinity), high = splat(-kInfinity);
        for (int64_t i = 0; i < block.tokens; ++i) {
            if (!block.valid[i]) continue;
            const Floats x = load<Floats>(block.x + i * block.padded + d);
            low = min(low, x), high = max(high, x);
        }
        const Ints empty = low > high;
        low = select(empty, splat(0), low), high = select(empty, splat(0), high);
        const Floats middle = (low + high) * 0.5f, range = (high - low) * (1.0f / 16);
        const Floats offset = abs(middle) / (kCenters / 2 - 2);
        const Ints full = scale_codes_above(max(range, splat(0x1p-30f)));
        const Ints fine = scale_codes_above(max(offset, splat(0x1p-30f)));
        widest = at_least(widest, at_least(full, fine) + 1);
        store(scratch.middle + d, middle), store(scratch.full + d, full), store(scratch.fine + d, fine);
    }
    int32_t out = 0;
    for (int lane = 0; lane < kLanes; ++lane) out = widest[lane] > out ? widest[lane] : out;
    return out < 255 ? out : 255;
}

// Choose kLanes channels' scales and centers by the fourth powers of what the codes miss; write them and the codes.
// column holds kLanes floats a token: rows of a power of two of bytes would fight for the same places of the
// first-level cache.
inline void fit_channels(const Block& block, int64_t d, bool clip, int32_t widest, int16_t* frame,
                         const FitScratch& scratch) {
    int64_t n = 0;
    for (int64_t i = 0; i < block.tokens; ++i) {
        if (!block.valid[i]) continue;
        store(scratch.column + kLanes * n++, load<Floats>(block.x + i * block.padded + d));
    }
    const Floats middle = load<Floats>(scratch.middle + d);
    const Ints full = load<Ints>(scratch.full + d);
    const int32_t least = widest - (kFalls - 1) > 0 ? widest - (kFalls - 1) : 0;
    const Ints finest = at_most(at_least(load<Ints>(scratch.fine + d), Ints{} + least), Ints{} + 255);
    // In scales, less the center; a code is the nearest whole number within -8 .. 7.
    auto code_of = [](Floats y)
                       LOUVER_ALWAYS_INLINE { return to_float(round_to_int(min(max(y, splat(-8.0f)), splat(7.0f)))); };
    Floats best_error = splat(kInfinity), best_inverse = {}, best_center = {};
    Ints best_code = {};
    for (int step = 0; step < (clip ? kClipSteps : 1); ++step) {
        const Ints code = at_most(at_least(full + (1 - step), finest), Ints{} + widest);
        const Floats scale = scales_of(code), inverse = 1.0f / scale;
        Floats whole = to_float(round_to_int(2.0f * (middle / scale) + 1.0f));
        whole = min(max(whole, splat(-kCenters)), splat(kCenters - 1));
        const Floats center = 0.5f * whole;
        auto miss = [&](int64_t i) LOUVER_ALWAYS_INLINE {
            const Floats y = load<Floats>(scratch.column + kLanes * i) * inverse - center, off = y - code_of(y);
            const Floats square = off * off;
            return square * square;
        };
        Floats error = {}, other = {};  // two, because each addition waits for the one before it
        int64_t i = 0;
        for (; i + 2 <= n && clip; i += 2) error += miss(i), other += miss(i + 1);
        if (i < n && clip) error += miss(i);
        const Floats square = scale * scale;
        error = (error + other) * (square * square);
        const Ints better = clip ? error < best_error : ~Ints{};
        best_error = select(better, error, best_error);
        best_inverse = select(better, inverse, best_inverse), best_center = select(better, whole, best_center);
        best_code = better ? code : best_code;
    }
    const Floats center = 0.5f * best_center;
    for (int64_t i = 0; i < block.tokens; ++i) {
        const Floats y = load<Floats>(block.x + i * block.padded + d) * best_inverse - center;
        store(scratch.codes + i * block.padded + d, block.valid[i] ? code_of(y) : splat(0));
    }
    const Ints packed = round_to_int(best_center) * kFalls + (widest - best_code);
    for (int lane = 0; lane < kLanes && d + lane < block.dims; ++lane)
        frame[d + lane] = static_cast<int16_t>(packed[lane]);
}

// Fit and pack a block; scratch keeps codes - 8.
inline void fit_block(const Block& block, bool clip, const Coded& to, const FitScratch& scratch) {
    const int64_t half = block.dims / 2, padded = block.padded, tokens = block.tokens;
    const int32_t widest = find_ranges(block, scratch);
    *to.widest = static_cast<uint8_t>(widest);
    for (int64_t d = 0; d < padded; d += kLanes) fit_channels(block, d, clip, widest, to.frame, scratch);
    for (int64_t i = 0; i < tokens; ++i) {
        const float *low = scratch.codes + i * padded, *high = low + half;
        int64_t j = 0;
        for (; j + kLanes <= half; j += kLanes) {
            const Ints a = round_to_int(load<Floats>(low + j)) + 8, b = round_to_int(load<Floats>(high + j)) + 8;
            store_bytes(to.packed + i * half + j, a | b << 4);
        }
        for (; j < half; ++j) {
            const int code = (static_cast<int>(low[j]) + 8) | (static_cast<int>(high[j]) + 8) << 4;
            to.packed[i * half + j] = static_cast<uint8_t>(code);
        }
    }
}

}  // namespace louver::LOUVER_ISA
