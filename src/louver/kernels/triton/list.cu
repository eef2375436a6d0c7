// Retrieval: list the keys that reach the cut of some head of their group; the twin of list_kernel. A thread reads two keys of every
// head; a CTA gathers what it found before it asks for room in the list once. Macros: D, G, L, STEPS_EACH.
#define THREADS 256
#define POWER 11819                     // 2^23 log2(e) / STEPS, rounded up
#define LEAST 823309153                 // bits of e^-BELOW by the same rule: 2^23 (127 - 20 log2(e)), rounded up
#define STEP (2 * THREADS / L)          // blocks read at once

extern "C" __global__ void __launch_bounds__(THREADS) list_keys(
    const u16* upper, const float* __restrict__ value_spread, const int* __restrict__ num_blocks, const int* cuts,
    int* __restrict__ listed, int* counters, float* below, int num_kv_heads, int capacity, int room) {
    __shared__ int found[2 * THREADS * STEPS_EACH];
    __shared__ int number, base;
    __shared__ float masses[THREADS / 32][G + 1];
    const int pid = blockIdx.x, row = pid / num_kv_heads, blocks = num_blocks[row], pair = threadIdx.x % (L / 2);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int* mine = counters + pid * COUNTERS;
    int cut[G];
    float mass[G], spread = 0.0f;
    awaited();
#pragma unroll
    for (int g = 0; g < G; ++g) { cut[g] = cuts[(pid * G + g) * 2]; mass[g] = 0.0f; }
    if (threadIdx.x == 0) number = 0;
    __syncthreads();
#pragma unroll
    for (int step = 0; step < STEPS_EACH; ++step) {  // no barrier in here: the loads of all steps are under way at once
        const int block = (blockIdx.y * STEPS_EACH + step) * STEP + threadIdx.x / (L / 2);
        const i64 at = (i64)pid * capacity + block;
        const bool inside = block < blocks;
        u32 codes[G];
#pragma unroll
        for (int g = 0; g < G; ++g) codes[g] = inside ? ((const u32*)(upper + (at * G + g) * L))[pair] : 0x80008000u;
        if (inside && pair == 0) spread = fmaxf(spread, value_spread[at]);
        bool first = false, second = false;
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const int c0 = (int)(codes[g] & 0xffff) ^ SIGNED, c1 = (int)(codes[g] >> 16) ^ SIGNED;
            first = first || c0 >= cut[g], second = second || c1 >= cut[g];
            // A ceiling of e^(c / STEPS - BELOW) in one multiplication: 2^f <= 1 + f between powers of two.
            const float m0 = __int_as_float(c0 * POWER + LEAST), m1 = __int_as_float(c1 * POWER + LEAST);
            mass[g] += inside ? (c0 >= cut[g] ? 0.0f : m0) + (c1 >= cut[g] ? 0.0f : m1) : 0.0f;
        }
        first = first && inside, second = second && inside;
        const u32 some = __ballot_sync(FULL, first), others = __ballot_sync(FULL, second), under = (1u << lane) - 1;
        if (some | others) {
            int place = 0;
            if (lane == 0) place = atomicAdd(&number, __popc(some) + __popc(others));
            place = __shfl_sync(FULL, place, 0) + __popc(some & under) + __popc(others & under);
            const int token = block * L + 2 * pair;
            if (first) found[place] = token | (((codes[0] & 0xffff) ^ SIGNED) == ALWAYS ? DECIDED : 0);
            if (second) found[place + first] = (token + 1) | (((codes[0] >> 16) ^ SIGNED) == ALWAYS ? DECIDED : 0);
        }
    }
    let_next_start();
    __syncthreads();
    const int n = number;
    if (n && threadIdx.x == 0) base = atomicAdd(mine + LISTED, n);
#pragma unroll
    for (int g = 0; g <= G; ++g) {
        float x = g < G ? mass[g < G ? g : 0] : spread;
        for (int m = 16; m; m /= 2) { float y = __shfl_xor_sync(FULL, x, m); x = g < G ? x + y : fmaxf(x, y); }
        if (lane == 0) masses[warp][g] = x;
    }
    __syncthreads();
    if (threadIdx.x <= G) {
        float x = 0.0f;
        for (int w = 0; w < THREADS / 32; ++w) x = threadIdx.x < G ? x + masses[w][threadIdx.x] : fmaxf(x, masses[w][threadIdx.x]);
        if (threadIdx.x < G && x > 0.0f) atomicAdd(&below[pid * G + threadIdx.x], x);
        if (threadIdx.x == G && x > 0.0f) atomicMax(mine + SPREAD, __float_as_int(x));
    }
    for (int i = threadIdx.x; i < n; i += THREADS)
        if (base + i < room) listed[(i64)pid * room + base + i] = found[i];
}
