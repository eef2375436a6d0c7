// The scan and the cuts of one decode step in CUDA C++, compiled at run time; scan.py and resolve.py are its twins in Triton.
//
// A warp takes a block of keys. Each lane's 16 bytes of codes are, as they lie in memory, its fragment of an m16n8k16 product: nibbles
// are significands of subnormal float16, so one AND makes two operands and no layout changes hands. Codes are loaded AHEAD tiles
// before their use, across blocks, and frames one block ahead. Constants come as macros: D, G, L, S, FRAME, DROP, FIXED, KEEP_BEST.
#define WARPS (G <= 4 ? 8 : 4)
#define W (D / 32)                                        // 32-bit words of codes per lane and key
#define TILES (L / 16)
#define AHEAD (16 / W < TILES ? 16 / W : TILES)           // tiles in flight
#define HALVES (PAIRED ? 1 : 2)                           // halves of the head dimension a lane scales

struct Frame {  // the lane's share of a block's frame: 4 W channels of each half it scales
    Words<2 * W> center[HALVES];
    Words<W> scale[HALVES];
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) scan(
    const float* __restrict__ q, const u8* __restrict__ codes, const u16* __restrict__ center, const u8* __restrict__ scale_codes,
    const u8* __restrict__ radius, const float* __restrict__ unit, const float* __restrict__ scales,
    const float* __restrict__ weight, const int* __restrict__ num_blocks, const int* __restrict__ kv_start,
    const int* __restrict__ kv_len, const float* __restrict__ low, const int* __restrict__ floor_code, short* __restrict__ upper,
    float* __restrict__ reach, int* __restrict__ hist, float* __restrict__ masses, int* __restrict__ finished,
    int* __restrict__ cuts, float* __restrict__ tau, int num_kv_heads, int capacity, int sinks, int recent, float scale,
    float slack_scaled, float slack_centered, float slack_fixed, float inflation, i64 share, i64 tolerance, int count,
    float fixed_tau, float unread_mass) {
    __shared__ float table[256];
    __shared__ float2 query[G][D];           // q, and q^2 times the metric's weight
    __shared__ int bins[G][BINS];
    __shared__ float constants[WARPS][G][8]; // of the warp's block: offset, a factor per radius
    __shared__ __align__(16) u16 staged[WARPS][G][L];
    __shared__ bool last;

    const int pid = blockIdx.x, row = pid / num_kv_heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int r = lane / 4, t = lane % 4;    // fragment row (or column of the query), and quarter of a key
    const int blocks = num_blocks[row], length = kv_len[row] - kv_start[row];
    for (int i = threadIdx.x; i < 256; i += WARPS * 32) table[i] = scales[i];
    for (int i = threadIdx.x; i < G * D; i += WARPS * 32) {
        float x = q[(i64)pid * G * D + i], u = FRAME == 2 ? 1.0f : weight[(i64)pid * D + i % D];
        query[i / D][i % D] = make_float2(x, x * x * u);
    }
    for (int i = threadIdx.x; i < G * BINS; i += WARPS * 32) bins[i / BINS][i % BINS] = 0;
    __syncthreads();

    const int head = PAIRED ? r % 4 : r;             // whose query this lane scales
    const int first_half = PAIRED ? r / 4 : 0;
    const int mine = 2 * (PAIRED ? t % 2 : t);       // the two heads whose results this lane holds
    const bool real0 = mine < G, real1 = mine + 1 < G;
    const float k = scale * STEPS;
    int floor0 = real0 ? floor_code[pid * G + mine] : 0, floor1 = real1 ? floor_code[pid * G + mine + 1] : 0;
    float below[2] = {0.0f, 0.0f}, kept[2] = {0.0f, 0.0f};

    const int stride = gridDim.y * WARPS;
    int b = blockIdx.y * WARPS + warp;
    const i64 base = (i64)pid * capacity;
    const u32* lane_codes = (const u32*)(codes + (base * L + r) * (D / 2)) + t * W;
    auto key_words = [&](int block, int tile, int half) {
        return stream<W>(lane_codes + ((i64)block * L + tile * 16 + half * 8) * (D / 8));
    };
    auto frame_of = [&](int block) {
        Frame f;
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
            i64 at = (base + block) * D + (first_half + h) * (D / 2) + 4 * W * t;
            f.center[h] = stream<2 * W>((const u32*)(center + at));
            f.scale[h] = stream<W>((const u32*)(scale_codes + at));
        }
        return f;
    };
    Words<W> ahead[AHEAD][2];
    Frame frame;
    if (b < blocks) {
        frame = frame_of(b);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) { ahead[i][0] = key_words(b, i, 0); ahead[i][1] = key_words(b, i, 1); }
    }
    for (; b < blocks; b += stride) {
        const int next = b + stride < blocks ? b + stride : b;
        const i64 block = base + b;
        // Radii of the rows this lane finishes.
        u32 radii[TILES][PAIRED ? 1 : 2];
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int j = 0; j < (PAIRED ? 1 : 2); ++j) {
                const u8* p = radius + (block * L + i * 16 + r + 8 * (PAIRED ? t / 2 : j)) * S;
                radii[i][j] = S == 1 ? (u32)*p : S == 2 ? (u32) * (const u16*)p : *(const u32*)p;
            }
        float units[S];
