// The op `settle`: cuts that spend bytes where a certificate comes from. A pass over the bounds sums what every key
// adds to the certificate into the bins of the histograms (kernels/reference/terms.py), and the cheapest pair of edges
// whose remaining terms fit is the answer (settle.py). Nothing proven rests on it: the step it leads to has a
// certificate.
#pragma once

#include "kernels/summary.h"

namespace louver::LOUVER_ISA {

struct SettleContext {
    const Problem* problem;
    const SketchView* sketch;
    const BoundsView* bounds;
    const SummaryView* summary;
    const float *away, *allowed;  // [batch, num_q_heads]: |mean - out|; terms to be left, +infinity: not asked
    int64_t exact_bytes, coarse_bytes;
    float *exact, *unread;  // [batch, num_q_heads], the answer
};

// What a key adds to its bin: attended with its sketched value, with the mean value, and its weight.
struct Terms {
    float coarse, unread, mass, pad;
};

inline void add_terms(const SettleContext& context, int64_t index, const Bins& bins, Terms* sums) {
    const Problem& problem = *context.problem;
    const SketchView& sketch = *context.sketch;
    const BoundsView& bounds = *context.bounds;
    const float scale = problem.softmax_scale, shift = context.summary->shift[index], away = context.away[index];
    const int64_t row = index / problem.num_q_heads, head = index % problem.num_q_heads / problem.group_size();
    const float *estimate = bounds.estimate + index * bounds.sketched,
                *width = bounds.half_width + index * bounds.sketched;
    const uint8_t* undecided = bounds.undecided + (row * problem.num_kv_heads + head) * bounds.sketched;
    for (int64_t b = 0; b < sketch.num_blocks[row]; ++b) {
        const int64_t block = sketch.block(row, head, b), base = b * sketch.frame_len, end = base + sketch.frame_len;
        const float spread = sketch.value_spread[block],
                    error = sketch.coded_values ? sketch.value_error[block] : spread;
        for (int64_t i = base; i < end; i += kLanes) {
            const Ints known = some_bytes(undecided + i, end - i) != 0;
            if (bits(known) == 0) continue;
            const Floats e = load_some(estimate + i, end - i), h = load_some(width + i, end - i);
            const Floats logit = e * scale, off = h * scale;
            const Floats slack = 5 * kUnit * (abs(logit) + off + std::fabs(shift)) + 0x1p-21f;
            const Floats weight = exp(logit - shift), surplus = exp(logit - shift + off + slack) - weight;
            const Floats shifted = surplus * (spread + away);
            const Floats coarse = shifted + weight * error, unread = shifted + weight * spread;
            alignas(64) int32_t at[kLanes];
            bins.of(e + h, at);
            for (uint32_t todo = bits(known); todo != 0; todo &= todo - 1) {
                const int lane = __builtin_ctz(todo);
                Terms& bin = sums[at[lane]];
                bin.coarse += coarse[lane], bin.unread += unread[lane], bin.mass += weight[lane];
            }
        }
    }
}

// Exact above edge i, coarse from i to edge j, unread below: with C(i) the coarse terms below i, and D(j) what the
// terms below j grow by when they are unread, C(i) + D(j) <= allowed Z(i) is asked, Z(i) being the smallest total mass.
inline void settle_head(const SettleContext& context, int64_t index) {
    const SummaryView& summary = *context.summary;
    const float* edges = summary.edges + index * (kBins + 1);
    const double allowed = static_cast<double>(context.allowed[index]);
    context.exact[index] = context.unread[index] = kInfinity;
    if (allowed == static_cast<double>(kInfinity)) return;
    alignas(64) Terms sums[kBins];
    std::memset(sums, 0, sizeof(sums));
    add_terms(context, index, Bins(edges), sums);
    double coarse_below[kBins + 1], grown[kBins + 1], least[kBins + 1];
    coarse_below[kBins] = grown[kBins] = least[kBins] = 0;
    for (int64_t i = kBins; i-- > 0;) {
        const float more = sums[i].unread - sums[i].coarse;
        coarse_below[i] = coarse_below[i + 1] + static_cast<double>(sums[i].coarse);
        grown[i] = grown[i + 1] + static_cast<double>(more > 0 ? more : 0.0f);
        least[i] = least[i + 1] + static_cast<double>(summary.lower_mass[index * kBins + i]);
    }
    int64_t counts[kBins + 1];
    counts[0] = 0;
    for (int64_t i = 0; i < kBins; ++i) counts[i + 1] = counts[i] + summary.upper_count[index * kBins + i];
    int64_t best = kBins, read = kBins, cost = counts[kBins] * context.exact_bytes;  // everything exact always does
    double above = static_cast<double>(summary.decided_mass[index]);
    for (int64_t i = 0; i < kBins; above += static_cast<double>(sums[i].mass), ++i) {
        const double room = allowed * (above + least[i]) - coarse_below[i];
        if (!(room >= 0)) continue;
        int64_t low = i, high = kBins;  // grown descends to 0: the first j from i on that fits
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (grown[middle] <= room) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        const int64_t spent =
            counts[i] * (context.exact_bytes - context.coarse_bytes) + counts[low] * context.coarse_bytes;
        if (spent < cost || (spent == cost && i < best)) best = i, read = low, cost = spent;
    }
    context.exact[index] = edges[best];
    context.unread[index] = std::fmin(edges[read], edges[best]);
}

inline void settle_member(void* argument, int rank, Team& team) {
    const auto& context = *static_cast<SettleContext*>(argument);
    for (int64_t i = rank; i < context.problem->batch * context.problem->num_q_heads; i += team.size())
        settle_head(context, i);
}

inline void settle(const Problem& problem, const SketchView& sketch, const BoundsView& bounds,
                   const SummaryView& summary, const float* away, const float* allowed, int64_t exact_bytes,
                   int64_t coarse_bytes, float* exact, float* unread, int num_threads) {
    SettleContext context{&problem, &sketch,     &bounds,      &summary, away,
                          allowed,  exact_bytes, coarse_bytes, exact,    unread};
    parallel(num_threads, settle_member, &context);
}

}  // namespace louver::LOUVER_ISA
