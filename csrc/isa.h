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
};

// Tables this machine can run, the best first; never empty.
const KernelTable* const* available_kernels(int* count);

}  // namespace louver
