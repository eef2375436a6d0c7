// Exact attention over the list of a ranked retrieval, in float32; the twin of exact_kernel there, with the same sums. Every CTA first
// raises tau to the rank-th best score, less rounding (score.cu counted the scores): to do so again costs less than to wait for the CTA
// that does it last. A thread takes an entry and a head, its score against tau; what is kept is packed, so that only kept values are read,
// LANES lanes a value. Where a CTA has few entries, its time is that of the instructions of one warp: whatever there is nothing to do for
// is skipped. Where the list overflowed, every token of the row is scored here and attended. Macros: D, G, L, and BF16, PAGED.
#define THREADS 256
#define WARPS (THREADS / 32)
#define GROUPS (THREADS / LANES)        // values read at once
#define BATCH 4                         // values a lane has asked for
#define WIDE (G <= 1 ? 1 : G <= 2 ? 2 : G <= 4 ? 4 : 8)
#define AT_ONCE (THREADS / WIDE)          // entries a thread each of all heads takes at once
#define SHARERS (LANES / BATCH)         // lanes that hold the norm of the same value, and share its heads
#define SHARED_HEADS ((G + SHARERS - 1) / SHARERS)
#define PAIRS_PER_LANE (D / 64)         // pairs of channels of a key a lane holds, where a warp scores it
#define SLOTS (G * D <= 512 ? WARPS : 2)  // outputs of warps merged at once, by shared memory

struct __align__(4 * WIDE < 16 ? 4 * WIDE : 16) Row { float x[WIDE]; };

// The highest bin of a histogram, 32 a lane, from which on upwards there are `need`, or -1. scratch: shared memory of 32. By one warp.
__device__ __forceinline__ int rank_bin(const int4 (&mine)[8], int need, int* scratch) {
    const int lane = threadIdx.x % 32;
    int own = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) own += mine[i].x + mine[i].y + mine[i].z + mine[i].w;
    int from = own;                     // in this lane's bins and above
    for (int m = 1; m < 32; m *= 2) { const int x = __shfl_down_sync(FULL, from, m); if (lane + m < 32) from += x; }
    const u32 enough = __ballot_sync(FULL, from >= need);
    if (!enough) return -1;
    const int holder = 31 - __clz(enough), above = __shfl_sync(FULL, from - own, holder);
    if (lane == holder)
#pragma unroll
        for (int i = 0; i < 8; ++i) ((int4*)scratch)[i] = mine[i];
    __syncwarp();
    int within = scratch[lane];  // of the holder's bins: in this one and above
    for (int m = 1; m < 32; m *= 2) { const int x = __shfl_down_sync(FULL, within, m); if (lane + m < 32) within += x; }
    return holder * 32 + 31 - __clz(__ballot_sync(FULL, within + above >= need));
}

