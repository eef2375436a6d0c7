// Exact attention over the list of a ranked retrieval, in float32; the twin of exact_kernel there, with the same sums. Every CTA first
// raises tau to the rank-th best score, less rounding (score.cu counted the scores): to do so again costs less than to wait for the CTA
// that does it last. A thread takes an entry: its scores against tau; what is kept is packed, so that only kept values are read, LANES
// lanes a value. Where the list overflowed, every token of the row is scored here and attended. Macros: D, G, L, and BF16, PAGED.
#define THREADS 256
#define WARPS (THREADS / 32)
#define GROUPS (THREADS / LANES)        // values read at once
#define BATCH 4                         // values a lane has asked for
#define WIDE (G <= 1 ? 1 : G <= 2 ? 2 : G <= 4 ? 4 : 8)
#define SHARERS (LANES / BATCH)         // lanes that hold the norm of the same value, and share its heads
#define SHARED_HEADS ((G + SHARERS - 1) / SHARERS)
#define PAIRS_PER_LANE (D / 64)         // pairs of channels of a key a lane holds, where a warp scores it
#define SLOTS (G * D <= 512 ? WARPS : 2)  // outputs of warps merged at once, by shared memory

extern "C" __global__ void __launch_bounds__(THREADS, G <= 4 ? 2 : 1) attend(
    const float* q, const u16* __restrict__ k, const u16* __restrict__ v, const int* __restrict__ table, i64 k_page,
    i64 k_head, i64 k_token, i64 v_page, i64 v_head, i64 v_token, i64 table_stride, int page_len,
    const int* __restrict__ num_blocks, const int* __restrict__ kv_start, const int* __restrict__ kv_len,
    const float* low, const int* cuts, const float* tau, float* raised, const int* rank_hist, const int* listed, const float* scores,
    const float* slacks, int* counters, float* __restrict__ part_out, float* __restrict__ part_sums, u8* __restrict__ mask,
    i64 mask_stride, int num_kv_heads, int room, float scale, float slack_share, float weight_slack, i64 share, i64 tolerance,
    int count_wanted) {
    __shared__ int tokens[THREADS];                   // kept ones, packed
    __shared__ float weight[G][THREADS], extra[G][THREADS];
    __shared__ float tops[G][WARPS], peak[G];
    __shared__ __align__(16) float merged[SLOTS][G][D];
    __shared__ float sums[6][G][WARPS];
    __shared__ int number, kept_closed;
    __shared__ float taus[G];
    const int pid = blockIdx.x, row = pid / num_kv_heads, kv_head = pid % num_kv_heads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, l = lane % LANES, group = threadIdx.x / LANES;
    const int start = kv_start[row], length = kv_len[row] - start, closed = num_blocks[row] * L;
    awaited();
    let_next_start();
    const int num_listed = counters[pid * COUNTERS + LISTED];
    const bool dense = num_listed > room || length - closed > 2 * L;
    const int count = dense ? length : num_listed + length - closed;
    const int each = (count + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * each, end = min(begin + each, count);
    const Place keys = {k, k_page, k_head, k_token, table, table_stride, page_len};
    const Place values = {v, v_page, v_head, v_token, table, table_stride, page_len};
    float acc[G][8];                                  // of this lane's eight channels
    float weights[G], floors[G], surplus[G], rejected[G], reach[SHARED_HEADS], surplus_value[SHARED_HEADS];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        weights[g] = floors[g] = surplus[g] = rejected[g] = 0.0f;
#pragma unroll
        for (int c = 0; c < 8; ++c) acc[g][c] = 0.0f;
    }
#pragma unroll
    for (int h = 0; h < SHARED_HEADS; ++h) reach[h] = surplus_value[h] = 0.0f;
    if (threadIdx.x < G) peak[threadIdx.x] = -INFINITE;
    if (threadIdx.x == 0) kept_closed = 0;
    int entry = DECIDED;
    float scored[G], doubt[G];                        // of the entry of this thread; the next turn's are asked for early
    auto ask = [&](int i) {
        if (dense || i >= end) return;
        entry = i < num_listed ? listed[(i64)pid * room + i] : (closed + i - num_listed) | DECIDED;
        const i64 at = ((i64)pid * (room + 2 * L) + (i < num_listed ? i : room + i - num_listed)) * G;
#pragma unroll
        for (int g = 0; g < G; ++g) scored[g] = scores[at + g], doubt[g] = slacks[at + g];
    };
    ask(begin + threadIdx.x);
    const i64 need64 = ((i64)length * share - tolerance + ((1ll << 40) - 1)) >> 40;
    const int need = need64 > count_wanted ? (int)need64 : count_wanted;
    for (int g = warp; g < G; g += WARPS) {
        const int4* bins = (const int4*)(rank_hist + (pid * G + g) * RANK_BINS + lane * 32);
        int4 per_bin[8];
        int own = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) { per_bin[i] = bins[i]; own += per_bin[i].x + per_bin[i].y + per_bin[i].z + per_bin[i].w; }
        int from = own;                 // in this lane's bins and above
        for (int m = 1; m < 32; m *= 2) { const int y = __shfl_down_sync(FULL, from, m); if (lane + m < 32) from += y; }
        const u32 enough = __ballot_sync(FULL, from >= need);
        const int holder = enough ? 31 - __clz(enough) : 0;
        int above = from - own, best = -1;
#pragma unroll
        for (int i = 31; i >= 0; --i) {
            const int4 four = per_bin[i / 4];
            above += i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
            if (best < 0 && above >= need) best = lane * 32 + i;
        }
        if (lane == holder) {
            const int id = pid * G + g;
            float nth = (low[id] + (cuts[id * 2] + best * RANK_CODES) * (1.0f / STEPS)) / scale;
            nth -= fabsf(nth) * 0x1p-20f;
            const float cut_tau = tau[id];
            taus[g] = num_listed > room ? -INFINITE : enough ? fmaxf(nth, cut_tau) : cut_tau;
            if (blockIdx.y == 0) raised[id] = taus[g];
        }
    }
    for (int first = begin; first < end; first += THREADS) {
        const int n = min(THREADS, end - first), i = first + threadIdx.x;
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
                    if (lane == 0) { weight[g][j] = dot; extra[g][j] = size * slack_share + 0x1p-60f; }
                }
            }
            __syncthreads();
        }
        float logit[G], off[G];
        int token = 0;
        bool any = false;
        if (threadIdx.x < n) {
            token = dense ? i : entry & (DECIDED - 1);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float s = dense ? weight[g][threadIdx.x] : scored[g];
                const float slack = dense ? extra[g][threadIdx.x] : doubt[g];
                const bool keep = (entry & DECIDED) || !(s + slack < taus[g]);
                if (!keep)
                    rejected[g] += exp2_fast(((s + slack) * scale - low[pid * G + g] + fabsf(s * scale) * 0x1p-20f) * LOG2E) * 1.001f;
                if (mask && keep) mask[(pid * G + g) * mask_stride + start + token] = 1;
                any = any || keep;
                logit[g] = keep ? s * scale : -INFINITE;
                off[g] = slack * scale;
            }
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
            float top = threadIdx.x < n ? logit[g] : -INFINITE;
            for (int m = 16; m; m /= 2) top = fmaxf(top, __shfl_xor_sync(FULL, top, m));
            if (lane == 0) tops[g][warp] = top;
        }
        ask(first + THREADS + threadIdx.x);
        const u32 keeping = __ballot_sync(FULL, any), closing = __ballot_sync(FULL, any && token < closed);
        int place = 0;
        if (keeping) {
            if (lane == 0) {
                place = atomicAdd(&number, __popc(keeping));
                if (closing) atomicAdd(&kept_closed, __popc(closing));
            }
            place = __shfl_sync(FULL, place, 0) + __popc(keeping & ((1u << lane) - 1));
        }
        __syncthreads();  // dense: everyone has read weight and extra, too
        if (any) tokens[place] = token;
