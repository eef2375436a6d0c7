// The op `attend_within`: a step that drops nothing and whose certificate is at most error |out| for every head, or 0.
//
//     1. scan; the keys with the highest bounds are scored and attended, the rest stands for the mean value: an output
//     2. cuts are chosen by what they would certify (choose.h), what they make exact is read, and once more, from the
//        better output
//     3. sketched values are read, and the step is certified; who misses gets lower cuts, and 3 again
//     4. who still misses is exact everywhere, and so is a KV head that would read what dense attention reads
//
// Cuts only sink, so the list of exact keys only grows, and what it adds to the output is kept from step to step.
#pragma once

#include "kernels/choose.h"
#include "kernels/step.h"

namespace louver::LOUVER_ISA {

constexpr int kWithinPasses = 6;  // that choose cuts
struct WithinContext {
    StepContext step;
    const Asked* asked;
    char* room;                      // behind the step's memory
    int64_t room_bytes, mask_bytes;  // per thread
};

// Besides trials, what the threads of a unit share.
struct WithinRoom {
    Trials trials;
    TermSums* terms;  // [group]
    Sums* sums;       // [size, group], of the list
    float* out;       // [size, group, padded], the same
    uint8_t* framed;  // [blocks], whose value frame some pass has read
    int64_t* again;   // [size, 2]: keys whose value code was read before they became exact; frames read for those alone
    Ints *exact, *live;  // this thread's, of a block
};

inline int64_t lay_out_room(WithinRoom& room, const SketchView& sketch, int64_t longest, int64_t group, int64_t padded,
                            int size, char* memory) {
    const int64_t stride = padded_dims(longest) + kLanes;
    Arena arena(memory);
    Trials& trials = room.trials;
    trials.weight = arena.take<float>(group * stride), trials.ceiling = arena.take<float>(group * stride);
    for (float** each : {&trials.away, &trials.allowed, &trials.cut, &trials.live, &trials.aim, &trials.ratio,
                         &trials.best_cut, &trials.best_live})
        *each = arena.take<float>(group);
    trials.whole = arena.take<double>(group);
    trials.sums = arena.take<TrialSums>(size * group), trials.counts = arena.take<TrialCounts>(size);
    room.terms = arena.take<TermSums>(group);
    room.sums = arena.take<Sums>(size * group), room.out = arena.take<float>(size * group * padded);
    room.framed = arena.take<uint8_t>(longest / sketch.frame_len + 1), room.again = arena.take<int64_t>(2 * size);
    return arena.used();
}

inline int64_t lay_out_masks(WithinRoom& room, const SketchView& sketch, char* memory) {
    const int64_t vectors = (sketch.frame_len + kLanes - 1) / kLanes;
    Arena arena(memory);
    room.exact = arena.take<Ints>(vectors), room.live = arena.take<Ints>(vectors);
    return arena.used();
}

// One unit's step, as one of its threads sees it.
class Within {
  public:
    Within(Unit& unit, const WithinContext& context, WithinRoom& room, Private& mine)
        : unit_(unit),
          asked_(*context.asked),
          room_(room),
          trials_(room.trials),
          mine_(mine),
          chooser_(unit, asked_, trials_, room.terms, room.exact, room.live) {}

    void run() {
        start();
        bool done = false, missed = false;
        for (int pass = 0; pass < kWithinPasses && !done; ++pass) {
            bool dear = false;
            for (int look = pass == 0 ? 0 : 1; look < 2 && !dear; ++look) {
                if (pass == 0) chooser_.guess_output();
                dear = chooser_.choose(look == 0, missed);
                if (!dear) lower(trials_.best_cut, trials_.best_live, pass > 0);
            }
            if (dear) break;
            attend();
            done = met();
            missed = true;
            if (!done) retreat();
        }
        if (!done) {
            for (int64_t g = unit_.rank; g < unit_.group.size; g += unit_.size)
                trials_.best_cut[g] = trials_.best_live[g] = -kInfinity;
            unit_.wait();
            lower(trials_.best_cut, trials_.best_live, missed);
            attend();
        }
        count_again();
    }

  private:
    static LOUVER_ALWAYS_INLINE Ints every(int64_t, int64_t) { return ~Ints{}; }

    // The best keys by their bounds, exact; weights of the others.
    void start() {
        const int64_t need = keys_needed(*unit_.rule, unit_.length);
        room_.again[2 * unit_.rank] = room_.again[2 * unit_.rank + 1] = 0;
        for (int64_t b = unit_.blocks.begin; b < unit_.blocks.end; ++b) room_.framed[b] = 0;
        clear_sums(unit_);
        scan_unit<true>(unit_);
        unit_.wait();
        int64_t decided = 0;
        unit_.lists([&](int64_t, int64_t n) { decided += n; });
        decided -= unit_.length - unit_.closed;
        unit_.my_heads([&](int64_t g) {
            unit_.cut[g] = threshold_for(unit_.upper + g * unit_.stride, unit_.closed, need + decided, unit_.packed);
            unit_.live_above[g] = kInfinity;
            trials_.aim[g] = kFirstAim;
        });
        unit_.wait();
        collect<AlsoFind::top_estimate>(unit_, unit_.cut, nullptr);
        unit_.wait();
        weigh_anew();
    }

