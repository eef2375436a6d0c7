// A step whose arguments are settled but for the query: one call, given back as two views of one piece of memory.
#include <memory>
#include <new>

#include "bindings.h"

namespace louver {
namespace {

// As DLPack, in the version that torch and nanobind exchange, lays it out.
struct ManagedTensor {
    nb::dlpack::dltensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);
};

using Memory = std::shared_ptr<char>;

Memory allocate(int64_t bytes) {
    return Memory(static_cast<char*>(::operator new[](static_cast<size_t>(bytes), std::align_val_t{64})),
                  [](char* p) { ::operator delete[](p, std::align_val_t{64}); });
}

// A tensor over some of the memory, which lives as long as the last of them.
struct Export {
    ManagedTensor managed;
    Memory memory;
    int64_t shape[3], strides[3];
};

nb::object capsule_of(const Memory& memory, int64_t offset, nb::dlpack::dtype dtype, int ndim, const int64_t* shape) {
    auto* made = new Export{{}, memory, {}, {}};
    int64_t stride = 1;
    for (int i = ndim; i-- > 0;) made->shape[i] = shape[i], made->strides[i] = stride, stride *= shape[i];
    nb::dlpack::dltensor& tensor = made->managed.tensor;
    tensor.data = memory.get() + offset, tensor.device = {nb::device::cpu::value, 0};
    tensor.ndim = ndim, tensor.dtype = dtype, tensor.shape = made->shape, tensor.strides = made->strides;
    made->managed.context = made;
    made->managed.deleter = [](ManagedTensor* it) { delete static_cast<Export*>(it->context); };
    PyObject* capsule = PyCapsule_New(&made->managed, "dltensor", [](PyObject* it) {
        if (!PyCapsule_IsValid(it, "dltensor")) return;  // a tensor took it
        auto* managed = static_cast<ManagedTensor*>(PyCapsule_GetPointer(it, "dltensor"));
        managed->deleter(managed);
    });
    if (capsule == nullptr) {
        delete made;
        throw nb::python_error();
    }
    return nb::steal(capsule);
}

// A step's counts int64, evidence float32 [5, batch, num_q_heads] and output, one behind the other.
struct Piece {
    Memory memory;
    int64_t bytes;
    nb::dlpack::dtype dtype;  // the output's
    nb::object tensor() const {
        const int64_t length = bytes / (dtype.bits / 8);
        return capsule_of(memory, 0, dtype, 1, &length);
    }
};

class PreparedStep {
  public:
    // sketch is held; keys and values are the whole buffers. most: tokens of a row up to which a step is dense instead.
    PreparedStep(nb::object sketch, const Array& q, const Array& keys, const Array& values, const Lengths& kv_start,
                 float softmax_scale, const nb::tuple& rule, double most, const std::string& isa)
        : held_(std::move(sketch)),
          sketch_(&nb::cast<const Sketch&>(held_).view),
          problem_(problem_of(q, keys, values, std::nullopt, softmax_scale)),
          rule_(rule_of(rule, *sketch_)),
          table_(&kernels(isa)),
          most_(most),
          capacity_(static_cast<int64_t>(keys.shape(2))),
          starts_(kv_start.data(), kv_start.data() + kv_start.shape(0)) {
        require(static_cast<int64_t>(starts_.size()) == problem_.batch, "kv_start is [batch]");
        require(sketch_->batch == problem_.batch && sketch_->pages == nullptr,
                "a sketch whose rows have their own blocks");
        problem_.q = nullptr;
    }