#pragma unroll
        for (int s = 0; s < S; ++s) units[s] = unit[block * S + s];

        // Scale the query by the frame.
        u32 p[2][W][2];
        float bias = 0.0f, scaled = 0.0f, centered = 0.0f, square[2] = {0.0f, 0.0f};
#pragma unroll
        for (int h = 0; h < HALVES; ++h)
#pragma unroll
            for (int w = 0; w < W; ++w) {
                float part[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float2 x = make_float2(0.0f, 0.0f);
                    if (head < G) x = query[head][(first_half + h) * (D / 2) + 4 * (t * W + w) + j];
                    float s = table[(frame.scale[h].x[w] >> (8 * j)) & 255];
                    u32 zz = frame.center[h].x[2 * w + j / 2];
                    float z = j % 2 ? high_half(zz) : low_half(zz);
                    part[j] = x.x * s;
                    scaled += fabsf(part[j]);
                    float y = x.x * z;
                    bias += y;
                    centered += fabsf(y);
                    square[h] += FRAME == 1 ? x.y * s : x.y;
                }
                p[h][w][0] = pack(part[0], part[2]);
                p[h][w][1] = pack(part[1], part[3]);
            }
        frame = frame_of(next);
        if (PAIRED) {  // the partner scaled the other half
#pragma unroll
            for (int w = 0; w < W; ++w)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    u32 own = p[0][w][j], other = __shfl_xor_sync(FULL, own, 16);
                    p[0][w][j] = first_half ? other : own;
                    p[1][w][j] = first_half ? own : other;
                }
            float other;