#pragma unroll
        for (int g = 0; g < G; ++g) {
            float higher = peak[g];
#pragma unroll
            for (int w = 0; w < WARPS; ++w) higher = fmaxf(higher, tops[g][w]);
            const float shift = higher == -INFINITE ? 0.0f : higher, fade = exp2f((peak[g] - shift) * LOG2E);
            weights[g] *= fade, floors[g] *= fade, surplus[g] *= fade;
#pragma unroll
            for (int c = 0; c < 8; ++c) acc[g][c] *= fade;
            if (l % SHARERS == g % SHARERS) reach[g / SHARERS] *= fade, surplus_value[g / SHARERS] *= fade;
            if (any) {
                const bool kept = !(logit[g] == -INFINITE);
                const float a = kept ? exp2f((logit[g] - shift) * LOG2E) : 0.0f;
                const float grow = exp2f((off[g] + weight_slack + (fabsf(logit[g]) + fabsf(shift)) * 0x1p-22f) * LOG2E);
                const float more = kept ? a * (grow - 1.0f) + 0x1p-120f : 0.0f;
                weights[g] += a;
                if (kept) floors[g] += a / grow;
                surplus[g] += more;
                weight[g][place] = a;
                extra[g][place] = more;
            }
        }
        __syncthreads();
        if (threadIdx.x < G) {
#pragma unroll
            for (int w = 0; w < WARPS; ++w) peak[threadIdx.x] = fmaxf(peak[threadIdx.x], tops[threadIdx.x][w]);
        }
        const int kept = number;
        for (int from = 0; from < kept; from += BATCH * GROUPS) {  // all lanes stay, for the norms
            uint4 piece[BATCH];
#pragma unroll
            for (int u = 0; u < BATCH; ++u)
                piece[u] = values.piece(row, kv_head, start + tokens[min(from + u * GROUPS + group, kept - 1)], l);
            float squares[BATCH];
#pragma unroll
            for (int u = 0; u < BATCH; ++u) {
                const int j = from + u * GROUPS + group;
                float y[8];
                unpack8(piece[u], y);
                squares[u] = 0.0f;
#pragma unroll
                for (int c = 0; c < 8; ++c) squares[u] += y[c] * y[c];
                if (j < kept)
#pragma unroll
                    for (int g = 0; g < G; ++g) {
                        const float a = weight[g][j];
#pragma unroll
                        for (int c = 0; c < 8; ++c) acc[g][c] += a * y[c];
                    }
            }
            const float norm = sqrtf(sum_apart<BATCH, LANES>(squares, l)) * 1.0001f;
            const int j = from + (l / SHARERS) * GROUPS + group;
#pragma unroll
            for (int h = 0; h < SHARED_HEADS; ++h) {
                const int g = h * SHARERS + l % SHARERS;
                if (j < kept && g < G) reach[h] += weight[g][j] * norm, surplus_value[h] += extra[g][j] * norm;
            }
        }
        __syncthreads();
    }
    {
        float one[4 * WIDE];            // of all heads at once
#pragma unroll
        for (int g = 0; g < WIDE; ++g) {
            const int h = g < G ? g : 0;
            one[4 * g] = weights[h], one[4 * g + 1] = floors[h], one[4 * g + 2] = surplus[h], one[4 * g + 3] = rejected[h];
        }
        const float sum = sum_apart<4 * WIDE, 32>(one, lane);
        const int which = lane / (8 / WIDE), g = which / 4;
        if (lane % (8 / WIDE) == 0 && g < G) sums[which % 4][g][warp] = sum;
    }
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
