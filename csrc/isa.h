// The kernels of one instruction set as a table of functions, and the choice of a table at run time.
#pragma once

#include "views.h"

namespace louver {

struct KernelTable {
    const char* name;
    void (*encode_block)(const CacheView& keys, const CacheView* values, const SketchView& sketch,
                         const int32_t* kv_start, const int32_t* kv_len, int num_threads);
    void (*bounds)(const Problem&, const SketchView&, const Rule&, float* estimate, float* half_width,
                   uint8_t* undecided, float* known, int64_t sketched, int64_t longest, int num_threads);
    void (*step)(const Problem&, const SketchView&, const Rule&, const StepOutput&, int num_threads);
    void (*search)(const Problem&, const SketchView&, const float* tau, const FoundKeys&, int num_threads);
    void (*score)(const Problem&, const NamedKeys&, float* scores, int num_threads);
    void (*attend_selection)(const Problem&, const NamedKeys&, char* out, float* lse, int num_threads);
    void (*attend_dense)(const Problem&, char* out, float* lse, int num_threads);
    void (*attend_tiers)(const Problem&, const SketchView&, const BoundsView&, const CutsView&, bool drop,
                         const uint8_t* again, const StepOutput&, int num_threads);
    void (*count_tiers)(int64_t batch, int64_t num_kv_heads, int64_t group, int64_t frame_len, const BoundsView&,
                        const CutsView&, uint8_t* coded, int64_t* counts, int num_threads);
    void (*summarize)(const Problem&, const float* estimate, const float* half_width, const uint8_t* state,
                      int64_t state_heads, int64_t sketched, const float* known, int64_t longest, const SummaryView&,
                      int num_threads);
    void (*tighten)(const Problem&, const BoundsView&, const float* cut, bool retire, float* estimate,
                    float* half_width, uint8_t* state, float* known, int64_t longest, int num_threads);
    void (*attend_within)(const Problem&, const SketchView&, const Rule& first, const Asked&, const StepOutput&,
                          int num_threads);
    void (*attend_mass)(const Problem&, const SketchView&, const Rule& ends, const AskedMass&, const StepOutput&,
                        int num_threads);
    void (*groups_reach)(const GroupsView&, const float* slack, const float* tau, bool all, uint8_t* out,
                         int num_threads);
};

// Tables this machine can run, the best first; never empty.
const KernelTable* const* available_kernels(int* count);

}  // namespace louver
