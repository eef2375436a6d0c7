// The ops between bounds and a step, which policies without a rule go through; and groups of keys in subspaces.
#include "bindings.h"

namespace louver {
namespace {

template <class T>
const T* optional_data(const MaybeArray& array) {
    return array ? data<const T>(*array) : nullptr;
}

// estimate and half_width float32 [batch, num_q_heads, sketched], undecided bool [batch, num_kv_heads, sketched].
BoundsView bounds_of(const Array& estimate, const Array& half_width, const Array& undecided) {
    for (const Array* x : {&estimate, &half_width, &undecided})
        require(x->ndim() == 3 && contiguous(*x) && x->shape(2) == estimate.shape(2),
                "bounds are contiguous [batch, heads, sketched]");
    require(estimate.dtype() == nb::dtype<float>() && half_width.dtype() == nb::dtype<float>(), "bounds are float32");
    return BoundsView{data<const float>(estimate), data<const float>(half_width), data<const uint8_t>(undecided),
                      static_cast<int64_t>(estimate.shape(2))};
}

// Rows and heads without keys.
Problem rows_of(const Lengths& kv_start, const Lengths& kv_len, int64_t num_q_heads, int64_t num_kv_heads,
                float softmax_scale) {
    Problem problem;
    problem.batch = static_cast<int64_t>(kv_start.shape(0));
    problem.kv_start = kv_start.data(), problem.kv_len = kv_len.data();
    problem.num_q_heads = num_q_heads, problem.num_kv_heads = num_kv_heads, problem.softmax_scale = softmax_scale;
    return problem;
}

// cuts: unread, fine, exact float32 and rank int64 or None. again: bool [batch, num_kv_heads] or None.
void attend_tiers(const Sketch& sketch, const Array& q, const Array& keys, const Array& values, const Lengths& kv_start,
                  const Lengths& kv_len, const MaybeArray& block_table, float softmax_scale, const Array& estimate,
                  const Array& half_width, const Array& undecided, const Array& unread, const Array& fine,
                  const Array& exact, const MaybeArray& rank, bool drop, const MaybeArray& again, const Array& out,
                  const Array& evidence, const Array& counts, const MaybeArray& exact_mask, int num_threads,
                  const std::string& isa) {
    const Problem problem = problem_of(q, keys, values, kv_start, kv_len, block_table, softmax_scale);
    require_of(sketch.view, problem);
    require(drop || sketch.view.coded_values, "a step that drops nothing needs sketched values");
    const BoundsView bounds = bounds_of(estimate, half_width, undecided);
    for (int64_t row = 0; row < problem.batch; ++row)
        require(sketch.view.num_blocks[row] * sketch.view.frame_len <= bounds.sketched, "bounds cover every block");
    const CutsView cuts{data<const float>(unread), data<const float>(fine), data<const float>(exact),
                        optional_data<int64_t>(rank)};
    const StepOutput output = output_of(problem, out, evidence, counts, exact_mask);
    const uint8_t* wanted = optional_data<uint8_t>(again);
    const KernelTable& table = kernels(isa);
    nb::gil_scoped_release release;
    table.attend_tiers(problem, sketch.view, bounds, cuts, drop, wanted, output, num_threads);
}

// counts: int64 [batch, num_kv_heads, 4], undecided, exact, coarse keys and blocks with a coarse one.
void count_tiers(const Array& estimate, const Array& half_width, const Array& undecided, const Array& unread,
                 const Array& exact, int64_t frame_len, const MaybeArray& coded, const Array& counts, int num_threads,
                 const std::string& isa) {
    const BoundsView bounds = bounds_of(estimate, half_width, undecided);
    require(bounds.sketched % frame_len == 0, "bounds come in whole blocks");
    const auto batch = static_cast<int64_t>(undecided.shape(0)), heads = static_cast<int64_t>(undecided.shape(1));
    const CutsView cuts{data<const float>(unread), nullptr, data<const float>(exact), nullptr};
    uint8_t* marks = coded ? data<uint8_t>(*coded) : nullptr;
    const KernelTable& table = kernels(isa);
    const int64_t group = static_cast<int64_t>(estimate.shape(1)) / heads;
    nb::gil_scoped_release release;
    table.count_tiers(batch, heads, group, frame_len, bounds, cuts, marks, data<int64_t>(counts), num_threads);
}

// edges, upper_count, lower_count, upper_mass, lower_mass, decided_mass, best_lower, shift, retired_mass or None.
SummaryView summary_of(const std::vector<MaybeArray>& summary) {
    require(summary.size() == 9 && summary[0]->shape(2) == static_cast<size_t>(kBins) + 1,
            "a summary has nine tensors");
    for (const MaybeArray& x : summary) require(!x || contiguous(*x), "a summary's tensors are contiguous");
    SummaryView to;
    to.edges = data<float>(*summary[0]);
    to.upper_count = data<int32_t>(*summary[1]), to.lower_count = data<int32_t>(*summary[2]);
    to.upper_mass = data<float>(*summary[3]), to.lower_mass = data<float>(*summary[4]);
    to.decided_mass = data<float>(*summary[5]), to.best_lower = data<float>(*summary[6]);
    to.shift = data<float>(*summary[7]);
    if (summary[8]) to.retired_mass = data<float>(*summary[8]);
    return to;
}

// state: uint8 kDecided, kUndecided, kRetired [batch, state_heads, sketched].
void summarize(const Lengths& kv_start, const Lengths& kv_len, float softmax_scale, const Array& estimate,
               const Array& half_width, const Array& state, const Array& known, const std::vector<MaybeArray>& summary,
               int num_threads, const std::string& isa) {
    const BoundsView bounds = bounds_of(estimate, half_width, state);
    const auto heads = static_cast<int64_t>(estimate.shape(1)), state_heads = static_cast<int64_t>(state.shape(1));
    const Problem problem = rows_of(kv_start, kv_len, heads, state_heads, softmax_scale);
    const auto longest = static_cast<int64_t>(known.shape(2));
    const SummaryView to = summary_of(summary);
    const KernelTable& table = kernels(isa);
    nb::gil_scoped_release release;
    table.summarize(problem, bounds.estimate, bounds.half_width, bounds.undecided, state_heads, bounds.sketched,
                    data<const float>(known), longest, to, num_threads);
}

void tighten(const Array& q, const Array& keys, const Lengths& kv_start, const Lengths& kv_len,
             const MaybeArray& block_table, const Array& estimate, const Array& half_width, const Array& undecided,
             const Array& cut, bool retire, const Array& new_estimate, const Array& new_half_width, const Array& state,
             const Array& known, int num_threads, const std::string& isa) {
    const Problem problem = problem_of(q, keys, std::nullopt, kv_start, kv_len, block_table, 1);
    const BoundsView bounds = bounds_of(estimate, half_width, undecided);
    const KernelTable& table = kernels(isa);
    nb::gil_scoped_release release;
    table.tighten(problem, bounds, data<const float>(cut), retire, data<float>(new_estimate),
                  data<float>(new_half_width), data<uint8_t>(state), data<float>(known),
                  static_cast<int64_t>(known.shape(2)), num_threads);
}

// bytes: int64 [kNumCounts]; more_bytes: int64 [batch, num_kv_heads].
void attend_within(const Sketch& sketch, const Array& q, const Array& keys, const Array& values,
                   const Lengths& kv_start, const Lengths& kv_len, const MaybeArray& block_table, float softmax_scale,
                   double first_share, float error, int64_t sinks, int64_t recent, const std::vector<int64_t>& bytes,
                   const Array& out, const Array& evidence, const Array& counts, const MaybeArray& exact_mask,
                   const Array& more_bytes, int num_threads, const std::string& isa) {
    const Problem problem = problem_of(q, keys, values, kv_start, kv_len, block_table, softmax_scale);
    require_of(sketch.view, problem);
    require(sketch.view.coded_values, "a step that drops nothing needs sketched values");
    require(bytes.size() == kNumCounts, "bytes are of each count");
    Rule first;
    first.share = first_share, first.sinks = sinks, first.recent = recent;
    const Asked asked{error, bytes.data(), data<int64_t>(more_bytes)};
    const StepOutput output = output_of(problem, out, evidence, counts, exact_mask);
    const KernelTable& table = kernels(isa);
    nb::gil_scoped_release release;
    table.attend_within(problem, sketch.view, first, asked, output, num_threads);
}

// asked_values: (share of the mass, sinks, recent, keep_best); bytes: int64 [kNumCounts].
void attend_mass(const Sketch& sketch, const Array& q, const Array& keys, const Array& values, const Lengths& kv_start,
                 const Lengths& kv_len, const MaybeArray& block_table, float softmax_scale,
                 const nb::tuple& asked_values, const std::vector<int64_t>& bytes, const Array& out,
                 const Array& evidence, const Array& counts, const MaybeArray& exact_mask, int num_threads,
                 const std::string& isa) {
    const Problem problem = problem_of(q, keys, values, kv_start, kv_len, block_table, softmax_scale);
    require_of(sketch.view, problem);
    require(bytes.size() == kNumCounts, "bytes are of each count");
    Rule rule;
    rule.sinks = nb::cast<int64_t>(asked_values[1]), rule.recent = nb::cast<int64_t>(asked_values[2]);
    rule.keep_best = nb::cast<bool>(asked_values[3]);
    const AskedMass asked{nb::cast<double>(asked_values[0]), bytes.data()};
    const StepOutput output = output_of(problem, out, evidence, counts, exact_mask);
    const KernelTable& table = kernels(isa);
    nb::gil_scoped_release release;
    table.attend_mass(problem, sketch.view, rule, asked, output, num_threads);
}

// group int16 or int32 [heads, subspaces, keys], upper float32 [heads, subspaces, rows, groups], out bool [heads, rows,
// keys]. all: slack [heads, subspaces, rows] and tau [heads, rows, subspaces]; else [heads, rows] both.
void groups_reach(const Array& group, const Array& upper, const Array& slack, const Array& tau, bool all,
                  const Array& out, int num_threads, const std::string& isa) {
    for (const Array* x : {&group, &upper, &slack, &tau, &out}) require(contiguous(*x), "groups are contiguous");
    require(group.ndim() == 3 && upper.ndim() == 4 && group.shape(1) == upper.shape(1), "groups of keys, and bounds");
    GroupsView view;
    view.heads = group.shape(0), view.subspaces = group.shape(1), view.keys = group.shape(2);
    view.rows = upper.shape(2), view.count = upper.shape(3);
    view.group = group.data(), view.wide = group.dtype() == nb::dtype<int32_t>();
    require(view.wide || group.dtype() == nb::dtype<int16_t>(), "groups are numbered in int16 or int32");
    view.upper = data<const float>(upper);
    const KernelTable& table = kernels(isa);
    nb::gil_scoped_release release;
    table.groups_reach(view, data<const float>(slack), data<const float>(tau), all, data<uint8_t>(out), num_threads);
}

}  // namespace

void bind_tiers(nb::module_& m) {
    m.def("attend_tiers", &attend_tiers, "sketch"_a, "q"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(),
          "kv_start"_a.noconvert(), "kv_len"_a.noconvert(), "block_table"_a.noconvert().none(), "softmax_scale"_a,
          "estimate"_a.noconvert(), "half_width"_a.noconvert(), "undecided"_a.noconvert(), "unread"_a.noconvert(),
          "fine"_a.noconvert(), "exact"_a.noconvert(), "rank"_a.noconvert().none(), "drop"_a,
          "again"_a.noconvert().none(), "out"_a.noconvert(), "evidence"_a.noconvert(), "counts"_a.noconvert(),
          "exact_mask"_a.noconvert().none(), "num_threads"_a, "isa"_a);
    m.def("count_tiers", &count_tiers, "estimate"_a.noconvert(), "half_width"_a.noconvert(), "undecided"_a.noconvert(),
          "unread"_a.noconvert(), "exact"_a.noconvert(), "frame_len"_a, "coded"_a.noconvert().none(),
          "counts"_a.noconvert(), "num_threads"_a, "isa"_a);
    m.def("summarize", &summarize, "kv_start"_a.noconvert(), "kv_len"_a.noconvert(), "softmax_scale"_a,
          "estimate"_a.noconvert(), "half_width"_a.noconvert(), "state"_a.noconvert(), "known"_a.noconvert(),
          "summary"_a.noconvert(), "num_threads"_a, "isa"_a);
    m.def("tighten", &tighten, "q"_a.noconvert(), "keys"_a.noconvert(), "kv_start"_a.noconvert(),
          "kv_len"_a.noconvert(), "block_table"_a.noconvert().none(), "estimate"_a.noconvert(),
          "half_width"_a.noconvert(), "undecided"_a.noconvert(), "cut"_a.noconvert(), "retire"_a,
          "new_estimate"_a.noconvert(), "new_half_width"_a.noconvert(), "state"_a.noconvert(), "known"_a.noconvert(),
          "num_threads"_a, "isa"_a);
    m.def("attend_within", &attend_within, "sketch"_a, "q"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(),
          "kv_start"_a.noconvert(), "kv_len"_a.noconvert(), "block_table"_a.noconvert().none(), "softmax_scale"_a,
          "first_share"_a, "error"_a, "sinks"_a, "recent"_a, "bytes"_a, "out"_a.noconvert(), "evidence"_a.noconvert(),
          "counts"_a.noconvert(), "exact_mask"_a.noconvert().none(), "more_bytes"_a.noconvert(), "num_threads"_a,
          "isa"_a);
    m.def("attend_mass", &attend_mass, "sketch"_a, "q"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(),
          "kv_start"_a.noconvert(), "kv_len"_a.noconvert(), "block_table"_a.noconvert().none(), "softmax_scale"_a,
          "asked"_a, "bytes"_a, "out"_a.noconvert(), "evidence"_a.noconvert(), "counts"_a.noconvert(),
          "exact_mask"_a.noconvert().none(), "num_threads"_a, "isa"_a);
    m.def("groups_reach", &groups_reach, "group"_a.noconvert(), "upper"_a.noconvert(), "slack"_a.noconvert(),
          "tau"_a.noconvert(), "all"_a, "out"_a.noconvert(), "num_threads"_a, "isa"_a);
}

}  // namespace louver
