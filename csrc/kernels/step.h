// The fused decode step: lays out memory, hands (row, KV head) units to threads, runs the retrieval or the precision
// step.
#pragma once

#include "kernels/precision.h"
#include "kernels/retrieval.h"

namespace louver::LOUVER_ISA {

// Planes of the query's rounding. docs/kernels.md: a second one tightens bounds by an eighth. A search has nothing else
// to do; a retrieval of so large a share saves as much by it as it costs, and reads less.
constexpr int kSearchPlanes = 2;
constexpr double kShareOfTwoPlanes = 0.02;
inline int planes_of(const Rule& rule, int64_t longest) {
    if (!rule.drop || rule.has_tau) return 1;
    return static_cast<double>(keys_needed(rule, longest)) >= kShareOfTwoPlanes * static_cast<double>(longest) ? 2 : 1;
}

constexpr float kRebaseNats = 20;  // by which the score that weights are relative to may be off, once chosen

// Hands out 64-byte aligned pieces; with a null base it only measures.
class Arena {
  public:
    explicit Arena(char* base) : base_(base) {}
    template <class T>
    T* take(int64_t count) {
        char* at = base_ + used_;
        used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return reinterpret_cast<T*>(at);
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

struct StepContext {
    const Problem* problem;
    const SketchView* sketch;
    const Rule* rule;
    const StepOutput* output;
    int64_t longest;
    char* memory;
    int64_t shared_bytes, private_bytes;  // per thread
    int planes;                           // of the query's rounding
};

// What the threads of a unit share.
inline int64_t lay_out_shared(Unit& unit, int64_t longest, int64_t group, int64_t padded, int size, char* memory) {
    Arena arena(memory);
    unit.stride = padded_dims(longest) + kLanes;
    unit.upper = arena.take<float>(group * unit.stride);
    unit.estimate = unit.rule->drop ? nullptr : arena.take<float>(group * unit.stride);
    unit.scores = arena.take<float>(group * unit.stride);
    unit.norms = arena.take<float>(unit.stride);
    unit.tokens = arena.take<int32_t>(unit.stride);
    unit.list_count = arena.take<int64_t>(size);
    unit.counts = arena.take<int64_t>(size * kNumCounts);
    unit.cut = arena.take<float>(group), unit.before = arena.take<float>(group), unit.tau = arena.take<float>(group),
    unit.top = arena.take<float>(group);
    unit.rescale = arena.take<double>(group);
    unit.logit_slack = arena.take<float>(group), unit.live_above = arena.take<float>(group);
    unit.away = arena.take<float>(group);
    unit.extremes = arena.take<Extremes>(size * group);
    unit.sums = arena.take<Sums>(size * group);
    unit.out = arena.take<float>(size * group * padded);
    return arena.used();
}

struct Private {
    float *weights, *value_norms, *group;
    char* scan;
    CoarseScratch coarse;
};

// What each thread has for itself.
inline int64_t lay_out_private(Unit& unit, Private& mine, const SketchView& sketch, int64_t longest, int64_t group,
                               int64_t padded, int planes, char* memory) {
    Arena arena(memory);
    mine.group = arena.take<float>(group_floats(group, padded));
    mine.weights = arena.take<float>(group * kValueTile);
    mine.value_norms = arena.take<float>(kValueTile);
    mine.scan = arena.take<char>(scan_bytes(sketch, group, planes));
    CoarseScratch& coarse = mine.coarse;
    coarse.stride = padded_dims(sketch.frame_len) + kLanes;
    for (FoundBlock& found : coarse.found) {
        found.sketched = arena.take<Ints>(coarse.stride / kLanes),
        found.unread = arena.take<Ints>(coarse.stride / kLanes);
        found.live = arena.take<uint32_t>(coarse.stride / kLanes);
        found.row = arena.take<int32_t>(coarse.stride);
    }
    coarse.weight = arena.take<float>(group * coarse.stride);
    coarse.rounded = arena.take<uint8_t>(group * coarse.stride);
    coarse.total = arena.take<int32_t>(group * sketch.dims + kLanes);
    unit.packed = arena.take<float>(padded_dims(longest) + kLanes);
    unit.buffer = arena.take<float>(kValueTile * padded);
    unit.lanes = arena.take<Floats>(3 * group);
    unit.mass = arena.take<double>(group);
    unit.value_center = arena.take<float>(padded), unit.value_scale = arena.take<float>(padded);
    unit.step_of = arena.take<float>(group), unit.whole_of = arena.take<double>(group);
    unit.unread_of = arena.take<float>(group);
    return arena.used();
}

// What the threads of a unit see of it.
inline Unit make_unit(const StepContext& context, int64_t index, bool shared, int rank, Team& team, Private& mine) {
    const Problem& problem = *context.problem;
    const SketchView& sketch = *context.sketch;
    const int64_t group = problem.group_size(), padded = padded_dims(sketch.dims);
    const int64_t per_thread = context.shared_bytes + context.private_bytes;
    Unit unit = {};
    unit.problem = &problem, unit.sketch = &sketch, unit.rule = context.rule, unit.output = context.output;
    unit.team = &team, unit.rank = shared ? rank : 0, unit.size = shared ? team.size() : 1;
    unit.row = index / problem.num_kv_heads, unit.head = index % problem.num_kv_heads;
    char* memory = context.memory + (shared ? 0 : rank) * per_thread;
    lay_out_shared(unit, context.longest, group, padded, unit.size, memory);
    lay_out_private(unit, mine, sketch, context.longest, group, padded, context.planes,
                    context.memory + rank * per_thread + context.shared_bytes);
    unit.length = problem.row_len(unit.row);
    unit.num_blocks = sketch.num_blocks[unit.row];
    unit.closed = unit.num_blocks * sketch.frame_len;
    unit.blocks = part_of(unit.num_blocks, 1, unit.rank, unit.size);
    unit.list_begin = unit.list_begin_of(unit.rank);
    unit.group = read_group(problem, unit.row, unit.head, mine.group);
    const int64_t start = problem.kv_start[unit.row];
    unit.keys = Rows{&problem.keys, unit.row, unit.head, start, problem.head_dim, padded};
    unit.values = Rows{&problem.values, unit.row, unit.head, start, problem.head_dim, padded};
    unit.scan = make_scan(sketch, unit.group, unit.row, unit.head, context.planes, mine.scan);
    const float* mean = sketch.value_mean + (unit.row * sketch.heads + unit.head) * sketch.dims;
    double squares = 0;
    for (int64_t d = 0; d < sketch.dims; ++d) squares += static_cast<double>(mean[d]) * static_cast<double>(mean[d]);
    unit.mean_norm = root_above(squares) + kTinyNorm;
    return unit;
}

inline void step_member(void* argument, int rank, Team& team) {
    const auto& context = *static_cast<StepContext*>(argument);
    const Problem& problem = *context.problem;
    for_units(problem.batch * problem.num_kv_heads, rank, team.size(), [&](int64_t index, bool shared) {
        if (shared) team.barrier();  // the first thread's memory is about to be everyone's
        Private mine = {};
        Unit unit = make_unit(context, index, shared, rank, team, mine);
        if (unit.rule->drop) {
            retrieval_unit(unit, mine.weights, mine.value_norms);
        } else {
            precision_unit(unit, mine.weights, mine.value_norms, mine.coarse);
        }
    });
}

// Memory for all threads, on the caller's scratch.
inline StepContext make_context(const Problem& problem, const SketchView& sketch, const Rule& rule,
                                const StepOutput& output, bool search, int num_threads) {
    StepContext context{&problem, &sketch, &rule, &output, 0, nullptr, 0, 0, 1};
    for (int64_t row = 0; row < problem.batch; ++row)
        context.longest = problem.row_len(row) > context.longest ? problem.row_len(row) : context.longest;
    context.planes = search ? kSearchPlanes : planes_of(rule, context.longest);
    Unit unit = {};
    Private mine = {};
    unit.rule = &rule;
    const int64_t group = problem.group_size(), padded = padded_dims(sketch.dims);
    context.shared_bytes = lay_out_shared(unit, context.longest, group, padded, num_threads, nullptr);
    context.private_bytes =
        lay_out_private(unit, mine, sketch, context.longest, group, padded, context.planes, nullptr);
    context.memory = scratch((context.shared_bytes + context.private_bytes) * num_threads);
    return context;
}

inline void step(const Problem& problem, const SketchView& sketch, const Rule& rule, const StepOutput& output,
                 int num_threads) {
    StepContext context = make_context(problem, sketch, rule, output, false, num_threads);
    parallel(num_threads, step_member, &context);
}

}  // namespace louver::LOUVER_ISA