    // The output's DLPack capsule and the piece; None where this is not the step that was prepared, q is not finite, or
    // a block is still to be encoded: nothing was computed then.
    nb::object operator()(const Array& q, int64_t tokens, uintptr_t keys, uintptr_t values, uintptr_t kv_start,
                          uintptr_t kv_len, int num_threads) const {
        Problem problem = problem_;
        problem.q = data<const char>(q);
        const auto* end = reinterpret_cast<const int32_t*>(kv_len);
        const std::vector<int32_t> ends(end, end + problem.batch);  // as they are now: without the GIL they may change
        problem.kv_start = reinterpret_cast<const int32_t*>(kv_start);
        problem.kv_len = ends.data();
        const bool same_memory = reinterpret_cast<uintptr_t>(problem.keys.data) == keys &&
                                 reinterpret_cast<uintptr_t>(problem.values.data) == values && tokens <= capacity_;
        if (!same_memory || !asks(q) || !stands(problem, tokens) || !is_finite(q)) return nb::none();
        problem.kv_start = starts_.data();
        const int64_t each = problem.batch * problem.num_q_heads;
        const int64_t counted = problem.batch * problem.num_kv_heads * kNumCounts * 8, evidence = 5 * each * 4;
        const int64_t out = each * problem.head_dim * (problem.q_dtype == DType::float32 ? 4 : 2);
        Piece piece{nullptr, (counted + evidence + out + 7) / 8 * 8, q.dtype()};
        piece.memory = allocate(piece.bytes);
        char* at = piece.memory.get();
        const StepOutput output = output_at(problem, at + counted + evidence, reinterpret_cast<float*>(at + counted),
                                            reinterpret_cast<int64_t*>(at));
        {
            nb::gil_scoped_release release;
            table_->step(problem, *sketch_, rule_, output, num_threads);
        }
        const int64_t shape[3] = {problem.batch, problem.num_q_heads, problem.head_dim};
        nb::object made = capsule_of(piece.memory, counted + evidence, q.dtype(), 3, shape);
        return nb::make_tuple(std::move(made), std::move(piece));
    }

  private:
    bool asks(const Array& q) const {
        const auto is = [&](size_t axis, int64_t n) { return static_cast<int64_t>(q.shape(axis)) == n; };
        return q.ndim() == 3 && is(0, problem_.batch) && is(1, problem_.num_q_heads) && is(2, problem_.head_dim) &&
               known_dtype(q) == problem_.q_dtype && contiguous(q);
    }

    // Whether rows begin where they did, every full block is encoded, and the rows are not short.
    bool stands(const Problem& problem, int64_t tokens) const {
        if (static_cast<double>(tokens) <= most_) return false;
        int64_t total = 0;
        for (int64_t row = 0; row < problem.batch; ++row) {
            const int64_t start = problem.kv_start[row], end = problem.kv_len[row];
            if (start != starts_[static_cast<size_t>(row)] || start < 0 || end > tokens) return false;
            if ((end - start) / sketch_->frame_len != sketch_->num_blocks[row]) return false;
            total += end - start;
        }
        return problem.batch == 1 || static_cast<double>(total) > most_ * static_cast<double>(problem.batch);
    }

    nb::object held_;
    const SketchView* sketch_;
    Problem problem_;
    Rule rule_;
    const KernelTable* table_;
    double most_;
    int64_t capacity_;
    std::vector<int32_t> starts_;
};

}  // namespace

void bind_prepared(nb::module_& m) {
    nb::class_<Piece>(m, "Piece")
        .def("__dlpack__", [](const Piece& piece, const nb::kwargs&) { return piece.tensor(); })
        .def("__dlpack_device__", [](const Piece&) { return nb::make_tuple(nb::device::cpu::value, 0); });
    nb::class_<PreparedStep>(m, "PreparedStep")
        .def(nb::init<nb::object, const Array&, const Array&, const Array&, const Lengths&, float, const nb::tuple&,
                      double, const std::string&>(),
             "sketch"_a, "q"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(), "kv_start"_a.noconvert(),
             "softmax_scale"_a, "rule"_a, "most"_a, "isa"_a)
        .def("__call__", &PreparedStep::operator(), "q"_a.noconvert(), "tokens"_a, "keys"_a, "values"_a, "kv_start"_a,
             "kv_len"_a, "num_threads"_a);
}

}  // namespace louver
