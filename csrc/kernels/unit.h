// One (row, KV head) of a decode step, as the threads that share it see it: where its bounds are spilled, the list of
// tokens to be read in full, and what every thread contributes to the result.
#pragma once

#include "kernels/exact.h"
#include "kernels/scan.h"
#include "kernels/schedule.h"
#include "kernels/select.h"

namespace louver::LOUVER_ISA {

// Sums of one thread for one head, in units of e^(softmax_scale top). Doubles: adding them up costs no accuracy worth a
// proof.
struct Sums {
    double total, floors;             // weights used; the least their keys can weigh
    double rounding, rounding_value;  // sum of (ceiling - weight) over exact keys, and times |v|
    double surplus, surplus_spread;   // the same over sketched keys, and times the block's value spread
    double moved, moved_spread;       // what rounding sketched keys' weights moved, and the same times
    double value_miss;                // sum of weight times |v - value used|
    double size;                      // sum of weight times |value used|
    double unread, unread_ceilings;   // weight on the mean value; the most its keys can weigh
    double left_out;                  // ceilings of the keys dropped
};

// What a thread finds out while it scans, per head.
struct Extremes {
    float lower;   // the largest lower bound of any key
    float top;     // the largest finite upper bound; where nothing is dropped, the largest estimate
    float extent;  // at least the largest |estimate| + half-width
    float peak;    // the largest exact score
};

struct Unit {
    const Problem* problem;
    const SketchView* sketch;
    const Rule* rule;
    const StepOutput* output;
    Team* team;
    int rank, size;  // within the threads that share this unit
    int64_t row, head, length, num_blocks, closed, stride;
    Part blocks;  // this thread's
    Group group;
    Rows keys, values;
    Scan scan;
    float *upper, *estimate;  // [group, stride], shared; lanes past `closed` are free
    int32_t* tokens;          // [length + kLanes], shared; this thread's list starts at list_begin
    float *scores, *norms;    // [group, stride] and [stride], at the tokens' places in the list
    int64_t list_begin;
    int64_t* list_count;                // [size], shared
    int64_t* counts;                    // [size, kNumCounts], shared
    float *cut, *before, *tau;          // [group], shared
    float* top;                         // [group], shared: the score weights are relative to
    double* rescale;                    // [group], shared
    float* logit_slack;                 // [group], shared: what arithmetic can add to a logit
    float* live_above;                  // [group], shared: upper bounds from which a sketched value is read
    float* away;                        // [group], shared: at least the distance of the output from the mean value
    double* mass;                       // [group], this thread's
    float *value_center, *value_scale;  // [dims], this thread's: the current block's value frame, centers in scales
    float* step_of;                     // [group], this thread's: a block's weight unit
    double* whole_of;                   // [group], this thread's: a block's sum of rounded weights
    float* unread_of;                   // [group], this thread's: a block's weight on the mean value
    float mean_norm;                    // at least |value_mean|
    Extremes* extremes;                 // [size, group], shared
    Sums* sums;                         // [size, group], shared
    float* out;                         // [size, group, padded], shared
    float* packed;                      // [stride], this thread's
    float* buffer;                      // this thread's: kValueTile * padded floats
    Floats* lanes;                      // this thread's: running extremes, 3 per head
    int64_t parts;                      // in which the list is attended, beyond one

