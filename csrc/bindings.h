// What the bindings share: arrays checked and turned into views. Every array argument is .noconvert(): a silent copy
// would be filled and thrown away.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace louver {

using Array = nb::ndarray<nb::device::cpu>;
using MaybeArray = std::optional<Array>;
using Lengths = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
T* data(const Array& array) {
    return reinterpret_cast<T*>(array.data());
}

inline void require(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

inline std::optional<DType> known_dtype(const Array& array) {
    const auto type = array.dtype();
    if (type == nb::dtype<float>()) return DType::float32;
    if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && type.bits == 16) return DType::float16;
    if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16) return DType::bfloat16;
    return std::nullopt;
}

inline DType dtype_of(const Array& array) {
    const std::optional<DType> found = known_dtype(array);
    require(found.has_value(), "wanted float32, float16 or bfloat16");
    return *found;
}

inline bool contiguous(const Array& array) {
    if (array.size() == 0) return true;
    int64_t expected = 1;
    for (size_t i = array.ndim(); i-- > 0;) {
        if (array.shape(i) != 1 && array.stride(i) != expected) return false;
        expected *= static_cast<int64_t>(array.shape(i));
    }
    return true;
}

// Whether no element has the exponent of infinity and NaN.
template <class Bits>
bool none_has(const Array& x, Bits exponent) {
    const Bits* bits = data<const Bits>(x);
    const size_t n = x.size();
    Bits special = 0;  // as wide as what it looks at, so that the loop is one of vectors
    for (size_t i = 0; i < n; ++i) special |= static_cast<Bits>((bits[i] & exponent) == exponent);
    return special == 0;
}

inline bool is_finite(const Array& x) {
    require(contiguous(x), "wanted a contiguous array");
    switch (dtype_of(x)) {
        case DType::float32: return none_has<uint32_t>(x, 0x7f800000u);
        case DType::float16: return none_has<uint16_t>(x, 0x7c00u);
        default: return none_has<uint16_t>(x, 0x7f80u);
    }
}

inline CacheView view_of(const Array& array, const MaybeArray& block_table) {
    require(array.ndim() == 4,
            "keys and values are [batch, heads, len, head_dim] or [pages, heads, page_len, head_dim]");
    CacheView view;
    view.data = data<const char>(array);
    view.dtype = dtype_of(array);
    view.item_bytes = view.dtype == DType::float32 ? 4 : 2;
    view.stride_batch = array.stride(0), view.stride_head = array.stride(1);
    view.stride_token = array.stride(2), view.stride_dim = array.stride(3);
    if (block_table) {
        require(block_table->ndim() == 2 && block_table->dtype() == nb::dtype<int32_t>() && contiguous(*block_table),
                "block_table is a contiguous int32 [batch, pages]");
        view.block_table = data<const int32_t>(*block_table);
        view.table_width = static_cast<int64_t>(block_table->shape(1));
        view.page_len = static_cast<int64_t>(array.shape(2));
    }
    return view;
}

// A sketch's tensors, held alive, and the view of them the kernels take.
class Sketch {
  public:
    Sketch(std::vector<MaybeArray> arrays, int64_t frame_len, int64_t head_dim, int metric, bool clip)
        : arrays_(std::move(arrays)) {
        require(arrays_.size() == 15, "a sketch has 15 tensors");
        for (size_t i = 0; i < arrays_.size(); ++i) {
            require(arrays_[i].has_value() || i > 9, "only the coded values and the pages of a sketch may be missing");
            require(!arrays_[i] || contiguous(*arrays_[i]), "a sketch's tensors are contiguous");
        }
        const Array& codes = *arrays_[2];
        require(codes.ndim() == 5 && arrays_[7]->ndim() == 4, "a sketch's tensors are laid out as in sketch/layout.py");
        view.batch = static_cast<int64_t>(arrays_[0]->shape(0));
        view.heads = codes.shape(1), view.capacity = codes.shape(2);
        if (arrays_[14]) view.pages = at<int32_t>(14), view.table_width = arrays_[14]->shape(1);
        view.frame_len = frame_len, view.head_dim = head_dim, view.dims = 2 * static_cast<int64_t>(codes.shape(4));
        view.slices = arrays_[7]->shape(3);
        require(view.dims <= 1024, "head_dim above 1024 is not supported by the cpu backend");
        view.metric = static_cast<Metric>(metric), view.clip = clip;
        view.coded_values = arrays_[10].has_value();
        view.num_blocks = at<int32_t>(0), view.query_weight = at<float>(1);
        view.key_codes = at<uint8_t>(2), view.key_frame = at<int16_t>(3), view.key_scale = at<uint8_t>(4);
        view.key_radius = at<uint8_t>(5), view.radius_least = at<float>(6), view.radius_unit = at<float>(7);
        view.value_mean = at<float>(8), view.value_spread = at<float>(9);
        view.value_codes = at<uint8_t>(10), view.value_frame = at<int16_t>(11);
        view.value_scale = at<uint8_t>(12), view.value_error = at<float>(13);
    }
    SketchView view;

  private:
    template <class T>
    T* at(size_t i) const {
        return arrays_[i] ? data<T>(*arrays_[i]) : nullptr;
    }
    std::vector<MaybeArray> arrays_;
};

