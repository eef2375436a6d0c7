// Exact attention over the list, split over CTAs, in float32; the twin of exact_kernel, with the same sums. A CTA takes CHUNK entries:
// their scores (select.cu left them; otherwise LANES lanes compute one), their weights, then their values, 16 bytes a lane.
// Where the list overflowed, every token of the row is attended. Macros: D, G, L, BF16, PAGED, DROP.
#define THREADS 256
#define CHUNK 256
#define GROUPS (THREADS / LANES)
#define WARPS (THREADS / 32)

extern "C" __global__ void __launch_bounds__(THREADS) attend(
    const float* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v, const int* __restrict__ table, i64 k_page,
    i64 k_head, i64 k_token, i64 v_page, i64 v_head, i64 v_token, i64 table_stride, int page_len,
    const int* __restrict__ num_blocks, const int* __restrict__ kv_start, const int* __restrict__ kv_len,
    const float* __restrict__ low, const float* __restrict__ tau, const int* __restrict__ listed,
    const float* __restrict__ scores, const float* __restrict__ norms, int* __restrict__ counters, float* __restrict__ part_out,
    float* __restrict__ part_sums, u8* __restrict__ mask, i64 mask_stride, int num_kv_heads, int room, float scale,
    float slack_share, float weight_slack) {
    __shared__ int tokens[CHUNK];
    __shared__ float weight[CHUNK][G], extra[CHUNK][G];
    __shared__ float peak[G], fade[G], norm[G];
    __shared__ float merged[WARPS][D];
    __shared__ float sums[WARPS][G][6];
    __shared__ int kept_closed;
    const int pid = blockIdx.x, row = pid / num_kv_heads, kv_head = pid % num_kv_heads, warp = threadIdx.x / 32;
    const int start = kv_start[row], length = kv_len[row] - start, closed = num_blocks[row] * L;
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    int* mine = counters + pid * COUNTERS;
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
    float2 acc[G][4];
    float weights[G], floors[G], surplus[G], surplus_value[G], reach[G], rejected[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        weights[g] = floors[g] = surplus[g] = surplus_value[g] = reach[g] = rejected[g] = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[g][j] = make_float2(0.0f, 0.0f);
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
                if (DROP && !(entry & DECIDED) && s + slack < tau[pid * G + g]) {
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
            weights[g] *= f, floors[g] *= f, surplus[g] *= f, surplus_value[g] *= f, reach[g] *= f;
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[g][j].x *= f, acc[g][j].y *= f;
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
        for (int i = group; i < (n + GROUPS - 1) / GROUPS * GROUPS; i += GROUPS) {
            const int entry = i < n ? tokens[i] : -1;
            uint4 value = make_uint4(0, 0, 0, 0);
            if (entry != -1) value = *(const uint4*)(value_place.at(row, kv_head, start + (entry & (DECIDED - 1))) + lane * 8);
            float2 y[4] = {unpack(value.x), unpack(value.y), unpack(value.z), unpack(value.w)};
            float square = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) square += y[j].x * y[j].x + y[j].y * y[j].y;
            square = sqrtf(sum_lanes<LANES>(square)) * 1.00002f;
            if (entry != -1)
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    const float a = weight[i][g];
#pragma unroll
                    for (int j = 0; j < 4; ++j) acc[g][j].x += a * y[j].x, acc[g][j].y += a * y[j].y;
                    if (lane == 0) { reach[g] += a * square; surplus_value[g] += extra[i][g] * square; }
                }
        }
        __syncthreads();
    }
    // Merge the groups of a warp in registers, the warps through shared memory.
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const i64 at = ((i64)pid * G + g) * gridDim.y + blockIdx.y;
        float one[6] = {weights[g], floors[g], surplus_value[g], surplus[g], reach[g], rejected[g]};
#pragma unroll
        for (int j = 0; j < 6; ++j) {
            one[j] = sum_lanes<32>(one[j]);
            if (threadIdx.x % 32 == 0) sums[warp][g][j] = one[j];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float a = acc[g][j].x, b = acc[g][j].y;
#pragma unroll
            for (int m = LANES; m < 32; m *= 2) { a += __shfl_xor_sync(FULL, a, m); b += __shfl_xor_sync(FULL, b, m); }
            if (threadIdx.x % 32 < LANES) { merged[warp][lane * 8 + 2 * j] = a; merged[warp][lane * 8 + 2 * j + 1] = b; }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < D; i += THREADS) {
            float o = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) o += merged[w][i];
            part_out[at * D + i] = o;
        }
        if (threadIdx.x < 6) {
            float o = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) o += sums[w][g][threadIdx.x];
            part_sums[at * 8 + 1 + threadIdx.x] = o;
        }
        if (threadIdx.x == 6) part_sums[at * 8] = peak[g];
        __syncthreads();
    }
    if (DROP && threadIdx.x == 0 && kept_closed) atomicAdd(mine + EXACT, kept_closed);
}