#pragma unroll
            for (int m = 1; m <= 2; m *= 2) {
                if (S < 4 || m == 1) square[0] += __shfl_xor_sync(FULL, square[0], m);
                bias += __shfl_xor_sync(FULL, bias, m);
                scaled += __shfl_xor_sync(FULL, scaled, m);
                centered += __shfl_xor_sync(FULL, centered, m);
            }
            bias += __shfl_xor_sync(FULL, bias, 16);
            scaled += __shfl_xor_sync(FULL, scaled, 16);
            centered += __shfl_xor_sync(FULL, centered, 16);
            other = __shfl_xor_sync(FULL, square[0], 16);
            square[1] = first_half ? square[0] : other;
            square[0] = first_half ? other : square[0];
        } else {
#pragma unroll
            for (int m = 1; m <= 2; m *= 2) {
                if (S < 4 || m == 1) { square[0] += __shfl_xor_sync(FULL, square[0], m); square[1] += __shfl_xor_sync(FULL, square[1], m); }
                bias += __shfl_xor_sync(FULL, bias, m);
                scaled += __shfl_xor_sync(FULL, scaled, m);
                centered += __shfl_xor_sync(FULL, centered, m);
            }
        }
        float squares[S];
        if (S == 1) squares[0] = square[0] + square[1];
        if (S == 2) { squares[0] = square[0]; squares[S - 1] = square[1]; }
        if (S == 4) {
            squares[0] = __shfl_sync(FULL, square[0], lane & ~3);
            squares[S > 1 ? 1 : 0] = __shfl_sync(FULL, square[0], lane | 3);
            squares[S > 2 ? 2 : 0] = __shfl_sync(FULL, square[1], lane & ~3);
            squares[S > 3 ? 3 : 0] = __shfl_sync(FULL, square[1], lane | 3);
        }
        bool fits = true;
        if (head < G) {
            float slack = slack_scaled * scaled + slack_centered * centered + slack_fixed;
            float start = low[pid * G + head];
            float allowed = (fabsf(start) + scale * (centered + 16.0f * scaled)) * 0x1p-19f;  // rounding of what follows, nats
            float offset = bias * k + (slack * scale - start + allowed) * STEPS + 1.0f;
            fits = scaled < 65000.0f && fabsf(offset) < 1e30f;
            if (t == 0 && first_half == 0) {
                float* out = reach + block * (S + 2) * G + head;
                float widest = slack * scale + 2.0f * allowed;
                constants[warp][head][0] = offset;
                out[S * G] = widest;
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    float factor = sqrtf(squares[s]) * (units[s] * inflation) * scale;
                    fits = fits && factor * 255.0f < 1e30f;
                    out[s * G] = factor;
                    widest += 254.0f * factor;
                    constants[warp][head][1 + s] = factor * (STEPS * (1.0f + 0x1p-18f));
                }
                constants[warp][head][5] = (slack * scale + 2.0f * allowed) * STEPS;
                out[(S + 1) * G] = widest;
            }
        }
        const bool usable = __all_sync(FULL, fits);
        __syncwarp();
        float offset0 = 0.0f, offset1 = 0.0f, slack0 = 0.0f, slack1 = 0.0f, factor0[S], factor1[S];
#pragma unroll
        for (int s = 0; s < S; ++s) factor0[s] = factor1[s] = 0.0f;
        if (real0) {
            offset0 = constants[warp][mine][0];
            slack0 = constants[warp][mine][5];
#pragma unroll
            for (int s = 0; s < S; ++s) factor0[s] = constants[warp][mine][1 + s];
        }
        if (real1) {
            offset1 = constants[warp][mine + 1][0];
            slack1 = constants[warp][mine + 1][5];
#pragma unroll
            for (int s = 0; s < S; ++s) factor1[s] = constants[warp][mine + 1][1 + s];
        }
        // -8 sum(p), on the tensor cores too: every row of the result is the same.
        float zero_low[4] = {0.0f, 0.0f, 0.0f, 0.0f}, zero_high[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int w = 0; w < W; ++w) {
            mma(zero_low, 0x00080008u, 0x00080008u, 0x00080008u, 0x00080008u, p[0][w][0], p[0][w][1]);
            mma(zero_high, 0x00800080u, 0x00800080u, 0x00800080u, 0x00800080u, p[1][w][0], p[1][w][1]);
        }
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            const int slot = i % AHEAD;
            float lo[4], hi[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) { lo[j] = -zero_low[j]; hi[j] = -zero_high[j]; }
#pragma unroll
            for (int w = 0; w < W; ++w) {
                u32 a = ahead[slot][0].x[w], c = ahead[slot][1].x[w];
                u32 a8 = a >> 8, c8 = c >> 8;
                mma(lo, a & 0x000f000fu, c & 0x000f000fu, a8 & 0x000f000fu, c8 & 0x000f000fu, p[0][w][0], p[0][w][1]);
                mma(hi, a & 0x00f000f0u, c & 0x00f000f0u, a8 & 0x00f000f0u, c8 & 0x00f000f0u, p[1][w][0], p[1][w][1]);
            }
            {
                const int to = i + AHEAD;
                const int from = to < TILES ? b : next;
                ahead[slot][0] = key_words(from, to % TILES, 0);
                ahead[slot][1] = key_words(from, to % TILES, 1);
            }
