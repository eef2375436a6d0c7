// Who does what: whole (row, KV head) units first, one thread each; what is left over is split by key range, together.
#pragma once

#include <cstdint>

#include "threads.h"

namespace louver::LOUVER_ISA {

// Call body(unit, shared) for every unit this thread works on. Shared units are visited by all threads, in the same
// order.
template <class Body>
inline void for_units(int64_t units, int rank, int size, Body body) {
    const int64_t whole = units / size * size;
    for (int64_t unit = rank; unit < whole; unit += size) body(unit, size == 1);
    for (int64_t unit = whole; unit < units; ++unit) body(unit, true);
}

struct Part {
    int64_t begin, end;
};

// The rank-th of `size` contiguous parts of 0 .. n, cut at multiples of `grain`.
inline Part part_of(int64_t n, int64_t grain, int rank, int size) {
    const int64_t grains = (n + grain - 1) / grain, share = (grains + size - 1) / size * grain;
    const int64_t begin = rank * share < n ? rank * share : n;
    return Part{begin, begin + share < n ? begin + share : n};
}

}  // namespace louver::LOUVER_ISA
