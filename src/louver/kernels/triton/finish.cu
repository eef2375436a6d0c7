// The end of a step, a CTA per query head: merge the splits, and turn their sums into the certificate and its companions; the twin of
// finish_kernel, with the same sums. Macros: D, G, L, DROP, OUT (type of the output: 0 float32, 1 float16, 2 bfloat16).
#define THREADS 256
#define COLUMNS (D / 4)
#define PARTS (THREADS / COLUMNS)       // threads that share the splits of four channels
#define AHEAD ((DROP ? 40 : 64) / PARTS)  // splits a thread has asked for before it knows their scale: all, in the usual case
#define TIERS_AHEAD (40 / PARTS)
#define MOST 256                        // splits
#define LN2 0.6931471805599453f

__device__ __forceinline__ float natural(float x) { return exp2_fast(x * LOG2E); }
__device__ __forceinline__ float logarithm(float x) { return __log2f(x) * LN2; }  // off by 2^-21, and 2^-21 of itself

extern "C" __global__ void __launch_bounds__(THREADS, 1) finish(
    const float* exact_out, const float* exact_sums, const float* tier_out, const float* tier_sums, const float* low, const int* cuts,
    const float* tau, const float* below, const float* __restrict__ mean, const int* counters, const int* __restrict__ num_blocks,
    const int* __restrict__ kv_start, const int* __restrict__ kv_len, void* __restrict__ out, float* __restrict__ evidence,
    i64* __restrict__ counts, int num_kv_heads, int room, int exacts, int tiers, float accumulation, float out_unit) {
    __shared__ float scales[MOST], whole[16];
    __shared__ __align__(16) float4 shares[PARTS][COLUMNS];
    const int id = blockIdx.x, pid = id / G, row = pid / num_kv_heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column = threadIdx.x % COLUMNS, part = threadIdx.x / COLUMNS;
    const int length = kv_len[row] - kv_start[row], blocks = num_blocks[row];
    float m[D / 32];
#pragma unroll
    for (int j = 0; j < D / 32; ++j) m[j] = mean[(i64)pid * D + lane + 32 * j];
    awaited();
    // What the end needs is asked for with the splits: a trip to the L2 less.
    const int* const mine = counters + pid * COUNTERS;
    const int listed = mine[LISTED], exact = mine[EXACT], coarse = mine[COARSE], value_blocks = mine[VALUE_BLOCKS];
    const float origin = low[id], found_tau = tau[id], under = DROP ? below[id] : 0.0f, furthest_value = __int_as_float(mine[SPREAD]);
    const bool overflow = listed > room;
    const float4* const from_exact = (const float4*)(exact_out + (i64)id * exacts * D) + column;
    const float4* const from_tiers = (const float4*)(tier_out + (i64)id * tiers * D) + column;
    float4 exact_ahead[AHEAD], tier_ahead[DROP ? 1 : TIERS_AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
        const int p = part + j * PARTS;
        if (p < exacts) exact_ahead[j] = from_exact[p * COLUMNS];
        if (!DROP && j < TIERS_AHEAD && p < tiers) tier_ahead[DROP ? 0 : j] = from_tiers[p * COLUMNS];
    }
    const float unit = DROP ? 0.0f : origin + cuts[id * 2] * (1.0f / STEPS) - 15.0f * LN2;
    if (warp == 0) {
        const float4* sums = (const float4*)(exact_sums + (i64)id * exacts * 8);
        float top = -INFINITE, sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        for (int i = lane; i < exacts; i += 32) top = fmaxf(top, sums[2 * i].x);
        for (int i = 16; i; i /= 2) top = fmaxf(top, __shfl_xor_sync(FULL, top, i));
        const float shift = top == -INFINITE ? 0.0f : top;   // sums and outputs are merged in units of e^shift
        for (int i = lane; i < exacts; i += 32) {
            const float4 a = sums[2 * i], c = sums[2 * i + 1];
            const float up = a.x == -INFINITE ? 0.0f : natural(a.x - shift);
            scales[i] = up;
            sum[0] += up * a.y, sum[1] += up * a.z, sum[2] += up * a.w, sum[3] += up * c.x, sum[4] += up * c.y;
            sum[5] += c.z;
        }
        const float one = sum_apart<8, 32>(sum, lane);
        if (lane % 4 == 0 && lane < 24) whole[lane / 4] = one;
        if (lane == 0) whole[6] = top;
    }
    if (!DROP && warp == 1) {
        const float4* sums = (const float4*)(tier_sums + (i64)id * tiers * 8);
        float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        for (int i = lane; i < tiers; i += 32) {
            const float4 a = sums[2 * i], c = sums[2 * i + 1];
            sum[0] += a.x, sum[1] += a.y, sum[2] += a.z, sum[3] += a.w, sum[4] += c.x, sum[5] += c.y, sum[6] += c.z;
        }
        const float one = sum_apart<8, 32>(sum, lane);
        if (lane % 4 == 0) whole[8 + lane / 4] = overflow ? 0.0f : one;
    }
    __syncthreads();
    // One unit for both: e^shift.
    const float top = whole[6];
    float shift = top;
    if (!DROP && whole[8] > 0.0f) shift = fmaxf(shift, unit);
    const bool nothing = shift == -INFINITE;
    shift = nothing ? 0.0f : shift;
    // Where no key was sketched `unit` may lie far above all: nothing times e^(unit - shift), which may be infinite, is nothing.
    const bool sketched = !DROP && !overflow && !(whole[8] == 0.0f);
    const float exact_scale = top == -INFINITE ? 0.0f : natural(top - shift), tier_scale = DROP || overflow ? 0.0f : natural(unit - shift);
    auto of_tiers = [&](float x) { return x == 0.0f ? 0.0f : x * tier_scale; };
    float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    auto add = [&](float4 x, float by) { o.x += by * x.x, o.y += by * x.y, o.z += by * x.z, o.w += by * x.w; };
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
        const int p = part + j * PARTS;
        if (p < exacts) add(exact_ahead[j], exact_scale * scales[p]);
        if (!DROP && j < TIERS_AHEAD && p < tiers && sketched) add(tier_ahead[DROP ? 0 : j], tier_scale);
    }
    for (int p = part + AHEAD * PARTS; p < exacts; p += PARTS) add(from_exact[p * COLUMNS], exact_scale * scales[p]);
    if (sketched)
        for (int p = part + TIERS_AHEAD * PARTS; p < tiers; p += PARTS) add(from_tiers[p * COLUMNS], tier_scale);
    shares[part][column] = o;
    __syncthreads();
    if (warp) return;

    float total = whole[0] * exact_scale, floors = whole[1] * exact_scale, reach = whole[4] * exact_scale, unread = 0.0f;
    const float surplus_value = whole[2] * exact_scale, surplus = whole[3] * exact_scale;
    float coarse_surplus = 0.0f, coarse_spread = 0.0f;
    if (!DROP) {
        total += of_tiers(whole[8]), floors += of_tiers(whole[9]), unread = of_tiers(whole[10]);
        coarse_surplus = of_tiers(whole[11]), coarse_spread = of_tiers(whole[12] + whole[13]), reach += of_tiers(whole[14]);
    }
    const float safe = total > 0.0f ? total : 1.0f, part_of = 1.0f / safe;
    float square = 0.0f, off = 0.0f, furthest = 0.0f;
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
        const int c = lane + 32 * j;
        float x = unread * m[j];