#pragma unroll
            for (int j = 0; j < (PAIRED ? 1 : 2); ++j) {
                const int in_block = i * 16 + r + 8 * (PAIRED ? t / 2 : j);
                const int index = b * L + in_block;
                bool decided = !usable || index < sinks || index >= length - recent;
                float width0 = 0.0f, width1 = 0.0f;
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    u32 code = (radii[i][j] >> (8 * s)) & 255;
                    decided = decided || code == 255;
                    width0 += (float)code * factor0[s];
                    width1 += (float)code * factor1[s];
                }
                const bool second = PAIRED ? t >= 2 : j == 1;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    if (!(e ? real1 : real0)) continue;
                    float width = e ? width1 : width0;
                    float position = (second ? lo[2 + e] : lo[e]) * (0x1p24f * k) + (second ? hi[2 + e] : hi[e]) * (0x1p20f * k);
                    position = position + (e ? offset1 : offset0) + width;
                    position = fminf(fmaxf(position, 0.0f), 65535.0f);  // the offset holds the step that rounding down may cost
                    int code = decided ? ALWAYS : __float2int_rn(position);
                    staged[warp][mine + e][in_block] = (u16)(code - 32768);
                    if (code < ALWAYS) {
                        float lower = position - 2.0f * width - 2.0f * (e ? slack1 : slack0) - 3.0f;
                        int floor_here = e ? floor1 : floor0;
                        if (DROP) {
                            int bin = ((int)lower - floor_here) / BIN_CODES;
                            if (lower >= (float)floor_here) atomicAdd(&bins[mine + e][min(bin, BINS - 1)], 1);
                        } else {
                            if (code >= floor_here) atomicAdd(&bins[mine + e][min((code - floor_here) / BIN_CODES, BINS - 1)], 1);
                            else below[e] += exp2_fast(code * (LOG2E / STEPS) - BELOW * LOG2E);
                            if (lower >= (float)floor_here) kept[e] += exp2_fast(lower * (LOG2E / STEPS) - BELOW * LOG2E);
                        }
                    }
                }
            }
        }
        __syncwarp();
        uint4* to = (uint4*)(upper + block * G * L);
        const uint4* from = (const uint4*)&staged[warp][0][0];