inline const KernelTable& kernels(const std::string& isa) {
    int count = 0;
    const KernelTable* const* tables = available_kernels(&count);
    if (isa.empty()) return *tables[0];
    for (int i = 0; i < count; ++i)
        if (isa == tables[i]->name) return *tables[i];
    throw nb::value_error(("this machine cannot run the instruction set " + isa).c_str());
}

// A problem whose rows have no lengths yet.
inline Problem problem_of(const Array& q, const Array& keys, const MaybeArray& values, const MaybeArray& block_table,
                          float softmax_scale) {
    Problem problem;
    require(q.ndim() == 3 && contiguous(q), "q is a contiguous [batch, num_q_heads, head_dim]");
    problem.q = data<const char>(q), problem.q_dtype = dtype_of(q);
    problem.batch = q.shape(0), problem.num_q_heads = q.shape(1), problem.head_dim = q.shape(2);
    problem.keys = view_of(keys, block_table);
    if (values) problem.values = view_of(*values, block_table);
    problem.num_kv_heads = keys.shape(1);
    require(problem.num_q_heads > 0 && problem.num_kv_heads > 0 && problem.head_dim > 0, "a problem without heads");
    require(problem.num_q_heads % problem.num_kv_heads == 0, "num_q_heads is a multiple of num_kv_heads");
    require(problem.group_size() <= 96, "at most 96 query heads per KV head are supported by the cpu backend");
    require(static_cast<int64_t>(keys.shape(3)) == problem.head_dim, "q and keys have the same head_dim");
    problem.softmax_scale = softmax_scale;
    return problem;
}

inline Problem problem_of(const Array& q, const Array& keys, const MaybeArray& values, const Lengths& kv_start,
                          const Lengths& kv_len, const MaybeArray& block_table, float softmax_scale) {
    Problem problem = problem_of(q, keys, values, block_table, softmax_scale);
    require(static_cast<int64_t>(kv_start.shape(0)) == problem.batch && kv_len.shape(0) == kv_start.shape(0),
            "kv_start and kv_len are [batch]");
    problem.kv_start = kv_start.data(), problem.kv_len = kv_len.data();
    if (!block_table)
        for (int64_t row = 0; row < problem.batch; ++row)
            require(problem.kv_start[row] >= 0 && problem.kv_len[row] <= static_cast<int64_t>(keys.shape(2)),
                    "kv_start and kv_len lie within the keys");
    return problem;
}

// Raise unless a sketch is one of these rows: its blocks must not reach past the tokens they hold.
inline void require_of(const SketchView& sketch, const Problem& problem) {
    require(
        sketch.batch == problem.batch && sketch.heads == problem.num_kv_heads && sketch.head_dim == problem.head_dim,
        "the sketch is of other rows than the keys; refresh the index");
    const int64_t room = sketch.capacity * (sketch.pages == nullptr ? 1 : sketch.table_width);
    for (int64_t row = 0; row < problem.batch; ++row)
        require(sketch.num_blocks[row] >= 0 && sketch.num_blocks[row] <= room &&
                    sketch.num_blocks[row] * sketch.frame_len <= problem.row_len(row),
                "the sketch describes more tokens than a row holds; refresh the index");
}

// rule: (drop, share, count, tau or None, unread_mass, sinks, recent, keep_best).
inline Rule rule_of(const nb::tuple& values, const SketchView& sketch) {
    Rule rule;
    rule.drop = nb::cast<bool>(values[0]), rule.share = nb::cast<double>(values[1]);
    rule.count = nb::cast<int64_t>(values[2]), rule.has_tau = !values[3].is_none();
    if (rule.has_tau) rule.tau = nb::cast<float>(values[3]);
    rule.unread_mass = nb::cast<float>(values[4]), rule.sinks = nb::cast<int64_t>(values[5]);
    rule.recent = nb::cast<int64_t>(values[6]), rule.keep_best = nb::cast<bool>(values[7]);
    require(rule.drop || sketch.coded_values, "a rule that drops nothing needs sketched values");
    return rule;
}

// evidence: float32 [5, batch, num_q_heads], lse, certificate, arithmetic bound, dropped mass bound, tau.
inline StepOutput output_at(const Problem& problem, char* out, float* evidence, int64_t* counts) {
    const int64_t each = problem.batch * problem.num_q_heads;
    StepOutput output;
    output.out = out, output.counts = counts;
    output.lse = evidence, output.certificate = evidence + each, output.arithmetic = evidence + 2 * each;
    output.dropped = evidence + 3 * each, output.tau = evidence + 4 * each;
    return output;
}

inline StepOutput output_of(const Problem& problem, const Array& out, const Array& evidence, const Array& counts,
                            const MaybeArray& exact_mask) {
    StepOutput output = output_at(problem, data<char>(out), data<float>(evidence), data<int64_t>(counts));
    if (exact_mask) output.exact_mask = data<uint8_t>(*exact_mask), output.mask_len = exact_mask->shape(2);
    return output;
}

// The ops between bounds and a step, which policies without a rule go through (bindings_tiers.cpp).
void bind_tiers(nb::module_& m);
// Steps that are settled but for the query (bindings_prepared.cpp).
void bind_prepared(nb::module_& m);

}  // namespace louver