extern "C" __global__ void __launch_bounds__(THREADS, G <= 4 ? 2 : 1) attend(
    const float* q, const u16* __restrict__ k, const u16* __restrict__ v, const int* __restrict__ table, i64 k_page,
    i64 k_head, i64 k_token, i64 v_page, i64 v_head, i64 v_token, i64 table_stride, int page_len,
    const int* __restrict__ num_blocks, const int* __restrict__ kv_start, const int* __restrict__ kv_len,
    const float* low, const int* cuts, const float* tau, float* raised, const int* rank_hist, const int* listed, const float* scores,
    const float* slacks, int* counters, float* __restrict__ part_out, float* __restrict__ part_sums, u8* __restrict__ mask,
    i64 mask_stride, int num_kv_heads, int room, float scale, float slack_share, float weight_slack, i64 share, i64 tolerance,
    int count_wanted) {
    __shared__ int tokens[THREADS];                   // kept ones, packed
    __shared__ Row weight[THREADS], extra[THREADS];
    __shared__ float tops[WIDE][WARPS], peak[WIDE];
    __shared__ __align__(16) int top_bins[G][32];
    __shared__ __align__(16) float merged[SLOTS][G][D];
    __shared__ float sums[6][G][WARPS];
    __shared__ int number, kept_closed;
    __shared__ float taus[WIDE], lows[WIDE];
    const int pid = blockIdx.x, row = pid / num_kv_heads, kv_head = pid % num_kv_heads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, l = lane % LANES, group = threadIdx.x / LANES;
    const int start = kv_start[row], length = kv_len[row] - start, closed = num_blocks[row] * L;
    awaited();
    let_next_start();
    // Of the rank's head of a warp: asked for with the first counter, not after it.
    static_assert(G <= WARPS, "a warp per head");
    int4 per_bin[8];
    float origin = 0.0f, cut_tau = 0.0f;
    int cut = 0;
    if (warp < G) {
        const int id = pid * G + warp;
        const int4* bins = (const int4*)(rank_hist + id * RANK_BINS + lane * 32);
#pragma unroll
        for (int i = 0; i < 8; ++i) per_bin[i] = bins[i];
        origin = low[id], cut_tau = tau[id], cut = cuts[id * 2];
    }
    const int num_listed = counters[pid * COUNTERS + LISTED];
    const bool dense = num_listed > room || length - closed > 2 * L;
    const int count = dense ? length : num_listed + length - closed;
    const int each = (count + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * each, end = min(begin + each, count);
    const Place keys = {k, k_page, k_head, k_token, table, table_stride, page_len};
    const Place values = {v, v_page, v_head, v_token, table, table_stride, page_len};
    float acc[G][8];                                  // of this lane's eight channels
    const int h = threadIdx.x % WIDE;                 // this thread's head where it takes entries
    float weights = 0.0f, floors = 0.0f, surplus = 0.0f, rejected = 0.0f, reach[SHARED_HEADS], surplus_value[SHARED_HEADS];
#pragma unroll
    for (int g = 0; g < G; ++g)
#pragma unroll
        for (int c = 0; c < 8; ++c) acc[g][c] = 0.0f;
#pragma unroll
    for (int i = 0; i < SHARED_HEADS; ++i) reach[i] = surplus_value[i] = 0.0f;
    if (threadIdx.x < WIDE) peak[threadIdx.x] = -INFINITE;
    if (threadIdx.x == 0) kept_closed = 0;
    int entry[WIDE];
    float scored[WIDE], doubt[WIDE];                  // of this thread's entries of a turn; the next turn's are asked for early
    auto ask = [&](int first) {
#pragma unroll
        for (int s = 0; s < WIDE; ++s) {
            const int i = first + s * AT_ONCE + threadIdx.x / WIDE;
            entry[s] = DECIDED;
            if (dense || i >= end) continue;
            entry[s] = i < num_listed ? listed[(i64)pid * room + i] : (closed + i - num_listed) | DECIDED;
            const i64 at = ((i64)pid * (room + 2 * L) + (i < num_listed ? i : room + i - num_listed)) * G + min(h, G - 1);
            scored[s] = scores[at], doubt[s] = slacks[at];
        }
    };
    ask(begin);
    const int need = needed(length, share, tolerance, count_wanted);
    if (warp < G) {
        const int best = rank_bin(per_bin, need, top_bins[warp]);
        if (lane == 0) {
            float nth = (origin + (cut + best * RANK_CODES) * (1.0f / STEPS)) / scale;
            nth -= fabsf(nth) * 0x1p-20f;
            taus[warp] = num_listed > room ? -INFINITE : best >= 0 ? fmaxf(nth, cut_tau) : cut_tau;
            lows[warp] = origin;
            if (blockIdx.y == 0) raised[pid * G + warp] = taus[warp];
        }
    }
#pragma unroll 1
    for (int first = begin; first < end; first += THREADS) {
        const int n = min(THREADS, end - first);
        if (threadIdx.x == 0) number = 0;
        __syncthreads();
        if (dense) {  // a warp scores a key; products of absolute values bound the rounding
            for (int j = warp; j < n; j += WARPS) {
                const u32* key = (const u32*)keys.at(row, kv_head, start + first + j);
                float2 y[PAIRS_PER_LANE];
#pragma unroll
                for (int c = 0; c < PAIRS_PER_LANE; ++c) y[c] = unpack(key[lane + 32 * c]);
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    const float2* x = (const float2*)(q + ((i64)pid * G + g) * D);
                    float dot = 0.0f, size = 0.0f;
#pragma unroll
                    for (int c = 0; c < PAIRS_PER_LANE; ++c) {
                        const float2 z = x[lane + 32 * c];
                        dot += y[c].x * z.x + y[c].y * z.y;
                        size += fabsf(y[c].x * z.x) + fabsf(y[c].y * z.y);
                    }
                    for (int m = 16; m; m /= 2) { dot += __shfl_xor_sync(FULL, dot, m); size += __shfl_xor_sync(FULL, size, m); }
                    if (lane == 0) { weight[j].x[g] = dot; extra[j].x[g] = size * slack_share + 0x1p-60f; }
                }
            }
            __syncthreads();
        }
        const float least = taus[h], origin_h = lows[h];
        float logit[WIDE], off[WIDE], top = -INFINITE;
        int place[WIDE];
#pragma unroll
        for (int s = 0; s < WIDE; ++s) {
            logit[s] = -INFINITE, place[s] = -1;
            if (s * AT_ONCE >= n) continue;               // no thread has any
            const int i = s * AT_ONCE + threadIdx.x / WIDE;
            const bool here = i < n && h < G;
            const int token = dense ? first + i : entry[s] & (DECIDED - 1);
            const float score = dense ? weight[i].x[h] : scored[s], slack = dense ? extra[i].x[h] : doubt[s];
            const bool keep = here && (dense || (entry[s] & DECIDED) || !(score + slack < least));
            if (here && !keep)
                rejected += exp2_fast(((score + slack) * scale - origin_h + fabsf(score * scale) * 0x1p-20f) * LOG2E) * 1.001f;
            if (mask && keep) mask[(pid * G + h) * mask_stride + start + token] = 1;
            if (keep) logit[s] = score * scale;
            off[s] = slack * scale;
            top = fmaxf(top, logit[s]);
            const u32 heads = __ballot_sync(FULL, keep) >> (lane & ~(WIDE - 1)) & ((1u << WIDE) - 1);
            const u32 keeping = __ballot_sync(FULL, heads && h == 0), closing = __ballot_sync(FULL, heads && h == 0 && token < closed);
            if (!keeping) continue;
            int to = 0;
            if (lane == 0) {
                to = atomicAdd(&number, __popc(keeping));
                if (closing) atomicAdd(&kept_closed, __popc(closing));
            }
            to = __shfl_sync(FULL, to, 0) + __popc(keeping & ((1u << (lane & ~(WIDE - 1))) - 1));
            if (heads) {
                place[s] = to;
                if (h == 0) tokens[to] = token;
            }
        }
        for (int m = 16; m >= WIDE; m /= 2) top = fmaxf(top, __shfl_xor_sync(FULL, top, m));
        if (lane < WIDE) tops[lane][warp] = top;
        if (first + THREADS < end) ask(first + THREADS);
        __syncthreads();  // dense: everyone has read weight and extra, too
        float shift = peak[h];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) shift = fmaxf(shift, tops[h][w]);
        shift = shift == -INFINITE ? 0.0f : shift;
        if (first > begin) {
            const float fade = exp2_fast((peak[h] - shift) * LOG2E);
            weights *= fade, floors *= fade, surplus *= fade;
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float by = __shfl_sync(FULL, fade, g);
#pragma unroll
                for (int c = 0; c < 8; ++c) acc[g][c] *= by;
                if (l % SHARERS == g % SHARERS) reach[g / SHARERS] *= by, surplus_value[g / SHARERS] *= by;
            }
        }
