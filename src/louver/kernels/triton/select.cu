// Retrieval: list the keys that reach the cut of some head of their group, score them at once, and raise tau to the rank-th best score.
// The twin of list_kernel and rank_kernel. Codes are read two keys a thread; LANES lanes score a key, 16 bytes each, in float32 FMAs, so
// a score is off by at most gamma(D + 2) |q| |key|. The open block's tokens are listed too, as DECIDED. Macros: D, G, L, BF16, PAGED, FIXED.
#define THREADS 256
#define ROOM 1024                       // tokens listed by a CTA before it scores them
#define STEP (2 * THREADS / L)          // blocks read at once
#define GROUPS (THREADS / LANES)
#define UNROLL 2

extern "C" __global__ void __launch_bounds__(THREADS) select_keys(
    const float* q, const u16* __restrict__ k, const int* __restrict__ table, i64 k_page, i64 k_head, i64 k_token,
    i64 table_stride, int page_len, const u16* upper, const float* __restrict__ value_spread,
    const int* __restrict__ num_blocks, const int* __restrict__ kv_start, const int* __restrict__ kv_len,
    const int* cuts, const float* low, float* __restrict__ tau, int* __restrict__ listed,
    float* __restrict__ scores, float* __restrict__ norms, int* __restrict__ counters, float* __restrict__ below,
    int* __restrict__ rank_hist, int num_kv_heads, int capacity, int room, float scale, float slack_share, i64 share,
    i64 tolerance, int count) {
    __shared__ int found[ROOM];
    __shared__ int number, base, finished;
    __shared__ float norms_of_q[G], origins[G];
    const int pid = blockIdx.x, row = pid / num_kv_heads, kv_head = pid % num_kv_heads;
    const int blocks = num_blocks[row], start = kv_start[row], length = kv_len[row] - start;
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    const Place place = {k, k_page, k_head, k_token, table, table_stride, page_len};
    int* mine = counters + pid * COUNTERS;
    release_next();
    wait_for_previous();
    int cut[G];
    float2 x[G][4];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        cut[g] = cuts[(pid * G + g) * 2];
        const float4* p = (const float4*)(q + ((i64)pid * G + g) * D + lane * 8);
        float4 a = p[0], b = p[1];
        x[g][0] = make_float2(a.x, a.y), x[g][1] = make_float2(a.z, a.w), x[g][2] = make_float2(b.x, b.y), x[g][3] = make_float2(b.z, b.w);
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) square += x[g][i].x * x[g][i].x + x[g][i].y * x[g][i].y;
        square = sqrtf(sum_lanes<LANES>(square)) * 1.001f;
        if (threadIdx.x == 0) { norms_of_q[g] = square; origins[g] = low[pid * G + g]; }
    }
    if (threadIdx.x == 0) number = 0;
    __syncthreads();

    const int each = (blocks + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * each, end = min(begin + each, blocks);
    float mass[G], spread = 0.0f;
#pragma unroll
    for (int g = 0; g < G; ++g) mass[g] = 0.0f;
    // First the blocks of this CTA, then (the last one) the open block: one loop, so that scoring is in the code once.
    const int steps = max(0, (end - begin + STEP - 1) / STEP), rest = blocks * L;
    const int extra = blockIdx.y == gridDim.y - 1 ? (max(0, length - rest) + THREADS - 1) / THREADS : 0;
    for (int step = 0; step < steps + extra; ++step) {
        if (step < steps) {
            const int b = begin + step * STEP;
            const int block = b + threadIdx.x / (L / 2), pair = threadIdx.x % (L / 2);
            if (block < end) {
                const i64 at = (i64)pid * capacity + block;
                u32 codes[G];
#pragma unroll
                for (int g = 0; g < G; ++g) codes[g] = ((const u32*)(upper + (at * G + g) * L))[pair];
                bool first = false, second = false;
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    const int c0 = (int)(codes[g] & 0xffff) ^ SIGNED, c1 = (int)(codes[g] >> 16) ^ SIGNED;
                    if (c0 >= cut[g]) first = true; else mass[g] += exp2_fast(c0 * (LOG2E / STEPS) - BELOW * LOG2E);
                    if (c1 >= cut[g]) second = true; else mass[g] += exp2_fast(c1 * (LOG2E / STEPS) - BELOW * LOG2E);
                }
                const int token = block * L + 2 * pair;
                const int c0 = (int)(codes[0] & 0xffff) ^ SIGNED, c1 = (int)(codes[0] >> 16) ^ SIGNED;
                if (first) found[atomicAdd(&number, 1)] = token | (c0 == ALWAYS ? DECIDED : 0);
                if (second) found[atomicAdd(&number, 1)] = (token + 1) | (c1 == ALWAYS ? DECIDED : 0);
                if (pair == 0) spread = fmaxf(spread, value_spread[at]);
            }
        } else {
            const int token = rest + (step - steps) * THREADS + threadIdx.x;
            if (token < length) found[atomicAdd(&number, 1)] = token | DECIDED;
        }
        __syncthreads();
        const int n = number;
        __syncthreads();
        if (n == 0 || (n <= ROOM - 2 * THREADS && step + 1 < steps + extra)) continue;
        // Score everything found so far.
        if (threadIdx.x == 0) base = atomicAdd(mine + LISTED, n);
        __syncthreads();
        for (int round = 0; round < n; round += UNROLL * GROUPS) {  // the same number of rounds for all lanes
            const int first = round + group;
            uint4 key[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                int i = min(first + u * GROUPS, n - 1);
                key[u] = *(const uint4*)(place.at(row, kv_head, start + (found[i] & (DECIDED - 1))) + lane * 8);
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int i = first + u * GROUPS;
                float2 y[4] = {unpack(key[u].x), unpack(key[u].y), unpack(key[u].z), unpack(key[u].w)};
                float square = 0.0f, dot[G];
#pragma unroll
                for (int g = 0; g < G; ++g) dot[g] = 0.0f;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    square += y[j].x * y[j].x + y[j].y * y[j].y;
#pragma unroll
                    for (int g = 0; g < G; ++g) dot[g] += y[j].x * x[g][j].x + y[j].y * x[g][j].y;
                }
                square = sqrtf(sum_lanes<LANES>(square)) * slack_share;
#pragma unroll
                for (int g = 0; g < G; ++g) dot[g] = sum_lanes<LANES>(dot[g]);
                const int at = base + i;
                if (i < n && at < room) {
                    if (lane == 0) {
                        listed[(i64)pid * room + at] = found[i];
                        norms[(i64)pid * room + at] = square;
                    }
                    float own = dot[0];
#pragma unroll
                    for (int g = 1; g < G; ++g) own = lane == g ? dot[g] : own;
                    if (lane < G) {
                        scores[((i64)pid * room + at) * G + lane] = own;
                        if (!FIXED) {
                            float logit = (own - square * norms_of_q[lane] - 0x1p-60f) * scale;
                            float position = (logit - origins[lane]) * STEPS - (fabsf(logit) + fabsf(origins[lane])) * (0x1p-20f * STEPS);
                            position = floorf(position) - (float)cuts[(pid * G + lane) * 2];
                            if (position >= 0.0f)
                                atomicAdd(&rank_hist[(pid * G + lane) * RANK_BINS + (int)fminf(position, RANK_BINS - 1.0f)], 1);
                        }
                    }
                }
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) number = 0;
        __syncthreads();
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        mass[g] = sum_lanes<32>(mass[g]);
        if (threadIdx.x % 32 == 0 && mass[g] > 0.0f) atomicAdd(&below[pid * G + g], mass[g]);
    }
    for (int m = 16; m; m /= 2) spread = fmaxf(spread, __shfl_xor_sync(FULL, spread, m));
    if (threadIdx.x % 32 == 0 && spread > 0.0f) atomicMax(mine + SPREAD, __float_as_int(spread));
    if (FIXED) return;

    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) finished = atomicAdd(mine + RANKED, 1) == (int)gridDim.y - 1;
    __syncthreads();
    if (!finished) return;
    __threadfence();
    const bool overflow = __ldcg(mine + LISTED) > room;
    const i64 wanted = ((i64)length * share - tolerance + ((1ll << 40) - 1)) >> 40;
    const int need = wanted > count ? (int)wanted : count;
    for (int g = threadIdx.x / 32; g < G; g += THREADS / 32) {
        const int id = pid * G + g, l = threadIdx.x % 32;
        const int4* bins = (const int4*)(rank_hist + id * RANK_BINS) + l * (RANK_BINS / 128);
        int own = 0;
#pragma unroll 8
        for (int i = 0; i < RANK_BINS / 128; ++i) {
            int4 n = __ldcg(bins + i);
            own += n.x + n.y + n.z + n.w;
        }
        int from = own;
        _Pragma("unroll 1") for (int m = 1; m < 32; m *= 2) { int y = __shfl_down_sync(FULL, from, m); if (l + m < 32) from += y; }
        u32 enough = __ballot_sync(FULL, from >= need);
        float best = -INFINITE;
        if (enough) {
            const int at = 31 - __clz(enough);
            const int rest = need - (__shfl_sync(FULL, from, at) - __shfl_sync(FULL, own, at));
            int4 n = __ldcg((const int4*)(rank_hist + id * RANK_BINS + at * (RANK_BINS / 32)) + l);
            const int four = n.x + n.y + n.z + n.w;
            int up = four;
            _Pragma("unroll 1") for (int m = 1; m < 32; m *= 2) { int y = __shfl_down_sync(FULL, up, m); if (l + m < 32) up += y; }
            const int in = 31 - __clz(__ballot_sync(FULL, up >= rest));
            int left = rest - (up - four), bin = 0;  // of this lane's four bins
            if (n.w >= left) bin = 3;
            else if (n.w + n.z >= left) bin = 2;
            else if (n.w + n.z + n.y >= left) bin = 1;
            bin = __shfl_sync(FULL, bin, in);
            best = (low[id] + (cuts[id * 2] + at * (RANK_BINS / 32) + in * 4 + bin) / STEPS) / scale;
            best -= fabsf(best) * 0x1p-20f;
        }
        if (l == 0) tau[id] = overflow ? -INFINITE : fmaxf(best, tau[id]);
    }
}