    int64_t& my_count() const { return list_count[rank]; }
    Extremes& extreme(int64_t g) const { return extremes[rank * group.size + g]; }
    Sums& sum_of(int64_t g) const { return sums[rank * group.size + g]; }
    float* my_out() const { return out + rank * group.size * group.padded; }
    int64_t list_begin_of(int member) const { return part_of(num_blocks, 1, member, size).begin * sketch->frame_len; }
    void wait() const {
        if (size > 1) team->barrier();
    }
    // Whether this thread's list holds the open tokens too.
    bool last() const { return rank == size - 1; }
    void mark_exact(int64_t g, int64_t token) const {
        const int64_t index = row * problem->num_q_heads + head * group.size + g;
        output->exact_mask[index * output->mask_len + keys.start + token] = 1;
    }
    template <class Body>
    void my_heads(Body body) const {
        for (int64_t g = rank; g < group.size; g += size) body(g);
    }
    template <class Body>
    void lists(Body body) const {
        for (int member = 0; member < size; ++member) body(list_begin_of(member), list_count[member]);
    }
    // Of the kLanes list entries from i on; entries past the list mean nothing.
    Floats slacks(int64_t g, int64_t i) const {
        return score_error(group.padded) * group.norm[g] * load<Floats>(norms + i) + kAbsolute;
    }
    // Their upper bounds: +infinity for tokens no block holds.
    Floats uppers(int64_t g, int64_t i) const {
        const Ints token = load<Ints>(tokens + i);
        const Ints held = (token >= 0) & (token < static_cast<int32_t>(closed));
        return select(held, gather(upper + g * stride, held ? token : Ints{}), splat(kInfinity));
    }
    float slack(int64_t g, int64_t i) const { return score_error(group.padded) * group.norm[g] * norms[i] + kAbsolute; }
};

// max(1, ceil(share * length), count), as louver.kernels.reference.resolve has it.
inline int64_t keys_needed(const Rule& rule, int64_t length) {
    const auto share = static_cast<int64_t>(std::ceil(static_cast<double>(length) * rule.share - 1e-9));
    const int64_t least = rule.count > 1 ? rule.count : 1;
    return share > least ? share : least;
}

// The largest of a field over the threads of a unit.
inline float over_members(const Unit& unit, int64_t g, float Extremes::* field) {
    float out = -kInfinity;
    for (int m = 0; m < unit.size; ++m) {
        const float x = unit.extremes[m * unit.group.size + g].*field;
        out = x > out ? x : out;
    }
    return out;
}

inline void add_token(Unit& unit, int64_t token) {
    unit.tokens[unit.list_begin + unit.my_count()++] = static_cast<int32_t>(token);
}

// Score the tokens this thread's list gained since `from`, and note their best score and lower bound.
inline void score_list(Unit& unit, int64_t from) {
    const int64_t at = unit.list_begin + from, n = unit.my_count() - from;
    for (int64_t i = 0; i < kAhead && i < n; ++i) unit.keys.prefetch(unit.tokens[at + i]);
    const Ahead ahead{&unit.keys, unit.tokens + at + kAhead, n - kAhead};
    score_tokens<true>(unit.keys, unit.group, unit.tokens + at, n, unit.scores + at, unit.stride, unit.norms + at,
                       unit.buffer, ahead);
    for (int64_t g = 0; g < unit.group.size; ++g) {
        Extremes& extreme = unit.extreme(g);
        Floats peak = splat(extreme.peak), lower = splat(extreme.lower);
        for (int64_t i = 0; i < n; i += kLanes) {
            const Floats score = load<Floats>(unit.scores + g * unit.stride + at + i);
            const Floats inside = select(first_lanes(n - i), score, splat(-kInfinity));
            peak = max(inside, peak), lower = max(inside - unit.slacks(g, at + i), lower);  // the second of each if NaN
        }
        extreme.peak = largest(peak), extreme.lower = largest(lower);
    }
}

// Put the scanned block's decided keys on the list: sinks, recent ones, and those without a finite bound. Whether there
// are any.
inline bool list_decided(Unit& unit, int64_t base) {
    const int64_t frame_len = unit.sketch->frame_len;
    const Rule& rule = *unit.rule;
    const bool plain = base >= rule.sinks && base + frame_len <= unit.length - rule.recent;
    if (plain && unit.scan.all_bounded) return false;
    bool any = false;
    for (int64_t token = 0; token < frame_len; token += kLanes) {
        uint32_t& decided = unit.scan.unbounded[token / kLanes];
        const int64_t count = frame_len - token < kLanes ? frame_len - token : kLanes;
        for (int64_t i = 0; i < count && !plain; ++i)
            if (base + token + i < rule.sinks || base + token + i >= unit.length - rule.recent) decided |= 1u << i;
        any |= decided != 0;
        for (uint32_t todo = decided & ((1u << count) - 1); todo != 0; todo &= todo - 1)
            add_token(unit, base + token + __builtin_ctz(todo));
    }
    return any;
}

// Spill the scanned block's bounds for head g, and note the thread's extremes. kPlain: no key is decided, none of its
// lower bounds is wanted, and a block is whole vectors.
template <bool kSpillEstimates, bool kPlain>
LOUVER_INLINE void spill_bounds(Unit& unit, int64_t g, int64_t base, bool floors) {
    const int64_t frame_len = unit.sketch->frame_len;
    const uint32_t* unbounded = unit.scan.unbounded;
    Floats* lanes = unit.lanes + 3 * g;
    Floats best_lower = lanes[0], top = splat(-kInfinity), low = splat(kInfinity);
    float* uppers = unit.upper + g * unit.stride + base;
    float* estimates = unit.estimate + g * unit.stride + base;
    head_bounds(unit.scan, g, [&](int64_t token, Floats estimate, Floats width) LOUVER_ALWAYS_INLINE {
        Floats upper = estimate + width, least = estimate;
        Floats finite = kSpillEstimates ? estimate : upper;
        if (!kPlain) {
            const Ints decided = lanes_of(unbounded[token / kLanes]);
            if (floors) best_lower = max(best_lower, select(decided, splat(-kInfinity), estimate - width));
            upper = select(decided, splat(kInfinity), upper), finite = select(decided, splat(-kInfinity), finite);
            least = select(decided, splat(kInfinity), least);
        }
        if (kSpillEstimates) low = min(low, least);
        top = max(top, finite);
        store_some(uppers + token, upper, kPlain ? kLanes : frame_len - token);
        if (kSpillEstimates) store_some(estimates + token, estimate, kPlain ? kLanes : frame_len - token);
    });
    lanes[0] = best_lower, lanes[1] = max(lanes[1], top);
    if (kSpillEstimates) lanes[2] = max(lanes[2], max(top, -low) + widest_bound(unit.scan, g));
}

// Bound this thread's blocks: spill upper bounds (and estimates), +infinity for decided keys. Those, and the tokens no
// block holds, go on the list and are scored at once.
template <bool kSpillEstimates>
inline void scan_unit(Unit& unit) {
    const SketchView& sketch = *unit.sketch;
    const bool floors = unit.rule->keep_best && unit.rule->has_tau;  // elsewhere exact scores say more
    const bool whole = sketch.frame_len % kLanes == 0;
    const int64_t quarter = sketch.frame_len * unit.scan.half / 4, share = quarter / unit.group.size;  // of codes
    unit.my_count() = 0;
    for (int64_t g = 0; g < unit.group.size; ++g) {
        unit.lanes[3 * g] = unit.lanes[3 * g + 1] = splat(-kInfinity);
        unit.lanes[3 * g + 2] = splat(0);
    }
    for (int64_t b = unit.blocks.begin; b < unit.blocks.end; ++b) {
        const int64_t base = b * sketch.frame_len;
        scan_block(unit.scan, sketch.block(unit.row, unit.head, b));
        const bool plain = !list_decided(unit, base) && !floors && whole;
        for (int64_t g = 0; g < unit.group.size; ++g) {
            touch_next(unit.scan, 3 * quarter + g * share, 3 * quarter + (g + 1) * share);
            if (plain) spill_bounds<kSpillEstimates, true>(unit, g, base, floors);
            if (!plain) spill_bounds<kSpillEstimates, false>(unit, g, base, floors);
        }
    }
    for (int64_t g = 0; g < unit.group.size; ++g) {
        const Floats* lanes = unit.lanes + 3 * g;
        unit.extreme(g) = {largest(lanes[0]), largest(lanes[1]), largest(lanes[2]), -kInfinity};
    }
    for (int64_t i = unit.closed; i < unit.length && unit.last(); ++i) add_token(unit, i);
    score_list(unit, 0);
}

}  // namespace louver::LOUVER_ISA