#pragma unroll
        for (int i = lane; i < G * L / 8; i += 32) to[i] = from[i];
        __syncwarp();
    }

    if (!DROP) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            for (int m = PAIRED ? 2 : 4; m < 32; m *= 2) {
                below[e] += __shfl_xor_sync(FULL, below[e], m);
                kept[e] += __shfl_xor_sync(FULL, kept[e], m);
            }
            if (lane < (PAIRED ? 2 : 4) && mine + e < G) {
                if (below[e] > 0.0f) atomicAdd(&masses[(pid * G + mine + e) * 2], below[e]);
                if (kept[e] > 0.0f) atomicAdd(&masses[(pid * G + mine + e) * 2 + 1], kept[e]);
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < G * BINS; i += WARPS * 32) {
        int n = bins[i / BINS][i % BINS];
        if (n) atomicAdd(&hist[(pid * G + i / BINS) * BINS + i % BINS], n);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&finished[pid], 1) == (int)gridDim.y - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();

    // The cuts: a warp per query head reads its rule off the histogram, PER bins a lane.
    for (int i = threadIdx.x; i < G * BINS; i += WARPS * 32) bins[i / BINS][i % BINS] = __ldcg(hist + pid * G * BINS + i);
    __syncthreads();
    for (int g = warp; g < G; g += WARPS) {
        const int id = pid * G + g;
        const int* mine_bins = bins[g];
        const int base_code = floor_code[id];
        const float origin = low[id];
        i64 need64 = ((i64)length * share - tolerance + ((1ll << 40) - 1)) >> 40;
        const int need = need64 > count ? (int)need64 : count;
        int own = 0, top = -1;
        float mass = 0.0f;
#pragma unroll 4
        for (int i = 0; i < PER; ++i) {
            const int bin = lane * PER + i, n = mine_bins[bin];
            own += n;
            if (n) top = bin;
            if (!DROP) mass += n * exp2_fast((base_code + (bin + 1) * BIN_CODES) * (LOG2E / STEPS) - BELOW * LOG2E);
        }
        // The top bin also holds what lies above it, so its mass bound is that of the grid's end.
        if (!DROP && lane == 31) {
            int n = mine_bins[BINS - 1];
            if (n) mass += n * exp2_fast(ALWAYS * (LOG2E / STEPS) - BELOW * LOG2E);
        }
        int from = own;  // keys in this lane's bins and above
        for (int m = 1; m < 32; m *= 2) { int x = __shfl_down_sync(FULL, from, m); if (lane + m < 32) from += x; }
        for (int m = 16; m; m /= 2) top = max(top, __shfl_xor_sync(FULL, top, m));
        u32 enough = __ballot_sync(FULL, from >= need);
        int cut = 0;
        if (enough) {
            int at = 31 - __clz(enough);
            int rest = need - (__shfl_sync(FULL, from, at) - __shfl_sync(FULL, own, at));  // wanted of this lane's bins
            int n = lane < PER ? mine_bins[at * PER + lane] : 0;
            for (int m = 1; m < 32; m *= 2) { int x = __shfl_down_sync(FULL, n, m); if (lane + m < 32) n += x; }
            cut = base_code + (at * PER + 31 - __clz(__ballot_sync(FULL, lane < PER && n >= rest))) * BIN_CODES;
        }
        float bound = (origin + cut / STEPS) / scale;
        int unread = cut;
        if (DROP) {
            bound = cut == 0 ? -INFINITE : bound - fabsf(bound) * 0x1p-20f;
            if (FIXED) {
                float position = (fixed_tau * scale - origin) * STEPS - (fabsf(fixed_tau * scale) + fabsf(origin)) * (0x1p-21f * STEPS);
                cut = (int)fminf(fmaxf(floorf(position), 0.0f), 65535.0f);
                bound = fixed_tau;
                int best = top < 0 ? 0 : base_code + top * BIN_CODES;
                if (KEEP_BEST && best < cut) { cut = best; bound = best == 0 ? -INFINITE : (origin + best / STEPS) / scale; bound -= fabsf(bound) * 0x1p-20f; }
            }
            unread = cut;
        } else {
            bound = cut == 0 ? -INFINITE : bound + fabsf(bound) * 0x1p-20f;
            const float limit = unread_mass * __ldcg(masses + id * 2 + 1) * 0.998f;
            float under = __ldcg(masses + id * 2) * 1.001f;  // and of the bins below, before this lane's
            float before = mass;
            for (int m = 1; m < 32; m *= 2) { float x = __shfl_up_sync(FULL, before, m); if (lane >= m) before += x; }
            before = under + (before - mass);
            u32 fine = __ballot_sync(FULL, before <= limit);
            unread = 0;
            if (fine) {
                int at = 31 - __clz(fine);
                float start = __shfl_sync(FULL, before, at);
                int n = lane < PER ? mine_bins[at * PER + lane] : 0;
                float each = n * exp2_fast((base_code + (at * PER + lane + 1) * BIN_CODES) * (LOG2E / STEPS) - BELOW * LOG2E);
                float sum = each;
                for (int m = 1; m < 32; m *= 2) { float x = __shfl_up_sync(FULL, sum, m); if (lane >= m) sum += x; }
                u32 ok = __ballot_sync(FULL, lane < PER && (start + sum - each) * 1.001f <= limit);
                if (ok) unread = base_code + (at * PER + 31 - __clz(ok)) * BIN_CODES;
            }
            unread = min(unread, cut);
        }
        if (lane == 0) {
            cuts[id * 2] = cut;
            cuts[id * 2 + 1] = unread;
            tau[id] = bound;
        }
    }
}
