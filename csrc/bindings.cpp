// Glue: arrays in, pointers out.
#include "bindings.h"

#include <algorithm>
#include <memory>

namespace louver {
namespace {

void encode_block(Sketch& sketch, const Array& keys, const MaybeArray& values, const Lengths& kv_start,
                  const Lengths& kv_len, const MaybeArray& block_table, int num_threads, const std::string& isa) {
    require(sketch.view.pages == nullptr, "blocks are encoded into a sketch whose rows have their own");
    require(static_cast<int64_t>(kv_start.shape(0)) == sketch.view.batch && kv_len.shape(0) == kv_start.shape(0) &&
                static_cast<int64_t>(keys.shape(1)) == sketch.view.heads &&
                static_cast<int64_t>(keys.shape(3)) == sketch.view.head_dim,
            "the sketch is of other rows than the keys");
    const CacheView k = view_of(keys, block_table);
    const CacheView v = values ? view_of(*values, block_table) : CacheView{};
    for (int64_t row = 0; row < sketch.view.batch && !block_table; ++row)
        require(kv_start.data()[row] >= 0 && kv_len.data()[row] <= static_cast<int64_t>(keys.shape(2)) &&
                    row < static_cast<int64_t>(keys.shape(0)),
                "kv_start and kv_len lie within the keys");
    for (int64_t row = 0; row < sketch.view.batch; ++row)
        require((kv_len.data()[row] - kv_start.data()[row]) / sketch.view.frame_len <= sketch.view.capacity,
                "the sketch has no room for these blocks; call Sketch.reserve first");
    const KernelTable& table = kernels(isa);
    nb::gil_scoped_release release;
    table.encode_block(k, values ? &v : nullptr, sketch.view, kv_start.data(), kv_len.data(), num_threads);
}

void bounds(const Sketch& sketch, const Array& q, const Array& keys, const Lengths& kv_start, const Lengths& kv_len,
            const MaybeArray& block_table, int64_t sinks, int64_t recent, const Array& estimate,
            const Array& half_width, const Array& undecided, const Array& known, int num_threads,
            const std::string& isa) {
    const Problem problem = problem_of(q, keys, std::nullopt, kv_start, kv_len, block_table, 1);
    require_of(sketch.view, problem);
    Rule rule;
    rule.sinks = sinks, rule.recent = recent;
    const KernelTable& table = kernels(isa);
    nb::gil_scoped_release release;
    table.bounds(problem, sketch.view, rule, data<float>(estimate), data<float>(half_width), data<uint8_t>(undecided),
                 data<float>(known), estimate.shape(2), known.shape(2), num_threads);
}

void step(const Sketch& sketch, const Array& q, const Array& keys, const Array& values, const Lengths& kv_start,
          const Lengths& kv_len, const MaybeArray& block_table, float softmax_scale, const nb::tuple& rule_values,
          const Array& out, const Array& evidence, const Array& counts, const MaybeArray& exact_mask, int num_threads,
          const std::string& isa) {
    const Problem problem = problem_of(q, keys, values, kv_start, kv_len, block_table, softmax_scale);
    require_of(sketch.view, problem);
    const Rule rule = rule_of(rule_values, sketch.view);
    const StepOutput output = output_of(problem, out, evidence, counts, exact_mask);
    const KernelTable& table = kernels(isa);
    nb::gil_scoped_release release;
    table.step(problem, sketch.view, rule, output, num_threads);
}

template <class T>
using Tensor1 = nb::ndarray<nb::pytorch, T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// An uninitialised tensor that owns its memory.
template <class T>
Tensor1<T> empty(int64_t n, T** data) {
    *data = new T[static_cast<size_t>(n > 0 ? n : 1)];
    return Tensor1<T>(*data, {static_cast<size_t>(n)},
                      nb::capsule(*data, [](void* p) noexcept { delete[] static_cast<T*>(p); }));
}

// tau: float32 [batch, num_q_heads]. Returns indptr, indices, scores; scanned int64 [batch, num_kv_heads] is filled.
nb::tuple search(const Sketch& sketch, const Array& q, const Array& keys, const Lengths& kv_start,
                 const Lengths& kv_len, const MaybeArray& block_table, const Array& tau, const Array& scanned,
                 int num_threads, const std::string& isa) {
    const Problem problem = problem_of(q, keys, std::nullopt, kv_start, kv_len, block_table, 1);
    require_of(sketch.view, problem);
    require(tau.dtype() == nb::dtype<float>() && contiguous(tau), "tau is a contiguous float32 [batch, num_q_heads]");
    const int64_t rows = problem.batch * problem.num_q_heads, units = problem.batch * problem.num_kv_heads;
    FoundKeys found;
    found.threads = num_threads;
    for (int64_t row = 0; row < problem.batch; ++row) found.capacity = std::max(found.capacity, problem.row_len(row));
    // Not initialised: only what is found is ever touched.
    const auto room = static_cast<size_t>(rows * found.capacity), parts = static_cast<size_t>(rows * num_threads);
    std::unique_ptr<int32_t[]> tokens(new int32_t[room]), order(new int32_t[room]);
    std::unique_ptr<float[]> scores(new float[room]);
    std::vector<int64_t> begins(parts), counts(parts), read(static_cast<size_t>(units * num_threads));
    found.tokens = tokens.get(), found.scores = scores.get(), found.order = order.get();
    found.begins = begins.data(), found.counts = counts.data(), found.scanned = read.data();
    const KernelTable& table = kernels(isa);
    {
        nb::gil_scoped_release release;
        table.search(problem, sketch.view, data<float>(tau), found, num_threads);
    }
    int64_t total = 0, *indptr_to, *indices_to;
    float* scores_to;
    for (int64_t n : counts) total += n;
    auto indptr = empty<int64_t>(rows + 1, &indptr_to), indices = empty<int64_t>(total, &indices_to);
    auto found_scores = empty<float>(total, &scores_to);
    int64_t at = 0;
    for (size_t part = 0; part < parts; ++part) {
        if (part % static_cast<size_t>(num_threads) == 0) indptr_to[part / static_cast<size_t>(num_threads)] = at;
        std::copy_n(found.tokens + begins[part], counts[part], indices_to + at);
        std::copy_n(found.scores + begins[part], counts[part], scores_to + at);
        at += counts[part];
    }
    indptr_to[rows] = at;
    for (int64_t unit = 0; unit < units; ++unit) {
        int64_t& to = data<int64_t>(scanned)[unit];
        to = 0;
        for (int t = 0; t < num_threads; ++t) to += read[static_cast<size_t>(unit * num_threads + t)];
    }
    return nb::make_tuple(indptr, indices, found_scores);
}

using Indices = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The keys a selection names, checked.
NamedKeys named_of(const Problem& problem, const Indices& indptr, const Indices& indices, int64_t num_tokens) {
    const auto rows = static_cast<size_t>(problem.batch * problem.num_q_heads);
    require(indptr.shape(0) == rows + 1 && indptr.data()[0] == 0,
            "indptr is [batch * num_q_heads + 1] and begins at 0");
    for (size_t row = 0; row < rows; ++row)
        require(indptr.data()[row] <= indptr.data()[row + 1], "indptr does not decrease");
    require(indptr.data()[rows] == static_cast<int64_t>(indices.shape(0)), "indptr ends at the number of indices");
    for (size_t i = 0; i < indices.shape(0); ++i)
        require(indices.data()[i] >= 0 && indices.data()[i] < num_tokens, "indices lie within the keys");
    return NamedKeys{indptr.data(), indices.data()};
}

void score(const Array& q, const Array& keys, const Indices& indptr, const Indices& indices, const Array& scores,
           int num_threads, const std::string& isa) {
    const Problem problem = problem_of(q, keys, std::nullopt, std::nullopt, 1);
    const NamedKeys named = named_of(problem, indptr, indices, static_cast<int64_t>(keys.shape(2)));
    const KernelTable& table = kernels(isa);
    nb::gil_scoped_release release;
    table.score(problem, named, data<float>(scores), num_threads);
}

void attend_selection(const Array& q, const Array& keys, const Array& values, const Indices& indptr,
                      const Indices& indices, float softmax_scale, const Array& out, const Array& lse, int num_threads,
                      const std::string& isa) {
    const Problem problem = problem_of(q, keys, values, std::nullopt, softmax_scale);
    const NamedKeys named = named_of(problem, indptr, indices, static_cast<int64_t>(keys.shape(2)));
    const KernelTable& table = kernels(isa);
    nb::gil_scoped_release release;
    table.attend_selection(problem, named, data<char>(out), data<float>(lse), num_threads);
}

void attend_dense(const Array& q, const Array& keys, const Array& values, const Lengths& kv_start,
                  const Lengths& kv_len, const MaybeArray& block_table, float softmax_scale, const Array& out,
                  const Array& lse, int num_threads, const std::string& isa) {
    const Problem problem = problem_of(q, keys, values, kv_start, kv_len, block_table, softmax_scale);
    const KernelTable& table = kernels(isa);
    nb::gil_scoped_release release;
    table.attend_dense(problem, data<char>(out), data<float>(lse), num_threads);
}

nb::list instruction_sets() {
    nb::list out;
    int count = 0;
    const KernelTable* const* tables = available_kernels(&count);
    for (int i = 0; i < count; ++i) out.append(tables[i]->name);
    return out;
}

}  // namespace
}  // namespace louver