#pragma unroll
        for (int s = 0; s < WIDE; ++s) {
            if (s * AT_ONCE >= n) break;
            if (place[s] < 0) continue;
            const bool kept = !(logit[s] == -INFINITE);
            const float a = kept ? exp2_fast((logit[s] - shift) * LOG2E) : 0.0f;
            const float wide = (off[s] + weight_slack + (fabsf(logit[s]) + fabsf(shift)) * 0x1p-22f) * LOG2E;
            const float more = kept ? a * (exp2_fast(wide) - 1.0f) + 0x1p-120f : 0.0f;
            weights += a;
            if (kept) floors += a * exp2_fast(-wide) * 0.999999f;
            surplus += more;
            weight[place[s]].x[h] = a;
            extra[place[s]].x[h] = more;
        }
        __syncthreads();
        if (threadIdx.x < WIDE) {
#pragma unroll
            for (int w = 0; w < WARPS; ++w) peak[threadIdx.x] = fmaxf(peak[threadIdx.x], tops[threadIdx.x][w]);
        }
        const int kept = number;
        for (int from = 0; from < kept; from += BATCH * GROUPS) {  // all lanes stay, for the norms
            uint4 piece[BATCH];
#pragma unroll
            for (int u = 0; u < BATCH; ++u)
                if (from + u * GROUPS < kept)
                    piece[u] = values.piece(row, kv_head, start + tokens[min(from + u * GROUPS + group, kept - 1)], l);
            float squares[BATCH];
#pragma unroll
            for (int u = 0; u < BATCH; ++u) {
                const int j = from + u * GROUPS + group;
                squares[u] = 0.0f;
                if (from + u * GROUPS >= kept) continue;
                const Row of = weight[min(j, kept - 1)];
                float y[8];
                unpack8(piece[u], y);
#pragma unroll
                for (int c = 0; c < 8; ++c) squares[u] += y[c] * y[c];
                if (j < kept)
#pragma unroll
                    for (int g = 0; g < G; ++g)
#pragma unroll
                        for (int c = 0; c < 8; ++c) acc[g][c] += of.x[g] * y[c];
            }
            const float norm = sqrtf(sum_apart<BATCH, LANES>(squares, l)) * 1.0001f;
            const int j = from + (l / SHARERS) * GROUPS + group;
#pragma unroll
            for (int i = 0; i < SHARED_HEADS; ++i) {
                const int g = i * SHARERS + l % SHARERS;
                if (j < kept && g < G) reach[i] += weight[j].x[g] * norm, surplus_value[i] += extra[j].x[g] * norm;
            }
        }
        if (first + THREADS < end) __syncthreads();
    }
    for (int m = 16; m >= WIDE; m /= 2) {
        weights += __shfl_xor_sync(FULL, weights, m), floors += __shfl_xor_sync(FULL, floors, m);
        surplus += __shfl_xor_sync(FULL, surplus, m), rejected += __shfl_xor_sync(FULL, rejected, m);
    }
    if (lane < G) sums[0][lane][warp] = weights, sums[1][lane][warp] = floors, sums[2][lane][warp] = surplus, sums[3][lane][warp] = rejected;
