// The op `bounds`: every sketched key's estimate and half-width, which keys are undecided, and the floors of the
// others.
#pragma once

#include "kernels/exact.h"
#include "kernels/scan.h"
#include "kernels/schedule.h"

namespace louver::LOUVER_ISA {

struct BoundsOutput {
    float *estimate, *half_width;  // [batch, num_q_heads, sketched]
    uint8_t* undecided;            // [batch, num_kv_heads, sketched]
    float* known;                  // [batch, num_q_heads, longest]: score less rounding of decided keys, else unwritten
    int64_t sketched, longest;
};

struct BoundsContext {
    const Problem* problem;
    const SketchView* sketch;
    const Rule* rule;
    const BoundsOutput* to;
    char* memory;
    int64_t bytes_per_thread;
};

// Floats of a thread: its group, and room for scoring one key.
inline int64_t bounds_floats(int64_t group, int64_t padded) {
    return padded_dims(group_floats(group, padded) + 4 * padded + 6 * (group + 1));
}

inline int64_t bounds_bytes(const SketchView& sketch, int64_t group) {
    const int64_t floats = bounds_floats(group, padded_dims(sketch.dims));
    return (4 * floats + scan_bytes(sketch, group, 2) + 127) / 64 * 64;
}

// The floor of a decided key's score, for every head of the group.
inline void known_score(const BoundsContext& context, const Group& group, const Rows& keys, int64_t row, int64_t head,
                        int64_t index, float* work) {
    float norm;
    const auto one = static_cast<int32_t>(index);
    score_tokens<true>(keys, group, &one, 1, work, 1, &norm, work + group.size + 1, Ahead{});
    float* known = context.to->known + (row * context.problem->num_q_heads + head * group.size) * context.to->longest;
    for (int64_t g = 0; g < group.size; ++g)
        known[g * context.to->longest + index] =
            work[g] - (score_error(group.padded) * group.norm[g] * norm + kAbsolute);
}

inline void bound_block(const BoundsContext& context, Scan& scan, const Rows& keys, int64_t b, float* work) {
    const Problem& problem = *context.problem;
    const SketchView& sketch = *context.sketch;
    const BoundsOutput& to = *context.to;
    const int64_t base = b * sketch.frame_len, length = problem.row_len(scan.row);
    const int64_t first_head = scan.row * problem.num_q_heads + scan.head * scan.group.size;
    uint8_t* undecided = to.undecided + (scan.row * problem.num_kv_heads + scan.head) * to.sketched + base;
    scan_block(scan, sketch.block(scan.row, scan.head, b));
    for (int64_t g = 0; g < scan.group.size; ++g) {
        float* estimates = to.estimate + (first_head + g) * to.sketched + base;
        float* widths = to.half_width + (first_head + g) * to.sketched + base;
        head_bounds(scan, g, [&](int64_t token, Floats estimate, Floats width) {
            store_some(estimates + token, estimate, sketch.frame_len - token);
            store_some(widths + token, width, sketch.frame_len - token);
        });
    }
    for (int64_t i = 0; i < sketch.frame_len; ++i) {
        const int64_t index = base + i;
        const bool forced = index < context.rule->sinks || index >= length - context.rule->recent;
        undecided[i] = !forced && (scan.unbounded[i / kLanes] >> i % kLanes & 1) == 0;
        if (!undecided[i]) known_score(context, scan.group, keys, scan.row, scan.head, index, work);
    }
}

inline void bounds_member(void* argument, int rank, Team& team) {
    const auto& context = *static_cast<BoundsContext*>(argument);
    const Problem& problem = *context.problem;
    const SketchView& sketch = *context.sketch;
    const int64_t size = problem.group_size(), padded = padded_dims(sketch.dims);
    char* memory = context.memory + rank * context.bytes_per_thread;
    float* group_memory = reinterpret_cast<float*>(memory);
    float* work = group_memory + group_floats(size, padded);
    char* scan_memory = memory + 4 * bounds_floats(size, padded);
    for_units(problem.batch * problem.num_kv_heads, rank, team.size(), [&](int64_t unit, bool shared) {
        const int64_t row = unit / problem.num_kv_heads, head = unit % problem.num_kv_heads;
        const Group group = read_group(problem, row, head, group_memory);
        const Rows keys{&problem.keys, row, head, problem.kv_start[row], problem.head_dim, padded};
        Scan scan = make_scan(sketch, group, row, head, 2, scan_memory);
        const Part part = part_of(sketch.num_blocks[row], 1, shared ? rank : 0, shared ? team.size() : 1);
        for (int64_t b = part.begin; b < part.end; ++b) bound_block(context, scan, keys, b, work);
        if (shared && rank != 0) return;
        for (int64_t i = sketch.num_blocks[row] * sketch.frame_len; i < problem.row_len(row); ++i)
            known_score(context, group, keys, row, head, i, work);
    });
}

inline void bounds(const Problem& problem, const SketchView& sketch, const Rule& rule, const BoundsOutput& to,
                   int num_threads) {
    BoundsContext context{&problem, &sketch, &rule, &to, nullptr, bounds_bytes(sketch, problem.group_size()) + 128};
    context.memory = scratch(context.bytes_per_thread * num_threads);
    parallel(num_threads, bounds_member, &context);
}

}  // namespace louver::LOUVER_ISA
