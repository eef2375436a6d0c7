// Histograms of bounds (kernels/reference/bounds.py: summarize). For policies, which choose thresholds from them:
// nothing proven rests on a sum here.
#pragma once

#include "kernels/rounding.h"
#include "threads.h"

namespace louver::LOUVER_ISA {

constexpr int64_t kTopBins = kBins * 3 / 4;  // edges between the largest upper bound and the mean

// Which bin a bound falls into: edges[i] > x >= edges[i + 1]. Edges are evenly spaced in two pieces, but for rounding,
// so a guess is at most a step or two away.
struct Bins {
    const float* edges;
    float high, mean, top_inverse, rest_inverse;

    explicit Bins(const float* e) : edges(e), high(e[1]), mean(e[kTopBins]) {
        const float low = e[kBins - 1], top = (high - mean) / (kTopBins - 1),
                    rest = (mean - low) / (kBins - 1 - kTopBins);
        top_inverse = top > 1e-30f && top < 1e30f ? 1 / top : 0.0f;
        rest_inverse = rest > 1e-30f && rest < 1e30f ? 1 / rest : 0.0f;
    }
    int32_t settle(int32_t i, float x) const {
        while (i > 0 && x >= edges[i]) --i;
        while (i < kBins - 1 && x < edges[i + 1]) ++i;
        return i;
    }
    // Guesses for kLanes bounds.
    Ints guess(Floats x) const {
        const Floats in_top = 1 + (high - x) * top_inverse, in_rest = kTopBins + (mean - x) * rest_inverse;
        Floats at = select(x >= mean, in_top, in_rest);
        at = min(max(at, splat(0)), splat(kBins - 1));
        return __builtin_convertvector(at, Ints);
    }
    void of(Floats x, int32_t* out) const {
        Ints i = guess(x);
        const Ints wrong = ~((gather(edges, i) > x) & (x >= gather(edges + 1, i)));
        store(out, i);
        for (uint32_t todo = bits(wrong); todo != 0; todo &= todo - 1) {
            const int lane = __builtin_ctz(todo);
            out[lane] = settle(out[lane], x[lane]);
        }
    }
};

// One query head's bounds. state[i]: kDecided and so on, 0 past what is sketched. known[i]: a decided key's score less
// rounding.
struct HeadBounds {
    const float *estimate, *half_width;
    const uint8_t* state;
    const float* known;
    int64_t sketched, length;
};

struct Spread {
    float high = -kInfinity, low = kInfinity, mean = 0, best_lower = -kInfinity, best_known = -kInfinity;
    bool any = false;
};

inline Spread spread_of(const HeadBounds& head) {
    Spread out;
    Floats high = splat(-kInfinity), low = splat(kInfinity), total = {}, lower = splat(-kInfinity);
    double sums = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < head.sketched; i += kLanes) {
        const int64_t n = head.sketched - i;
        const Ints known = some_bytes(head.state + i, n) == kUndecided;
        const Floats e = load_some(head.estimate + i, n), h = load_some(head.half_width + i, n), upper = e + h;
        high = max(high, select(known, upper, splat(-kInfinity)));
        low = min(low, select(known, upper, splat(kInfinity)));
        lower = max(lower, select(known, e - h, splat(-kInfinity)));
        total += select(known, upper, splat(0));
        count += __builtin_popcount(bits(known));
        if (i / kLanes % 64 == 63) sums += static_cast<double>(sum(total)), total = splat(0);
    }
    sums += static_cast<double>(sum(total));
    out.any = count > 0;
    out.high = largest(high), out.low = -largest(-low), out.best_lower = largest(lower);
    if (out.any) out.mean = static_cast<float>(sums / static_cast<double>(count));
    for (int64_t i = 0; i < head.length; ++i) {
        if (i < head.sketched && head.state[i] != kDecided) continue;
        if (head.known[i] > out.best_known) out.best_known = head.known[i];
    }
    return out;
}

// As _edges in the reference: most bins between the mean and the largest upper bound, the rest below.
inline void fill_edges(const Spread& spread, float* edges) {
    const bool any = spread.any && spread.high < kInfinity && spread.high > -kInfinity;
    const float high = any ? spread.high : 0, low = any ? spread.low : 0;
    const float mean = any ? std::fmin(std::fmax(spread.mean, low), high) : 0;
    edges[0] = kInfinity;
    float before = kInfinity;
    for (int64_t i = 1; i < kBins; ++i) {
        const bool top = i <= kTopBins;
        const float share =
            top ? static_cast<float>(i - 1) / (kTopBins - 1) : static_cast<float>(i - kTopBins) / (kBins - kTopBins);
        float x = top ? high + (mean - high) * share : mean + (low - mean) * share;
        if (!(x == x)) x = -kInfinity;
        before = x < before ? x : before;
        edges[i] = before;
    }
    edges[kBins] = -kInfinity;
}