    // Weights relative to the best of what is there now, and the list attended from its beginning.
    void weigh_anew() {
        settle_top(unit_);
        chooser_.forget_terms();
        unit_.wait();
        for (int64_t g = 0; g < unit_.group.size; ++g) unit_.sum_of(g) = Sums{};
        std::memset(unit_.my_out(), 0, static_cast<size_t>(4 * unit_.group.size * unit_.group.padded));
        fill_ends(unit_, trials_.weight, trials_.ceiling);
        attend_list(unit_, mine_.weights, mine_.value_norms, every);
        unit_.wait();
    }

    // Take the cuts, and attend what they make exact.
    void lower(const float* cut, const float* live, bool coded) {
        unit_.my_heads([&](int64_t g) {
            unit_.before[g] = unit_.cut[g];
            unit_.tau[g] = unit_.cut[g] = std::fmin(unit_.cut[g], cut[g]);
        });
        const int64_t from = unit_.my_count();
        unit_.wait();
        collect<AlsoFind::top_estimate>(unit_, unit_.cut, unit_.before);
        for (int64_t i = unit_.list_begin + from; coded && i < unit_.list_begin + unit_.my_count(); ++i) {
            bool was_live = false;
            for (int64_t g = 0; g < unit_.group.size; ++g)
                was_live |= unit_.upper[g * unit_.stride + unit_.tokens[i]] >= unit_.live_above[g];
            room_.again[2 * unit_.rank] += was_live;
        }
        unit_.wait();
        unit_.my_heads([&](int64_t g) { unit_.live_above[g] = std::fmin(live[g], unit_.cut[g]); });
        bool anew = false;  // the same for every thread
        for (int64_t g = 0; g < unit_.group.size; ++g) {
            const float peak = over_members(unit_, g, &Extremes::peak), upper = over_members(unit_, g, &Extremes::top);
            const float top = peak > upper ? peak : upper;
            anew |= top > -kInfinity && std::fabs(top - unit_.top[g]) * unit_.problem->softmax_scale > kRebaseNats;
        }
        unit_.wait();
        if (anew) return weigh_anew();
        clear_ends(unit_, trials_);
        attend_list(unit_, mine_.weights, mine_.value_norms, every, from);
        unit_.parts += 1;
        unit_.wait();
    }

    // The step under the cuts there are, certified.
    void attend() {
        const int64_t group = unit_.group.size, padded = unit_.group.padded;
        std::memcpy(room_.sums + unit_.rank * group, unit_.sums + unit_.rank * group,
                    static_cast<size_t>(group) * sizeof(Sums));
        std::memcpy(room_.out + unit_.rank * group * padded, unit_.my_out(), static_cast<size_t>(4 * group * padded));
        for (int i = 0; i < kNumCounts; ++i) unit_.counts[unit_.rank * kNumCounts + i] = 0;
        count_exact(unit_);
        unit_.my_heads([&](int64_t g) {
            unit_.rescale[g] = 0;
            for (int m = 0; m < unit_.size; ++m) unit_.rescale[g] += unit_.sums[m * group + g].floors;
        });
        unit_.wait();
        add_sketched(unit_, mine_.coarse);
        unit_.wait();
        if (unit_.rank == 0) finish_unit(unit_);
        unit_.wait();
        Unit ends = unit_;
        ends.estimate = trials_.weight, ends.upper = trials_.ceiling;
        unit_.my_heads([&](int64_t g) {
            float& certificate = unit_.output->certificate[index_of(g)];
            if (certificate == 0) return;
            Sums sums = {};
            for (int m = 0; m < unit_.size; ++m) add(sums, unit_.sums[m * group + g]);
            const float joint = joint_maximum(ends, g, sums, unit_.rescale[g], unit_.away[g], trials_.ratio[g], 1);
            if (joint < certificate) certificate = joint;
        });
        unit_.wait();
    }

    int64_t index_of(int64_t g) const {
        return unit_.row * unit_.problem->num_q_heads + unit_.head * unit_.group.size + g;
    }

    // error |out| less arithmetic, |out| rounded down, and with it the difference.
    double allowed_of(int64_t g) const {
        const Problem& problem = *unit_.problem;
        const int64_t item = problem.q_dtype == DType::float32 ? 4 : 2;
        double squares = 0;
        for (int64_t d = 0; d < problem.head_dim; ++d) {
            const char* at = unit_.output->out + (index_of(g) * problem.head_dim + d) * item;
            const auto x = static_cast<double>(load_scalar(problem.q_dtype, at));
            squares += x * x;
        }
        const double allowed = static_cast<double>(asked_.error) * std::sqrt(squares) * (1 - 1e-5) -
                               static_cast<double>(unit_.output->arithmetic[index_of(g)]);
        return allowed > 0 && allowed < static_cast<double>(kInfinity) ? allowed : 0.0;
    }