#pragma unroll
    for (int g = 0; g < G; ++g) {
        // The groups of a warp read different values.
#pragma unroll
        for (int c = 0; c < 8; ++c)
#pragma unroll
            for (int m = LANES; m < 32; m *= 2) acc[g][c] += __shfl_xor_sync(FULL, acc[g][c], m);
    }
    for (int turn = 0; turn < WARPS / SLOTS; ++turn) {
        if (warp / SLOTS == turn && lane < LANES)
#pragma unroll
            for (int g = 0; g < G; ++g)
#pragma unroll
                for (int c = 0; c < 8; ++c) {
                    float& to = merged[warp % SLOTS][g][8 * l + c];
                    to = turn ? to + acc[g][c] : acc[g][c];
                }
        if (turn + 1 < WARPS / SLOTS) __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < SHARED_HEADS; ++h) {
#pragma unroll
        for (int m = SHARERS; m < 32; m *= 2) {
            reach[h] += __shfl_xor_sync(FULL, reach[h], m);
            surplus_value[h] += __shfl_xor_sync(FULL, surplus_value[h], m);
        }
        const int g = h * SHARERS + lane;
        if (lane < SHARERS && g < G) sums[4][g][warp] = surplus_value[h], sums[5][g][warp] = reach[h];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < G * D; i += THREADS) {
        float o = 0.0f;
#pragma unroll
        for (int w = 0; w < SLOTS; ++w) o += merged[w][i / D][i % D];
        part_out[(((i64)pid * G + i / D) * gridDim.y + blockIdx.y) * D + i % D] = o;
    }
    if (threadIdx.x < 6 * G) {
        const int g = threadIdx.x / 6, j = threadIdx.x % 6;
        float o = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) o += sums[j][g][w];
        float* to = part_sums + (((i64)pid * G + g) * gridDim.y + blockIdx.y) * 8;
        const int places[6] = {1, 2, 4, 6, 3, 5};
        to[places[j]] = o;
        if (j == 0) to[0] = peak[g];
    }
    if (threadIdx.x == 0 && kept_closed) atomicAdd(counters + pid * COUNTERS + EXACT, kept_closed);
}
