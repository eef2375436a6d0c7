// Exact attention over the list of a ranked retrieval, in float32; the twin of exact_kernel there, with the same sums. A thread takes an
// entry: its scores (rank_kernel left them) against the final tau; what is kept is packed, so that only kept values are read, two
// channels a thread. Where the list overflowed, every token of the row is scored here and attended. Sums that bound an error are taken
// channel by channel: |sum a |v|| is at most sum a |v|, and needs no norm per key. Macros: D, G, L, BF16, PAGED.
#define THREADS 256
#define WARPS (THREADS / 32)
#define PAIRS (D / 2)
#define SHARES (THREADS / PAIRS)        // keys whose values are read at once
#define BATCH (D <= 128 ? (G < 4 ? G : 4) : (G < 2 ? G : 2))  // heads merged at once, by shared memory
#define PER_LANE (D / 64)               // pairs of channels of a key a lane holds, where a warp scores it

__device__ __forceinline__ float2 unpack(u32 x) {  // two stored elements
#if BF16
    return make_float2(__int_as_float(x << 16), __int_as_float(x & 0xffff0000u));
#else
    return make_float2(low_half(x), high_half(x));
#endif
}

struct Place {  // where a cache's tokens lie: strides in elements, pages through a table
    const u16* data;
    i64 page, head, token;
    const int* table;
    i64 table_stride;
    int page_len;
    __device__ __forceinline__ const u16* at(int row, int kv_head, int position) const {
#if PAGED
        i64 p = table[row * table_stride + position / page_len];
        return data + p * page + kv_head * head + (i64)(position % page_len) * token;
#else
        return data + row * page + kv_head * head + (i64)position * token;
#endif
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, G <= 4 ? 3 : 1) attend(
    const float* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v, const int* __restrict__ table, i64 k_page,
    i64 k_head, i64 k_token, i64 v_page, i64 v_head, i64 v_token, i64 table_stride, int page_len,
    const int* __restrict__ num_blocks, const int* __restrict__ kv_start, const int* __restrict__ kv_len,
    const float* __restrict__ low, const float* __restrict__ tau, const int* __restrict__ listed,
    const float* __restrict__ scores, const float* __restrict__ slacks, int* __restrict__ counters, float* __restrict__ part_out,
    float* __restrict__ part_sums, u8* __restrict__ mask, i64 mask_stride, int num_kv_heads, int room, int scored, float scale,
    float slack_share, float weight_slack) {
    __shared__ int tokens[THREADS];                   // kept ones, packed
    __shared__ float weight[G][THREADS], extra[G][THREADS];
    __shared__ float tops[G][WARPS], peak[G];
    __shared__ float2 merged[3 * BATCH][SHARES][PAIRS];
    __shared__ float sums[4][G][WARPS], squares[3 * BATCH];
    __shared__ int number, kept_closed;
    const int pid = blockIdx.x, row = pid / num_kv_heads, kv_head = pid % num_kv_heads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int start = kv_start[row], length = kv_len[row] - start, closed = num_blocks[row] * L;
    const int pair = threadIdx.x % PAIRS, share = threadIdx.x / PAIRS;
    const int num_listed = counters[pid * COUNTERS + LISTED];
    const int total = num_listed + length - closed;
    const bool dense = num_listed > room || total > scored;
    const int count = dense ? length : total;
    const int each = (count + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * each, end = min(begin + each, count);
    const Place keys = {k, k_page, k_head, k_token, table, table_stride, page_len};
    const Place values = {v, v_page, v_head, v_token, table, table_stride, page_len};
    float2 out[G], reach[G], surplus_value[G];  // sums of a v, a |v|, extra |v| over this thread's keys, for its two channels
    float weights[G], floors[G], surplus[G], rejected[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        weights[g] = floors[g] = surplus[g] = rejected[g] = 0.0f;
        out[g] = reach[g] = surplus_value[g] = make_float2(0.0f, 0.0f);
    }
    if (threadIdx.x < G) peak[threadIdx.x] = -INFINITE;
    if (threadIdx.x == 0) kept_closed = 0;
    for (int first = begin; first < end; first += THREADS) {
        const int n = min(THREADS, end - first), i = first + threadIdx.x;
        if (threadIdx.x == 0) number = 0;
        __syncthreads();
        if (dense) {  // a warp scores a key; products of absolute values bound the rounding
            for (int j = warp; j < n; j += WARPS) {
                const u32* key = (const u32*)keys.at(row, kv_head, start + first + j);
                float2 y[PER_LANE];
#pragma unroll
                for (int c = 0; c < PER_LANE; ++c) y[c] = unpack(key[lane + 32 * c]);
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    const float2* x = (const float2*)(q + ((i64)pid * G + g) * D);
                    float dot = 0.0f, size = 0.0f;
#pragma unroll
                    for (int c = 0; c < PER_LANE; ++c) {
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
            int entry = DECIDED;
            token = i;
            if (!dense) {
                entry = i < num_listed ? listed[(i64)pid * room + i] : (closed + i - num_listed) | DECIDED;
                token = entry & (DECIDED - 1);
            }
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const i64 at = ((i64)pid * scored + i) * G + g;
                const float s = dense ? weight[g][threadIdx.x] : scores[at];
                const float slack = dense ? extra[g][threadIdx.x] : slacks[at];
                const bool keep = (entry & DECIDED) || !(s + slack < tau[pid * G + g]);
                if (!keep)
                    rejected[g] += exp2_fast(((s + slack) * scale - low[pid * G + g] + fabsf(s * scale) * 0x1p-20f) * LOG2E) * 1.001f;
                if (mask && keep) mask[(pid * G + g) * mask_stride + start + token] = 1;
                any = any || keep;
                logit[g] = keep ? s * scale : -INFINITE;
                off[g] = slack * scale;
            }
            if (any && token < closed) atomicAdd(&kept_closed, 1);
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
            float top = threadIdx.x < n ? logit[g] : -INFINITE;
            for (int m = 16; m; m /= 2) top = fmaxf(top, __shfl_xor_sync(FULL, top, m));
            if (lane == 0) tops[g][warp] = top;
        }
        int place = 0;
        if (any) place = atomicAdd(&number, 1);
        __syncthreads();  // dense: everyone has read weight and extra, too
        if (any) tokens[place] = token;
#pragma unroll
        for (int g = 0; g < G; ++g) {
            float higher = peak[g];
#pragma unroll
            for (int w = 0; w < WARPS; ++w) higher = fmaxf(higher, tops[g][w]);
            const float shift = higher == -INFINITE ? 0.0f : higher, fade = exp2f((peak[g] - shift) * LOG2E);
            weights[g] *= fade, floors[g] *= fade, surplus[g] *= fade;
            out[g].x *= fade, out[g].y *= fade, reach[g].x *= fade, reach[g].y *= fade;
            surplus_value[g].x *= fade, surplus_value[g].y *= fade;
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
#pragma unroll 8
        for (int j = share; j < kept; j += SHARES) {
            const float2 y = unpack(((const u32*)values.at(row, kv_head, start + tokens[j]))[pair]);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float a = weight[g][j], more = extra[g][j];
                out[g].x += a * y.x, out[g].y += a * y.y;
                reach[g].x += a * fabsf(y.x), reach[g].y += a * fabsf(y.y);
                surplus_value[g].x += more * fabsf(y.x), surplus_value[g].y += more * fabsf(y.y);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        float one[4] = {weights[g], floors[g], surplus[g], rejected[g]};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            for (int m = 16; m; m /= 2) one[j] += __shfl_xor_sync(FULL, one[j], m);
            if (lane == 0) sums[j][g][warp] = one[j];
        }
    }
    // Merge the keys of all threads, some heads at a time.
#pragma unroll
    for (int first = 0; first < G; first += BATCH) {
        if (threadIdx.x < 3 * BATCH) squares[threadIdx.x] = 0.0f;
#pragma unroll
        for (int g = first; g < G && g < first + BATCH; ++g) {
            merged[3 * (g - first)][share][pair] = out[g];
            merged[3 * (g - first) + 1][share][pair] = surplus_value[g];
            merged[3 * (g - first) + 2][share][pair] = reach[g];
        }
        __syncthreads();
        const int vectors = 3 * min(BATCH, G - first);
        for (int i = threadIdx.x; i < vectors * PAIRS; i += THREADS) {  // a warp stays within a vector
            const int what = i / PAIRS, p = i % PAIRS;
            float2 x = merged[what][0][p];
#pragma unroll
            for (int j = 1; j < SHARES; ++j) x.x += merged[what][j][p].x, x.y += merged[what][j][p].y;
            const i64 at = ((i64)pid * G + first + what / 3) * gridDim.y + blockIdx.y;
            if (what % 3 == 0) ((float2*)(part_out + at * D))[p] = x;
            float square = x.x * x.x + x.y * x.y;
            for (int m = 16; m; m /= 2) square += __shfl_xor_sync(FULL, square, m);
            if (lane == 0) atomicAdd(&squares[what], square);
        }
        __syncthreads();
        if (threadIdx.x < vectors && threadIdx.x % 3) {
            const i64 at = ((i64)pid * G + first + threadIdx.x / 3) * gridDim.y + blockIdx.y;
            part_sums[at * 8 + (threadIdx.x % 3 == 1 ? 3 : 5)] = sqrtf(squares[threadIdx.x]) * 1.0001f;
        }
        __syncthreads();
    }
    if (threadIdx.x < 4 * G) {
        const int g = threadIdx.x / 4, j = threadIdx.x % 4;
        float o = 0.0f;
        for (int w = 0; w < WARPS; ++w) o += sums[j][g][w];
        float* to = part_sums + (((i64)pid * G + g) * gridDim.y + blockIdx.y) * 8;
        to[j == 0 ? 1 : j == 1 ? 2 : j == 2 ? 4 : 6] = o;
        if (j == 0) to[0] = peak[g];
    }
    if (threadIdx.x == 0 && kept_closed) atomicAdd(counters + pid * COUNTERS + EXACT, kept_closed);
}
