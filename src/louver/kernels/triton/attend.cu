// Exact attention over the list, split over CTAs, in float32; the twin of exact_kernel, with the same sums. A CTA takes CHUNK entries:
// their scores (select.cu left them; otherwise LANES lanes compute one), their weights, then their values, two channels a thread.
// Sums that bound an error are taken channel by channel: |sum a |v|| is at most sum a |v|, and needs no norm per key.
// Where the list overflowed, every token of the row is attended. Macros: D, G, L, BF16, PAGED, DROP.
#define THREADS 256
#define CHUNK 256
#define GROUPS (THREADS / LANES)
#define WARPS (THREADS / 32)
#define PAIRS (D / 2)
#define SHARES (THREADS / PAIRS)        // keys whose values are read at once

extern "C" __global__ void __launch_bounds__(THREADS) attend(
    const float* q, const u16* __restrict__ k, const u16* __restrict__ v, const int* __restrict__ table, i64 k_page,
    i64 k_head, i64 k_token, i64 v_page, i64 v_head, i64 v_token, i64 table_stride, int page_len,
    const int* __restrict__ num_blocks, const int* __restrict__ kv_start, const int* __restrict__ kv_len,
    const float* low, const float* tau, const int* listed,
    const float* scores, const float* norms, int* __restrict__ counters, float* __restrict__ part_out,
    float* __restrict__ part_sums, u8* __restrict__ mask, i64 mask_stride, int num_kv_heads, int room, float scale,
    float slack_share, float weight_slack) {
    __shared__ int tokens[CHUNK];
    __shared__ float weight[CHUNK][G], extra[CHUNK][G];
    __shared__ float peak[G], fade[G], norm[G];
    __shared__ float2 merged[SHARES][PAIRS];
    __shared__ float sums[4][G][WARPS], squares[PAIRS];
    __shared__ int kept_closed;
    const int pid = blockIdx.x, row = pid / num_kv_heads, kv_head = pid % num_kv_heads, warp = threadIdx.x / 32;
    const int start = kv_start[row], length = kv_len[row] - start, closed = num_blocks[row] * L;
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    int* mine = counters + pid * COUNTERS;
    release_next();
    wait_for_previous();
    const bool overflow = mine[LISTED] > room;
    const int total = overflow ? length : mine[LISTED];
    const int each = (total + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * each, end = min(begin + each, total);
    const Place key_place = {k, k_page, k_head, k_token, table, table_stride, page_len};
    const Place value_place = {v, v_page, v_head, v_token, table, table_stride, page_len};
    if (threadIdx.x < G) peak[threadIdx.x] = -INFINITE;
    if (threadIdx.x == 0) kept_closed = 0;
    for (int g = warp; g < G; g += WARPS) {
        float square = 0.0f;
        for (int i = threadIdx.x % 32; i < D; i += 32) { float y = q[((i64)pid * G + g) * D + i]; square += y * y; }
        square = sqrtf(sum_lanes<32>(square)) * 1.001f;
        if (threadIdx.x % 32 == 0) norm[g] = square;
    }
    const int pair = threadIdx.x % PAIRS, key_share = threadIdx.x / PAIRS;
    float2 out[G], reach[G], surplus_value[G];  // sums of a v, a |v|, extra |v| over this thread's keys, for its two channels
    float weights[G], floors[G], surplus[G], rejected[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        weights[g] = floors[g] = surplus[g] = rejected[g] = 0.0f;
        out[g] = reach[g] = surplus_value[g] = make_float2(0.0f, 0.0f);
    }
    __syncthreads();
    for (int first = begin; first < end; first += CHUNK) {
        const int n = min(CHUNK, end - first);
        // Logits into weight, rounding of the score (in nats) into extra; -inf where a key is rejected.
        if (threadIdx.x < n) tokens[threadIdx.x] = overflow ? first + threadIdx.x : listed[(i64)pid * room + first + threadIdx.x];
        const bool known = DROP && !overflow;
        if (known) {
            if (threadIdx.x < n) {
                const i64 at = (i64)pid * room + first + threadIdx.x;
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    weight[threadIdx.x][g] = scores[at * G + g];
                    extra[threadIdx.x][g] = norms[at] * norm[g] + 0x1p-60f;
                }
            }
        } else {
            __syncthreads();
            float2 x[G][4];
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float4* p = (const float4*)(q + ((i64)pid * G + g) * D + lane * 8);
                float4 a = p[0], b = p[1];
                x[g][0] = make_float2(a.x, a.y), x[g][1] = make_float2(a.z, a.w), x[g][2] = make_float2(b.x, b.y), x[g][3] = make_float2(b.z, b.w);
            }
            for (int i = group; i < (n + GROUPS - 1) / GROUPS * GROUPS; i += GROUPS) {
                const int token = tokens[min(i, n - 1)] & (DECIDED - 1);
                uint4 key = *(const uint4*)(key_place.at(row, kv_head, start + token) + lane * 8);
                float2 y[4] = {unpack(key.x), unpack(key.y), unpack(key.z), unpack(key.w)};
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
                for (int g = 0; g < G; ++g) {
                    dot[g] = sum_lanes<LANES>(dot[g]);
                    if (lane == g && i < n) { weight[i][g] = dot[g]; extra[i][g] = square * norm[g] + 0x1p-60f; }
                }
            }
        }
        __syncthreads();
        if (threadIdx.x < n) {
            const int entry = tokens[threadIdx.x], token = entry & (DECIDED - 1);
            bool any = false;
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float s = weight[threadIdx.x][g], slack = extra[threadIdx.x][g];
                bool keep = true;
                if (known && !(entry & DECIDED) && s + slack < tau[pid * G + g]) {
                    keep = false;
                    rejected[g] += exp2_fast(((s + slack) * scale - low[pid * G + g] + fabsf(s * scale) * 0x1p-20f) * LOG2E) * 1.001f;
                }
                any = any || keep;
                if (mask && keep) mask[(pid * G + g) * mask_stride + start + token] = 1;
                weight[threadIdx.x][g] = keep ? s * scale : -INFINITE;
                extra[threadIdx.x][g] = slack * scale;
            }
            if (DROP && any && token < closed) atomicAdd(&kept_closed, 1);
            if (DROP && !any) tokens[threadIdx.x] = -1;
        }
        __syncthreads();
        for (int g = warp; g < G; g += WARPS) {
            float top = -INFINITE;
            for (int i = threadIdx.x % 32; i < n; i += 32) top = fmaxf(top, weight[i][g]);
            for (int m = 16; m; m /= 2) top = fmaxf(top, __shfl_xor_sync(FULL, top, m));
            if (threadIdx.x % 32 == 0) {
                const float higher = fmaxf(peak[g], top);
                fade[g] = peak[g] == -INFINITE ? 0.0f : exp2f((peak[g] - higher) * LOG2E);
                peak[g] = higher;
            }
        }
        __syncthreads();
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const float f = fade[g], shift = peak[g] == -INFINITE ? 0.0f : peak[g];
            weights[g] *= f, floors[g] *= f, surplus[g] *= f;
            out[g].x *= f, out[g].y *= f, reach[g].x *= f, reach[g].y *= f, surplus_value[g].x *= f, surplus_value[g].y *= f;
            if (threadIdx.x < n) {
                const float logit = weight[threadIdx.x][g];
                const bool kept = logit > -INFINITE || logit != logit;
                const float a = kept ? exp2f((logit - shift) * LOG2E) : 0.0f;
                const float off = extra[threadIdx.x][g] + weight_slack + (fabsf(logit) + fabsf(shift)) * 0x1p-22f;
                const float grow = kept ? exp2f(off * LOG2E) : 1.0f;
                const float more = kept ? a * (grow - 1.0f) + 0x1p-120f : 0.0f;
                weights[g] += a;
                floors[g] += a / grow;
                surplus[g] += more;
                weight[threadIdx.x][g] = a;
                extra[threadIdx.x][g] = more;
            }
        }
        __syncthreads();
