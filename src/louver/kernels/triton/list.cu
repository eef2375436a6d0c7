// Retrieval: list the keys that reach the cut of some head of their group; the twin of list_kernel. A thread reads two keys of every
// head; a CTA gathers what it found before it asks for room in the list once. Macros: D, G, L, STEPS_EACH.
#define THREADS 256
#define STEP (2 * THREADS / L)          // blocks read at once

extern "C" __global__ void __launch_bounds__(THREADS) list_keys(
    const u16* __restrict__ upper, const float* __restrict__ value_spread, const int* __restrict__ num_blocks,
    const int* __restrict__ cuts, int* __restrict__ listed, int* __restrict__ counters, float* __restrict__ below,
    int num_kv_heads, int capacity, int room) {
    __shared__ int found[2 * THREADS * STEPS_EACH];
    __shared__ int number, base;
    __shared__ float masses[THREADS / 32][G + 1];
    const int pid = blockIdx.x, blocks = num_blocks[pid / num_kv_heads], pair = threadIdx.x % (L / 2);
    int* mine = counters + pid * COUNTERS;
    int cut[G];
    float mass[G], spread = 0.0f;
#pragma unroll
    for (int g = 0; g < G; ++g) { cut[g] = cuts[(pid * G + g) * 2]; mass[g] = 0.0f; }
    if (threadIdx.x == 0) number = 0;
    __syncthreads();
#pragma unroll
    for (int step = 0; step < STEPS_EACH; ++step) {  // no barrier in here: the loads of all steps are under way at once
        const int block = (blockIdx.y * STEPS_EACH + step) * STEP + threadIdx.x / (L / 2);
        if (block < blocks) {
            const i64 at = (i64)pid * capacity + block;
            u32 codes[G];
#pragma unroll
            for (int g = 0; g < G; ++g) codes[g] = ((const u32*)(upper + (at * G + g) * L))[pair];
            if (pair == 0) spread = fmaxf(spread, value_spread[at]);
            bool first = false, second = false;
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const int c0 = (int)(codes[g] & 0xffff) ^ SIGNED, c1 = (int)(codes[g] >> 16) ^ SIGNED;
                if (c0 >= cut[g]) first = true; else mass[g] += exp2_fast(c0 * (LOG2E / STEPS) - BELOW * LOG2E);
                if (c1 >= cut[g]) second = true; else mass[g] += exp2_fast(c1 * (LOG2E / STEPS) - BELOW * LOG2E);
            }
            const int token = block * L + 2 * pair;
            if (first) found[atomicAdd(&number, 1)] = token | (((codes[0] & 0xffff) ^ SIGNED) == ALWAYS ? DECIDED : 0);
            if (second) found[atomicAdd(&number, 1)] = (token + 1) | (((codes[0] >> 16) ^ SIGNED) == ALWAYS ? DECIDED : 0);
        }
    }
    __syncthreads();
    const int n = number;
    if (n) {
        if (threadIdx.x == 0) base = atomicAdd(mine + LISTED, n);
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += THREADS)
            if (base + i < room) listed[(i64)pid * room + base + i] = found[i];
    }
#pragma unroll
    for (int g = 0; g <= G; ++g) {
        float x = g < G ? mass[g < G ? g : 0] : spread;
        for (int m = 16; m; m /= 2) { float y = __shfl_xor_sync(FULL, x, m); x = g < G ? x + y : fmaxf(x, y); }
        if (threadIdx.x % 32 == 0) masses[threadIdx.x / 32][g] = x;
    }
    __syncthreads();
    if (threadIdx.x <= G) {
        float x = 0.0f;
        for (int w = 0; w < THREADS / 32; ++w) x = threadIdx.x < G ? x + masses[w][threadIdx.x] : fmaxf(x, masses[w][threadIdx.x]);
        if (threadIdx.x < G && x > 0.0f) atomicAdd(&below[pid * G + threadIdx.x], x);
        if (threadIdx.x == G && x > 0.0f) atomicMax(mine + SPREAD, __float_as_int(x));
    }
}
