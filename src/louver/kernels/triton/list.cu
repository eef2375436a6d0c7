// Retrieval: this step's cuts, and a list of the keys that reach that of some head of their group; the twin of list_kernel, whose codes are
// finer. Every CTA reads the cuts off the scan's histograms: to do so again costs less than to wait for the CTA of the scan that does it
// last. A thread reads 16 keys' levels of every head, and compares and weighs four or two of them by one instruction; a CTA gathers what it
// found before it asks for room in the list once. Keys that are listed are asked for into the L2, where the next kernel finds them.
// Macros: D, G, L, FIXED, KEEP_BEST, TURNS, WARM (1: keys, 3: values too, 0: neither), PAGED, BF16.
#define THREADS 128
#define WARPS (THREADS / 32)
#define KEYS 16                         // of a thread and turn
#define PARTS (L / KEYS)                // threads that share a block
#define HIGH 0x80808080u
#define EACH 0x01010101u

// Of four bytes, the high bits of those that are at least `than`, which is four times the same.
__device__ __forceinline__ u32 reaching(u32 x, u32 than) {
    const u32 t = (x | HIGH) - (than & ~HIGH);
    return ((x & ~than) | (~(x ^ than) & t)) & HIGH;
}
__device__ __forceinline__ u32 whole_bytes(u32 high) {  // from high bits
    u32 r;
    asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(r) : "r"(high));
    return r;
}
__device__ __forceinline__ u32 add_halves(u32 a, u32 b) {
    u32 r;
    asm("add.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
// The level from which a key is listed, by one warp, which holds PER counts a lane; tau: a score that no other key reaches.
__device__ __forceinline__ int cut_level(const int (&counts)[PER], int begin, float origin, int need, float scale, float fixed_tau, float& tau) {
    const int lane = threadIdx.x % 32;
    auto tau_of = [&](int level) {      // keys under it lie at most where the level below ends
        const float bound = (origin + (begin + (level - LOWEST - 1) * LEVEL) / STEPS) / scale;
        return level <= LOWEST ? -INFINITE : bound - fabsf(bound) * 0x1p-20f;
    };
    int level = LOWEST;
    if (!FIXED) {
        int own = 0;
#pragma unroll
        for (int i = 0; i < PER; ++i) own += counts[i];
        int from = own;                 // in this lane's levels and above
        for (int m = 1; m < 32; m *= 2) { const int x = __shfl_down_sync(FULL, from, m); if (lane + m < 32) from += x; }
        const u32 enough = __ballot_sync(FULL, from >= need);
        int rest = from - own, mine = -1;
#pragma unroll
        for (int i = PER - 1; i >= 0; --i) { rest += counts[i]; if (mine < 0 && rest >= need) mine = lane * PER + i; }
        if (enough) level = __shfl_sync(FULL, mine, 31 - __clz(enough));
        tau = tau_of(level);
    } else {
        const float place = fixed_tau * scale, margin = (fabsf(place) + fabsf(origin)) * (0x1p-21f * STEPS);
        const float above = floorf(((place - origin) * STEPS - margin - begin) * (1.0f / LEVEL));
        level = LOWEST + 1 + (int)fminf(fmaxf(above, -1.0f), TOP - LOWEST - 1.0f);
        tau = fixed_tau;
        int best = LOWEST;
#pragma unroll
        for (int i = 0; i < PER; ++i) if (counts[i]) best = lane * PER + i;
        for (int m = 16; m; m /= 2) best = max(best, __shfl_xor_sync(FULL, best, m));
        if (KEEP_BEST && best < level) level = best, tau = tau_of(best);
    }
    return level;
}

extern "C" __global__ void __launch_bounds__(THREADS, G <= 4 ? 8 : 4) list_keys(
    const u8* upper, const float* __restrict__ value_spread, const int* __restrict__ num_blocks, const int* __restrict__ kv_start,
    const int* __restrict__ kv_len, const int* hist, const int* floor_code, const float* low, int* __restrict__ cuts,
    float* __restrict__ tau, int* __restrict__ listed, int* counters, float* below, const u16* __restrict__ k, const u16* __restrict__ v,
    const int* __restrict__ table, i64 k_page, i64 k_head, i64 k_token, i64 v_page, i64 v_head, i64 v_token, i64 table_stride,
    int page_len, int num_kv_heads, int capacity, int room, float scale, i64 share, i64 tolerance, int count, float fixed_tau) {
    __shared__ u32 levels[G];              // four times the cut's
    __shared__ int found[THREADS * KEYS * TURNS];
    __shared__ int number, base;
    __shared__ float masses[WARPS][G + 1];
    const int pid = blockIdx.x, row = pid / num_kv_heads, blocks = num_blocks[row];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = threadIdx.x % PARTS;
    int* mine = counters + pid * COUNTERS;
    const int start = kv_start[row], length = kv_len[row] - start;
    auto block_of = [&](int turn) { return (blockIdx.y * TURNS + turn) * (THREADS / PARTS) + threadIdx.x / PARTS; };
    const Place keys = {k, k_page, k_head, k_token, table, table_stride, page_len};
    const Place values = {v, v_page, v_head, v_token, table, table_stride, page_len};
    float spread = 0.0f;
    if (threadIdx.x == 0) number = 0;
    if (part == 0)
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn)
            if (block_of(turn) < blocks) spread = fmaxf(spread, value_spread[(i64)pid * capacity + block_of(turn)]);
    awaited();
    uint4 levels_now[G], levels_next[G];
    auto ask = [&](int turn, uint4 (&to)[G]) {  // a turn's are on their way while another's are sorted, or the cuts are made
        const int block = block_of(turn);
        const uint4* from = (const uint4*)(upper + ((i64)pid * capacity + block) * G * L) + part;
#pragma unroll
        for (int g = 0; g < G; ++g) to[g] = block < blocks ? __ldcg(from + g * PARTS) : make_uint4(0, 0, 0, 0);
    };
    constexpr int HEADS = (G + WARPS - 1) / WARPS;    // whose cuts a warp makes
    int counts[HEADS][PER], begins[HEADS];
    float origins[HEADS];
#pragma unroll
    for (int i = 0; i < HEADS; ++i) {
        const int id = pid * G + min(warp + i * WARPS, G - 1);
#pragma unroll
        for (int j = 0; j < PER; j += 4) {
            const int4 x = __ldcg((const int4*)(hist + id * BINS + lane * PER + j));
            counts[i][j] = x.x, counts[i][j + 1] = x.y, counts[i][j + 2] = x.z, counts[i][j + 3] = x.w;
        }
        begins[i] = floor_code[id], origins[i] = low[id];
    }
    ask(0, levels_now);
    const int need = needed(length, share, tolerance, count);
#pragma unroll
    for (int i = 0; i < HEADS; ++i) {
        const int g = warp + i * WARPS, id = pid * G + g;
        float own_tau;
        const int level = cut_level(counts[i], begins[i], origins[i], need, scale, fixed_tau, own_tau);
        if (lane || g >= G) continue;
        levels[g] = level * EACH;
        if (blockIdx.y == 0) cuts[id * 2] = max(begins[i] + (int)floorf((level - LOWEST - 1) * LEVEL), 0), tau[id] = own_tau;
    }
    __syncthreads();
    float mass[G];
#pragma unroll
    for (int g = 0; g < G; ++g) mass[g] = 0.0f;
#pragma unroll 1
    for (int turn = 0; turn < TURNS; ++turn) {  // no barrier in here
        if (turn + 1 < TURNS) ask(turn + 1, levels_next);
        u32 some = 0, always = 0;               // a bit per key: of word w's byte j, bit 8 j + w
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            u32 reached = 0;
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const u32 x = w == 0 ? levels_now[g].x : w == 1 ? levels_now[g].y : w == 2 ? levels_now[g].z : levels_now[g].w;
                const u32 high = reaching(x, levels[g]);
                reached |= high;
                if (g == 0) always |= (x & ((x & ~HIGH) + EACH) & HIGH) >> (7 - w);
            }
            some |= reached >> (7 - w);
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {           // a ceiling of each weight: 2^f <= 1 + f between powers of two
            u32 sum = 0;
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const u32 x = w == 0 ? levels_now[g].x : w == 1 ? levels_now[g].y : w == 2 ? levels_now[g].z : levels_now[g].w;
                const u32 under = x & ~whole_bytes(reaching(x, levels[g]));
                sum = add_halves(sum, add_halves(__byte_perm(under, 0, 0x4240) * LEVEL_BITS, __byte_perm(under, 0, 0x4341) * LEVEL_BITS));
            }
            mass[g] += low_half(sum) + high_half(sum);
        }
        const int own = __popc(some);
        if (__any_sync(FULL, own)) {
            int place = own;
            for (int m = 1; m < 32; m *= 2) { const int x = __shfl_up_sync(FULL, place, m); if (lane >= m) place += x; }
            int to = 0;
            if (lane == 31) to = atomicAdd(&number, place);
            place += __shfl_sync(FULL, to, 31) - own;
            for (const int token = block_of(turn) * L + part * KEYS; some; some &= some - 1) {
                const int bit = __ffs(some) - 1;
                found[place++] = token + (bit % 8) * 4 + bit / 8 | ((always >> bit & 1) ? DECIDED : 0);
            }
        }
#pragma unroll
        for (int g = 0; g < G; ++g) levels_now[g] = levels_next[g];
    }
    let_next_start();
    __syncthreads();
    const int n = number;
    if (n && threadIdx.x == 0) base = atomicAdd(mine + LISTED, n);
    if (WARM)
        for (int i = threadIdx.x; i < n * WARM_PIECES; i += THREADS) {
            const int token = start + (found[i / WARM_PIECES] & (DECIDED - 1)), piece = i % WARM_PIECES * (D / WARM_PIECES);
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
        for (int w = 0; w < WARPS; ++w) x = threadIdx.x < G ? x + masses[w][threadIdx.x] : fmaxf(x, masses[w][threadIdx.x]);
        if (threadIdx.x < G && x > 0.0f) {
            // Where the levels begin a weight is e^(begin / STEPS - BELOW), and the half 2^(LOWEST LEVEL_BITS / 1024 - 15); sums of halves round.
            const float unit = exp2_fast(floor_code[pid * G + threadIdx.x] * (LOG2E / STEPS) - BELOW * LOG2E + 15.0f - LOWEST * LEVEL_BITS / 1024.0f);
            atomicAdd(&below[pid * G + threadIdx.x], x * unit * 1.004f);
        }
        if (threadIdx.x == G && x > 0.0f) atomicMax(mine + SPREAD, __float_as_int(x));
    }
    for (int i = threadIdx.x; i < n; i += THREADS)
        if (base + i < room) listed[(i64)pid * room + base + i] = found[i];
}
