// Retrieval: this step's cuts, and a list of the keys that reach that of some head of their group; the twin of list_kernel. Every CTA reads
// the cuts off the scan's histograms: to do so again costs less than to wait for the CTA of the scan that does it last. A thread reads two
// keys of every head; a CTA gathers what it found before it asks for room in the list once. Keys that are listed are asked for into the
// L2, where the next kernel finds them. Macros: D, G, L, CHUNK (steps whose codes are asked for at once), TURNS, WARM (1: keys, 3: values
// too, 0: neither), PAGED, BF16, and those of cuts.cuh.
#define THREADS 256
#define POWER 11819                     // 2^23 log2(e) / STEPS, rounded up
#define LEAST 823309153                 // bits of e^-BELOW by the same rule: 2^23 (127 - 20 log2(e)), rounded up
#define STEP (2 * THREADS / L)          // blocks read at once

extern "C" __global__ void __launch_bounds__(THREADS, G <= 4 ? 4 : 2) list_keys(
    const u16* upper, const float* __restrict__ value_spread, const int* __restrict__ num_blocks, const int* __restrict__ kv_start,
    const int* __restrict__ kv_len, const int* hist, const int* floor_code, const float* low, int* __restrict__ cuts,
    float* __restrict__ tau, int* __restrict__ listed, int* counters, float* below, const u16* __restrict__ k, const u16* __restrict__ v,
    const int* __restrict__ table, i64 k_page, i64 k_head, i64 k_token, i64 v_page, i64 v_head, i64 v_token, i64 table_stride,
    int page_len, int num_kv_heads, int capacity, int room, float scale, i64 share, i64 tolerance, int count, float fixed_tau, float unread_mass) {
    __shared__ int own[G][2];
    __shared__ float own_tau[G];
    __shared__ union { int bins[G][BINS + 32], found[2 * THREADS * CHUNK * TURNS]; } s;
    __shared__ int number, base;
    __shared__ float masses[THREADS / 32][G + 1];
    const int pid = blockIdx.x, row = pid / num_kv_heads, blocks = num_blocks[row], pair = threadIdx.x % (L / 2);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int* mine = counters + pid * COUNTERS;
    const int length = kv_len[row] - kv_start[row];
    float mass[G], spread = 0.0f;
    auto block_of = [&](int turn, int step) { return ((blockIdx.y * TURNS + turn) * CHUNK + step) * STEP + threadIdx.x / (L / 2); };
    const Place keys = {k, k_page, k_head, k_token, table, table_stride, page_len};
    const Place values = {v, v_page, v_head, v_token, table, table_stride, page_len};
    const int start = kv_start[row];
    if (threadIdx.x == 0) number = 0;
    awaited();
    u32 codes[CHUNK][G], following[CHUNK][G];
    auto ask = [&](int turn, u32 (&to)[CHUNK][G]) {  // the codes of a turn are on their way while another is sorted, or the cuts are made
#pragma unroll
        for (int step = 0; step < CHUNK; ++step) {
            const int block = block_of(turn, step);
            const i64 at = (i64)pid * capacity + block;
#pragma unroll
            for (int g = 0; g < G; ++g) to[step][g] = block < blocks ? ((const u32*)(upper + (at * G + g) * L))[pair] : 0x80008000u;
            if (block < blocks && pair == 0) spread = fmaxf(spread, value_spread[at]);
        }
    };
    static_assert(G <= THREADS / 32, "a warp per head");
    const int base_code = warp < G ? floor_code[pid * G + warp] : 0;
    const float origin = warp < G ? low[pid * G + warp] : 0.0f;
    int4 some[BIN_PIECES(THREADS)];
    read_bins<THREADS>(hist + pid * G * BINS, some);
    ask(0, codes);
    const Rule rule = {share, tolerance, count, fixed_tau, unread_mass};
    pad_bins<THREADS>(some, s.bins);
    __syncthreads();
    if (warp < G) {
        make_cuts(s.bins[warp], base_code, origin, 0.0f, 0.0f, length, scale, rule, own[warp], own_tau + warp);
        if (blockIdx.y == 0 && lane == 0) {
            const int id = pid * G + warp;
            cuts[id * 2] = own[warp][0], cuts[id * 2 + 1] = own[warp][1], tau[id] = own_tau[warp];
        }
    }
    __syncthreads();                       // the bins make room for what is found
    int cut[G];
#pragma unroll
    for (int g = 0; g < G; ++g) { cut[g] = own[g][0]; mass[g] = 0.0f; }
#pragma unroll 1
    for (int turn = 0; turn < TURNS; ++turn) {  // no barrier in here
        if (turn + 1 < TURNS) ask(turn + 1, following);
#pragma unroll
        for (int step = 0; step < CHUNK; ++step) {
            const int block = block_of(turn, step);
            const bool inside = block < blocks;
            bool first = false, second = false;
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const int c0 = (int)(codes[step][g] & 0xffff) ^ SIGNED, c1 = (int)(codes[step][g] >> 16) ^ SIGNED;
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
                if (first) s.found[place] = token | (((codes[step][0] & 0xffff) ^ SIGNED) == ALWAYS ? DECIDED : 0);
                if (second) s.found[place + first] = (token + 1) | (((codes[step][0] >> 16) ^ SIGNED) == ALWAYS ? DECIDED : 0);
            }
        }
#pragma unroll
        for (int step = 0; step < CHUNK; ++step)
#pragma unroll
            for (int g = 0; g < G; ++g) codes[step][g] = following[step][g];
    }
    let_next_start();
    __syncthreads();
    const int n = number;
    if (n && threadIdx.x == 0) base = atomicAdd(mine + LISTED, n);
    if (WARM)
        for (int i = threadIdx.x; i < n * WARM_PIECES; i += THREADS) {
            const int token = start + (s.found[i / WARM_PIECES] & (DECIDED - 1)), piece = i % WARM_PIECES * (D / WARM_PIECES);
            if (WARM & 1) warm(keys.at(row, pid % num_kv_heads, token) + piece);
            if (WARM & 2) warm(values.at(row, pid % num_kv_heads, token) + piece);
        }
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
        if (base + i < room) listed[(i64)pid * room + base + i] = s.found[i];
}
