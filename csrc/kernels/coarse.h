// Sketched values: weighted sums of packed 4-bit codes in integers, with weights of 8 bits per block and head.
#pragma once

#include "kernels/simd.h"

namespace louver::LOUVER_ISA {

// total[g * 2 * half + j] += sum_i weight[g * stride + i] * code of channel j of token i, low nibbles first, then the
// high ones. rows: packed codes of each token. count is at most 128: 255 * 15 * 128 is far inside int32.
inline void add_codes(const uint8_t* const* rows, int64_t count, int64_t half, const uint8_t* weights, int64_t stride,
                      int64_t group, int32_t* total) {
    for (int64_t g = 0; g < group; ++g) {
        int32_t* low = total + g * 2 * half;
        int32_t* high = low + half;
        for (int64_t i = 0; i < count; ++i) {
            const int32_t w = weights[g * stride + i];
            if (w == 0) continue;
            const uint8_t* packed = rows[i];
            for (int64_t j = 0; j < half; ++j) {
                low[j] += w * (packed[j] & 15);
                high[j] += w * (packed[j] >> 4);
            }
        }
    }
}

}  // namespace louver::LOUVER_ISA