NB_MODULE(_native, m) {
    using namespace louver;
    m.doc() = "Louver's CPU kernels. Use louver.kernels.cpu, which checks and allocates.";
    nb::class_<Sketch>(m, "Sketch")
        .def(nb::init<std::vector<MaybeArray>, int64_t, int64_t, int, bool>(), "arrays"_a.noconvert(), "frame_len"_a,
             "head_dim"_a, "metric"_a, "clip"_a);
    m.def("encode_block", &encode_block, "sketch"_a, "keys"_a.noconvert(), "values"_a.noconvert().none(),
          "kv_start"_a.noconvert(), "kv_len"_a.noconvert(), "block_table"_a.noconvert().none(), "num_threads"_a,
          "isa"_a);
    m.def("bounds", &bounds, "sketch"_a, "q"_a.noconvert(), "keys"_a.noconvert(), "kv_start"_a.noconvert(),
          "kv_len"_a.noconvert(), "block_table"_a.noconvert().none(), "sinks"_a, "recent"_a, "estimate"_a.noconvert(),
          "half_width"_a.noconvert(), "undecided"_a.noconvert(), "known"_a.noconvert(), "num_threads"_a, "isa"_a);
    m.def("step", &step, "sketch"_a, "q"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(),
          "kv_start"_a.noconvert(), "kv_len"_a.noconvert(), "block_table"_a.noconvert().none(), "softmax_scale"_a,
          "rule"_a, "out"_a.noconvert(), "evidence"_a.noconvert(), "counts"_a.noconvert(),
          "exact_mask"_a.noconvert().none(), "num_threads"_a, "isa"_a);
    m.def("search", &search, "sketch"_a, "q"_a.noconvert(), "keys"_a.noconvert(), "kv_start"_a.noconvert(),
          "kv_len"_a.noconvert(), "block_table"_a.noconvert().none(), "tau"_a.noconvert(), "scanned"_a.noconvert(),
          "num_threads"_a, "isa"_a);
    m.def("score", &score, "q"_a.noconvert(), "keys"_a.noconvert(), "indptr"_a.noconvert(), "indices"_a.noconvert(),
          "scores"_a.noconvert(), "num_threads"_a, "isa"_a);
    m.def("attend_selection", &attend_selection, "q"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(),
          "indptr"_a.noconvert(), "indices"_a.noconvert(), "softmax_scale"_a, "out"_a.noconvert(), "lse"_a.noconvert(),
          "num_threads"_a, "isa"_a);
    m.def("attend_dense", &attend_dense, "q"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(),
          "kv_start"_a.noconvert(), "kv_len"_a.noconvert(), "block_table"_a.noconvert().none(), "softmax_scale"_a,
          "out"_a.noconvert(), "lse"_a.noconvert(), "num_threads"_a, "isa"_a);
    m.def("is_finite", &is_finite, "x"_a.noconvert());
    bind_tiers(m);
    bind_prepared(m);
    m.def("instruction_sets", &instruction_sets,
          "Instruction sets of this build that this machine can run, the best first.");
    m.def("thread_source", &thread_source,
          "Where threads come from: \"openmp\" (the process's own runtime) or \"own\".");
}
