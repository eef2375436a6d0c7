// The start of a step, a CTA per query head: place its grid, and clear what the other kernels count into; the twin of prepare_kernel.
// floor_code: the code `spare` nats under the floor_share-th share of the sampled centers from the top; bounds below are not counted;
// 0 = count all.
// Of a retrieval the levels begin SUNK levels below; of one with a fixed tau, below that and the best center.
// Macros: D, G, DROP, FIXED, RANKS, Q (type of the query: 0 float32, 1 float16, 2 bfloat16).
#define THREADS 128
#define SAMPLE 32                       // blocks whose centers place the grid
#define EACH (SAMPLE * 32 / THREADS)    // of them a warp reads

extern "C" __global__ void __launch_bounds__(THREADS) prepare(
    const void* __restrict__ q, const u16* __restrict__ channels, const u8* __restrict__ scale_codes, const int* __restrict__ num_blocks, float* __restrict__ low,
    int* __restrict__ floor_code, float* __restrict__ query, int* __restrict__ hist, int* __restrict__ rank_hist,
    int* __restrict__ counters, float* __restrict__ masses, float* __restrict__ below,
    int num_kv_heads, int capacity, float scale, float floor_share, float spare, float fixed_tau) {
    __shared__ float logits[SAMPLE];
    const int id = blockIdx.x, pid = id / G, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int blocks = num_blocks[pid / num_kv_heads], taken = min(blocks, SAMPLE);
    float2 x[D / 64];
#pragma unroll
    for (int h = 0; h < D / 64; ++h) {
        const i64 at = (i64)id * D + 2 * (lane + 32 * h);
        x[h] = make_float2(query_at(q, at), query_at(q, at + 1));
    }
    u32 sampled[EACH][D / 64], widest[EACH];    // all on their way at once
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const int i = warp * EACH + j, at = i >= taken ? 0 : blocks < SAMPLE ? i : (int)((u32)i * (u32)blocks / SAMPLE);
        const u32* z = (const u32*)(channels + ((i64)pid * capacity + at) * D) + lane;
        widest[j] = scale_codes[(i64)pid * capacity + at];
#pragma unroll
        for (int h = 0; h < D / 64; ++h) sampled[j][h] = z[32 * h];
    }
    let_next_start();                   // the scan asks for its first codes meanwhile: megabytes, behind what was asked for here
    if (warp == 0)
#pragma unroll
        for (int h = 0; h < D / 64; ++h) ((float2*)(query + (i64)id * D))[lane + 32 * h] = x[h];
    float dot[EACH];
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        dot[j] = 0.0f;
        // A channel is 64 centers and what its scale is finer, in eighths of an octave; the grid may lie anywhere: exp2 is good enough.
        const float top = (__uint_as_float(widest[j] | 0x4b000000u) - 8388608.0f) * 0.125f + (1048576.0f - 18.0f - 7.0f);
        auto center_of = [&](u32 x) {
            const float center = __uint_as_float((x & 0xffc0u ^ 0x8000u) | 0x4b000000u) - CENTER_ZERO;
            return center * exp2_fast(fmaf(__uint_as_float(x & 63u | 0x4b000000u), -0.125f, top));
        };
#pragma unroll
        for (int h = 0; h < D / 64; ++h) dot[j] += x[h].x * center_of(sampled[j][h]) + x[h].y * center_of(sampled[j][h] >> 16);
    }
    const float sum = sum_apart<EACH, 32>(dot, lane);
    if (lane % (32 / EACH) == 0) logits[warp * EACH + lane / (32 / EACH)] = sum * scale;
    int4* counted = (int4*)(hist + id * BINS);
#pragma unroll
    for (int i = threadIdx.x; i < BINS / 4; i += THREADS) counted[i] = make_int4(0, 0, 0, 0);
    int4* ranks = (int4*)(rank_hist + id * RANK_BINS);
    if (RANKS)
#pragma unroll
        for (int i = 0; i < RANK_BINS / 4; i += THREADS) ranks[i + threadIdx.x] = make_int4(0, 0, 0, 0);
    if (id % G == 0 && threadIdx.x < COUNTERS) counters[pid * COUNTERS + threadIdx.x] = 0;
    if (threadIdx.x < 2) masses[2 * id + threadIdx.x] = 0.0f;
    if (threadIdx.x == 2) below[id] = 0.0f;
    __syncthreads();
    if (warp) return;
    const float logit = lane < taken ? logits[lane] : 0.0f;
    const float mean = sum_lanes<32>(logit) / (float)max(taken, 1);
    int higher = 0;
#pragma unroll 8
    for (int i = 0; i < SAMPLE; ++i) higher += i < taken && logits[i] > logit;
    float floor = lane < taken && higher >= (int)(taken * floor_share) ? logit : -INFINITE;
    if (FIXED) floor = lane < taken ? logit : -INFINITE;
    for (int m = 16; m; m /= 2) floor = fmaxf(floor, __shfl_xor_sync(FULL, floor, m));
    if (FIXED) floor = fminf(floor, fixed_tau * scale);
    float begin = (floor - mean + BELOW - spare) * STEPS;
    if (DROP) begin -= SUNK * LEVEL + (FIXED ? 2.0f : 0.0f);    // or the level of a fixed tau might be one too few
    // A bound past the grid's end may be anything, so it has to have the level above all that a cut asks for: begin + 242.5 LEVEL <= SPAN.
    const float place = fminf(fmaxf(begin, 0.0f), DROP ? 49000.0f : 60000.0f);
    if (lane == 0) {
        low[id] = mean - BELOW;
        floor_code[id] = (DROP || floor_share > 0.0f) && place == place ? (int)place : 0;
    }
}
