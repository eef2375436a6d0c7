// Nothing dropped: from a query head's histogram of upper bounds to its cuts, by one warp; the twin of the last program of resolve_kernel.
// Macros: G.

__device__ __forceinline__ int padded(int bin) { return bin + bin / 32; }  // a word more after every 32: no two lanes in a bank

// The histograms of a KV head's group: read, all pieces at once, and put where make_cuts finds them. By all THREADS of a CTA.
#define BIN_PIECES(threads) ((G * BINS / 4 + (threads) - 1) / (threads))
template <int THREADS> __device__ __forceinline__ void read_bins(const int* hist, int4 (&some)[BIN_PIECES(THREADS)]) {
#pragma unroll
    for (int j = 0; j < BIN_PIECES(THREADS); ++j) {
        const int i = threadIdx.x + j * THREADS;
        if (i < G * BINS / 4) some[j] = __ldcg((const int4*)hist + i);
    }
}
template <int THREADS> __device__ __forceinline__ void pad_bins(const int4 (&some)[BIN_PIECES(THREADS)], int (*bins)[BINS + 32]) {
#pragma unroll
    for (int j = 0; j < BIN_PIECES(THREADS); ++j) {
        const int i = threadIdx.x + j * THREADS, bin = 4 * i % BINS;
        if (i >= G * BINS / 4) break;
        int* to = bins[4 * i / BINS] + bin + bin / 32;
        to[0] = some[j].x, to[1] = some[j].y, to[2] = some[j].z, to[3] = some[j].w;
    }
}

// Of bins from base_code upwards, and what was found below them; cuts[0] = code from which a key is exact, cuts[1] = and read.
__device__ __forceinline__ void make_cuts(
    const int* mine_bins, int base_code, float origin, float mass_below, float mass_kept, int need, float scale, float unread_mass,
    int* cuts, float* tau) {
    const int lane = threadIdx.x % 32;
    int own = 0;
    float mass = 0.0f;
#pragma unroll 4
    for (int i = 0; i < PER; ++i) {
        const int bin = lane * PER + i, n = mine_bins[padded(bin)];
        own += n;
        mass += n * exp2_fast((base_code + (bin + 1) * BIN_CODES) * (LOG2E / STEPS) - BELOW * LOG2E);
    }
    // The top bin also holds what lies above it, so its mass bound is that of the grid's end.
    if (lane == 31) {
        int n = mine_bins[padded(BINS - 1)];
        if (n) mass += n * exp2_fast(ALWAYS * (LOG2E / STEPS) - BELOW * LOG2E);
    }
    int from = own;  // keys in this lane's bins and above
    for (int m = 1; m < 32; m *= 2) { int x = __shfl_down_sync(FULL, from, m); if (lane + m < 32) from += x; }
    u32 enough = __ballot_sync(FULL, from >= need);
    int cut = 0;
    if (enough) {
        int at = 31 - __clz(enough);
        int rest = need - (__shfl_sync(FULL, from, at) - __shfl_sync(FULL, own, at));  // wanted of this lane's bins
        int n = lane < PER ? mine_bins[padded(at * PER + lane)] : 0;
        for (int m = 1; m < 32; m *= 2) { int x = __shfl_down_sync(FULL, n, m); if (lane + m < 32) n += x; }
        cut = base_code + (at * PER + 31 - __clz(__ballot_sync(FULL, lane < PER && n >= rest))) * BIN_CODES;
    }
    float bound = (origin + cut / STEPS) / scale;
    bound = cut == 0 ? -INFINITE : bound + fabsf(bound) * 0x1p-20f;
    int unread = 0;
    const float limit = unread_mass * mass_kept * 0.998f;
    float under = mass_below * 1.001f;  // and of the bins below, before this lane's
    float before = mass;
    for (int m = 1; m < 32; m *= 2) { float x = __shfl_up_sync(FULL, before, m); if (lane >= m) before += x; }
    before = under + (before - mass);
    u32 fine = __ballot_sync(FULL, before <= limit);
    if (fine) {
        int at = 31 - __clz(fine);
        float start = __shfl_sync(FULL, before, at);
        int n = lane < PER ? mine_bins[padded(at * PER + lane)] : 0;
        float each = n * exp2_fast((base_code + (at * PER + lane + 1) * BIN_CODES) * (LOG2E / STEPS) - BELOW * LOG2E);
        float sum = each;
        for (int m = 1; m < 32; m *= 2) { float x = __shfl_up_sync(FULL, sum, m); if (lane >= m) sum += x; }
        u32 ok = __ballot_sync(FULL, lane < PER && (start + sum - each) * 1.001f <= limit);
        if (ok) unread = base_code + (at * PER + 31 - __clz(ok)) * BIN_CODES;
    }
    unread = min(unread, cut);
    if (lane == 0) {
        cuts[0] = cut;
        cuts[1] = unread;
        *tau = bound;
    }
}