// What one key adds to its bin.
struct BinSums {
    float upper, lower;
    int32_t count, pad;
};

inline void summarize_head(const HeadBounds& head, float scale, const SummaryView& to, int64_t index) {
    float* edges = to.edges + index * (kBins + 1);
    const Spread spread = spread_of(head);
    fill_edges(spread, edges);
    const float peak = spread.best_known > spread.high ? spread.best_known : spread.high;
    const float shift = peak > -kInfinity && peak < kInfinity ? peak * scale : 0.0f;
    alignas(64) BinSums sums[kBins];
    std::memset(sums, 0, sizeof(sums));
    int32_t* lower_count = to.lower_count + index * kBins;
    std::memset(lower_count, 0, static_cast<size_t>(4 * kBins));
    const Bins bins(edges);
    Floats retired = {};
    for (int64_t i = 0; i < head.sketched; i += kLanes) {
        const int64_t n = head.sketched - i;
        const Ints state = some_bytes(head.state + i, n), known = state == kUndecided;
        if (bits(state != kDecided) == 0) continue;
        const Floats e = load_some(head.estimate + i, n), h = load_some(head.half_width + i, n);
        const Floats upper = e + h, lower = e - h, up = upper * scale - shift, down = lower * scale - shift;
        const Floats most = exp(up), least = select(down < kLowestExponent, splat(0), exp(down));
        retired += select(state == kRetired, most, splat(0));
        alignas(64) int32_t at[kLanes], below[kLanes];
        bins.of(upper, at), bins.of(lower, below);
        for (uint32_t todo = bits(known); todo != 0; todo &= todo - 1) {
            const int lane = __builtin_ctz(todo);
            BinSums& bin = sums[at[lane]];
            bin.upper += most[lane], bin.lower += least[lane], bin.count += 1;
            lower_count[below[lane]] += 1;
        }
    }
    double decided = 0;
    for (int64_t i = 0; i < head.length; ++i) {
        if (i < head.sketched && head.state[i] != kDecided) continue;
        const float x = head.known[i] == head.known[i] ? head.known[i] : -kInfinity;
        const float logit = x * scale - shift;
        if (logit >= kLowestExponent) decided += static_cast<double>(exp1(logit));
        lower_count[bins.settle(bins.guess(splat(x))[0], x)] += 1;
    }
    for (int64_t i = 0; i < kBins; ++i) {
        to.upper_count[index * kBins + i] = sums[i].count;
        to.upper_mass[index * kBins + i] = sums[i].upper, to.lower_mass[index * kBins + i] = sums[i].lower;
    }
    to.decided_mass[index] = static_cast<float>(decided), to.shift[index] = shift;
    to.best_lower[index] = spread.best_known > spread.best_lower ? spread.best_known : spread.best_lower;
    if (to.retired_mass != nullptr) to.retired_mass[index] = sum(retired);
}

struct SummaryContext {
    const Problem* problem;
    const float *estimate, *half_width;  // [batch, num_q_heads, sketched]
    const uint8_t* state;                // [batch, state_heads, sketched]
    int64_t state_heads, sketched;
    const float* known;  // [batch, num_q_heads, longest]
    int64_t longest;
    const SummaryView* to;
};

inline HeadBounds head_of(const SummaryContext& context, int64_t index) {
    const Problem& problem = *context.problem;
    const int64_t row = index / problem.num_q_heads, head = index % problem.num_q_heads;
    const int64_t shared = problem.num_q_heads / context.state_heads;
    return HeadBounds{context.estimate + index * context.sketched,
                      context.half_width + index * context.sketched,
                      context.state + (row * context.state_heads + head / shared) * context.sketched,
                      context.known + index * context.longest,
                      context.sketched,
                      problem.row_len(row)};
}

inline void summary_member(void* argument, int rank, Team& team) {
    const auto& context = *static_cast<SummaryContext*>(argument);
    for (int64_t i = rank; i < context.problem->batch * context.problem->num_q_heads; i += team.size())
        summarize_head(head_of(context, i), context.problem->softmax_scale, *context.to, i);
}

// problem has no keys: lengths, heads and the scale are what counts.
inline void summarize(const Problem& problem, const float* estimate, const float* half_width, const uint8_t* state,
                      int64_t state_heads, int64_t sketched, const float* known, int64_t longest, const SummaryView& to,
                      int num_threads) {
    SummaryContext context{&problem, estimate, half_width, state, state_heads, sketched, known, longest, &to};
    parallel(num_threads, summary_member, &context);
}

}  // namespace louver::LOUVER_ISA