#pragma unroll
        for (int p = 0; p < PARTS; ++p) x += ((const float*)shares[p])[c];
        x *= part_of;
        square += x * x, off += (m[j] - x) * (m[j] - x), furthest += m[j] * m[j];
        const i64 at = (i64)id * D + c;
#if OUT == 0
        ((float*)out)[at] = x;
#elif OUT == 1
        ((u16*)out)[at] = (u16)pack(x, 0.0f);
#else
        asm volatile("{.reg .b16 x; cvt.rn.bf16.f32 x, %0; st.global.b16 [%1], x;}" ::"f"(x), "l"((u16*)out + at) : "memory");
#endif
    }
    square = sum_lanes<32>(square), off = sum_lanes<32>(off), furthest = sum_lanes<32>(furthest);
    if (lane) return;
    floors = total > 0.0f ? floors * (1.0f - 0x1p-12f) : 1.0f;
    const float norm = sqrtf(square) * 1.0001f, away = sqrtf(off) * 1.0001f;
    float arithmetic = (surplus_value + surplus * norm) * 1.001f / floors;
    // Sums: exact values are bounded by `reach`, sketched ones by spread and mean.
    arithmetic += accumulation * (reach / safe + 2.0f * norm + 2.0f * sqrtf(furthest) * 1.0001f + 1e-30f);
    arithmetic += out_unit * norm + sqrtf((float)D) * 0x1p-24f;
    float dropped = 0.0f, certificate;
    if (DROP) {  // the mass left out: bounded through the codes under the cut, and known for what was scored and rejected
        const float rejected = whole[5];
        const float rounding = 0.001f + fabsf(origin) * 0x1p-21f;    // of what is added to logarithms, here and of `kept`
        const float left = overflow || under == 0.0f ? -INFINITE : logarithm(under) + origin + BELOW + rounding;
        const float loss = rejected > 0.0f ? logarithm(rejected) + origin + rounding : -INFINITE, highest = fmaxf(left, loss);
        float both = highest;
        if (highest != -INFINITE && highest != INFINITE) both = highest + logarithm(natural(left - highest) + natural(loss - highest)) + 0.001f;
        const float kept = total > 0.0f ? shift + logarithm(floors) - fabsf(shift) * 0x1p-22f : -INFINITE, gap = kept - both;
        dropped = both == -INFINITE ? 0.0f : 1.0f / (1.0f + natural(gap > 80.0f ? 80.0f : gap));    // NaN stays NaN
        if (nothing && both > -INFINITE) dropped = 1.0f;
        certificate = dropped == 0.0f ? 0.0f : dropped * (furthest_value + away) * 1.001f;
    } else certificate = (coarse_spread + coarse_surplus * (away + arithmetic)) * 1.001f / floors;
    const int heads = gridDim.x;
    evidence[id] = total > 0.0f ? shift + logarithm(safe) : -INFINITE;
    // Of an output that is not finite nothing is known; NaN compares with nothing.
    evidence[heads + id] = certificate == certificate ? certificate : INFINITE;
    evidence[2 * heads + id] = arithmetic == arithmetic ? arithmetic : INFINITE;
    evidence[3 * heads + id] = dropped == dropped ? dropped : 1.0f;
    evidence[4 * heads + id] = overflow && !DROP ? -INFINITE : found_tau;
    if (id % G == 0) {
        i64* to = counts + (i64)pid * 7;
        const int scanned = overflow ? blocks * L : listed;
        to[0] = length, to[1] = blocks, to[2] = length - blocks * L, to[3] = scanned, to[4] = DROP ? exact : scanned;
        to[5] = overflow ? 0 : coarse, to[6] = overflow ? 0 : value_blocks;
    }
}