#pragma unroll 4
        for (int i = key_share; i < n; i += SHARES) {
            const int entry = tokens[i];
            u32 value = 0;
            if (entry != -1) value = *(const u32*)(value_place.at(row, kv_head, start + (entry & (DECIDED - 1))) + 2 * pair);
            const float2 y = unpack(value);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float a = weight[i][g], more = extra[i][g];
                if (entry == -1) continue;
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
            one[j] = sum_lanes<32>(one[j]);
            if (threadIdx.x % 32 == 0) sums[j][g][warp] = one[j];
        }
    }
#pragma unroll 1
    for (int what = 0; what < 3 * G; ++what) {  // merge the keys of all threads, one vector at a time
        const int g = what / 3;
        float2 x = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int h = 0; h < G; ++h)
            if (h == g) x = what % 3 == 0 ? out[h] : what % 3 == 1 ? surplus_value[h] : reach[h];
        merged[key_share][pair] = x;
        __syncthreads();
        const i64 at = ((i64)pid * G + g) * gridDim.y + blockIdx.y;
        if (threadIdx.x < PAIRS) {
            for (int i = 1; i < SHARES; ++i) x.x += merged[i][pair].x, x.y += merged[i][pair].y;
            if (what % 3 == 0) ((float2*)(part_out + at * D))[pair] = x;
            squares[pair] = x.x * x.x + x.y * x.y;
        }
        __syncthreads();
        if (warp == 0) {
            float square = 0.0f;
            for (int i = threadIdx.x; i < PAIRS; i += 32) square += squares[i];
            square = sqrtf(sum_lanes<32>(square)) * 1.0001f;
            if (threadIdx.x == 0 && what % 3) part_sums[at * 8 + (what % 3 == 1 ? 3 : 5)] = square;
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
    if (DROP && threadIdx.x == 0 && kept_closed) atomicAdd(mine + EXACT, kept_closed);
}