    // Whether every head's certificate is what was asked.
    bool met() const {
        for (int64_t g = 0; g < unit_.group.size; ++g)
            if (!(static_cast<double>(unit_.output->certificate[index_of(g)]) <= allowed_of(g))) return false;
        return true;
    }

    // Before lower cuts: what to aim at, and the list's sums without the sketched keys'.
    void retreat() {
        const int64_t group = unit_.group.size, padded = unit_.group.padded;
        unit_.wait();
        unit_.my_heads([&](int64_t g) {
            const float certificate = unit_.output->certificate[index_of(g)], more = certificate / trials_.ratio[g];
            const double model = more > 1 && more < 10 ? static_cast<double>(more) : 1.0;
            trials_.allowed[g] = static_cast<float>(kOfAllowed * allowed_of(g) / model);
            trials_.away[g] = unit_.away[g];
        });
        for (int64_t b = unit_.blocks.begin; b < unit_.blocks.end; ++b)
            if (reads_frame(b)) room_.framed[b] = 1;
        std::memcpy(unit_.sums + unit_.rank * group, room_.sums + unit_.rank * group,
                    static_cast<size_t>(group) * sizeof(Sums));
        std::memcpy(unit_.my_out(), room_.out + unit_.rank * group * padded, static_cast<size_t>(4 * group * padded));
        unit_.wait();
    }

    // Whether some key of the block has its sketched value read.
    bool reads_frame(int64_t b) const {
        for (int64_t token = 0; token < unit_.sketch->frame_len; token += kLanes) {
            Ints exact = {}, live = {};
            for (int64_t g = 0; g < unit_.group.size; ++g) {
                const Floats upper = load<Floats>(unit_.upper + g * unit_.stride + b * unit_.sketch->frame_len + token);
                exact |= upper >= unit_.cut[g], live |= upper >= unit_.live_above[g];
            }
            if (bits(first_lanes(unit_.sketch->frame_len - token) & live & ~exact) != 0) return true;
        }
        return false;
    }

    // Value codes and frames that an earlier pass read and the counts do not show.
    void count_again() {
        for (int64_t b = unit_.blocks.begin; b < unit_.blocks.end; ++b)
            room_.again[2 * unit_.rank + 1] += room_.framed[b] != 0 && !reads_frame(b);
        unit_.wait();
        if (unit_.rank != 0) return;
        int64_t& more = asked_.more_bytes[unit_.row * unit_.problem->num_kv_heads + unit_.head];
        more = 0;
        for (int m = 0; m < unit_.size; ++m)
            more += room_.again[2 * m] * asked_.bytes[kCoarse] + room_.again[2 * m + 1] * asked_.bytes[kValueBlocks];
    }

    Unit& unit_;
    const Asked& asked_;
    WithinRoom& room_;
    Trials& trials_;
    Private& mine_;
    Chooser chooser_;
};

inline void within_member(void* argument, int rank, Team& team) {
    const auto& context = *static_cast<WithinContext*>(argument);
    const Problem& problem = *context.step.problem;
    const SketchView& sketch = *context.step.sketch;
    for_units(problem.batch * problem.num_kv_heads, rank, team.size(), [&](int64_t index, bool shared) {
        if (shared) team.barrier();
        Private mine = {};
        Unit unit = make_unit(context.step, index, shared, rank, team, mine);
        const int64_t each = context.room_bytes + context.mask_bytes;
        WithinRoom room = {};
        lay_out_room(room, sketch, context.step.longest, unit.group.size, unit.group.padded, unit.size,
                     context.room + (shared ? 0 : rank) * each);
        lay_out_masks(room, sketch, context.room + rank * each + context.room_bytes);
        Within(unit, context, room, mine).run();
        unit.wait();
    });
}

inline void attend_within(const Problem& problem, const SketchView& sketch, const Rule& rule, const Asked& asked,
                          const StepOutput& output, int num_threads) {
    WithinContext context{make_context(problem, sketch, rule, output, true, num_threads), &asked, nullptr, 0, 0};
    WithinRoom room = {};
    context.room_bytes = lay_out_room(room, sketch, context.step.longest, problem.group_size(),
                                      padded_dims(sketch.dims), num_threads, nullptr);
    context.mask_bytes = lay_out_masks(room, sketch, nullptr);
    const int64_t bytes = context.step.shared_bytes + context.step.private_bytes;
    context.step.memory = scratch((bytes + context.room_bytes + context.mask_bytes) * num_threads);
    context.room = context.step.memory + bytes * num_threads;
    parallel(num_threads, within_member, &context);
}

}  // namespace louver::LOUVER_ISA
