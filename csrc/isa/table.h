// Compiled once per instruction set: defines LOUVER_ISA's kernels and its table.
#include "isa.h"
#include "kernels/balls.h"
#include "kernels/bounds.h"
#include "kernels/counts.h"
#include "kernels/dense.h"
#include "kernels/encode.h"
#include "kernels/mass.h"
#include "kernels/search.h"
#include "kernels/selection.h"
#include "kernels/summary.h"
#include "kernels/tiers.h"
#include "kernels/tighten.h"
#include "kernels/within.h"

namespace louver::LOUVER_ISA {

static void bounds_entry(const Problem& problem, const SketchView& sketch, const Rule& rule, float* estimate,
                         float* half_width, uint8_t* undecided, float* known, int64_t sketched, int64_t longest,
                         int num_threads) {
    bounds(problem, sketch, rule, BoundsOutput{estimate, half_width, undecided, known, sketched, longest}, num_threads);
}

extern const KernelTable table;
const KernelTable table = {LOUVER_ISA_NAME, encode_block,     bounds_entry,  step,         search,
                           score,           attend_selection, attend_dense,  attend_tiers, count_tiers,
                           summarize,       tighten,          attend_within, attend_mass,  groups_reach};

}  // namespace louver::LOUVER_ISA
