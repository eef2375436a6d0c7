// Nothing dropped: list the exact keys, attend every other closed key with its estimated weight and sketched value; the twin of
// tiers_kernel, with the same sums. A warp takes a block. Values are the first operand of an m16n8k16 product (channels x keys), weights
// the second: a byte of codes from each of two keys makes two operands with one AND each. A lane computes the weights of one query
// head, so the certificate's sums stay in its registers. Macros: D, G, L, S.
#define WARPS (G * D > 1024 ? 4 : 8)     // what fits in 48 KiB of shared memory
#define KEYS (PAIRED ? 2 : 4)           // keys of a step of 16 a lane weighs
#define STEPS16 (L / 16)
#define W (D / 64)                      // 32-bit words of value codes a lane reads of a key
#define TILES (D / 16)
#define AHEAD 2                         // steps whose values are in flight
#define WEIGHT_SLACK 0x1p-10f

struct Pairs { u32 x[KEYS / 2]; };

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) tiers(
    const u16* __restrict__ upper, const float* __restrict__ reach, const u8* __restrict__ radius,
    const u8* __restrict__ value_codes, const u16* __restrict__ value_center, const u8* __restrict__ value_scale,
    const float* __restrict__ value_error, const float* __restrict__ value_spread, const float* __restrict__ scales,
    const int* __restrict__ num_blocks, const float* __restrict__ low, const int* __restrict__ cuts, int* __restrict__ listed, int* __restrict__ counters,
    float* __restrict__ part_out, float* __restrict__ part_sums, int num_kv_heads, int capacity, int room) {
    __shared__ float table[256];
    __shared__ float out[WARPS][G][D];
    __shared__ float sums[WARPS][G][7];
    const int pid = blockIdx.x, row = pid / num_kv_heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int r = lane / 4, t = lane % 4;
    const int blocks = num_blocks[row];
    for (int i = threadIdx.x; i < 256; i += WARPS * 32) table[i] = scales[i];
    for (int i = lane; i < G * D; i += 32) out[warp][i / D][i % D] = 0.0f;
    __syncthreads();

    int* mine = counters + pid * COUNTERS;
    const int head = PAIRED ? r % 4 : r, sub = PAIRED ? r / 4 : 0;
    const bool real = head < G;
    const int id = pid * G + (real ? head : 0);
    const int cut = cuts[id * 2], readable = cuts[id * 2 + 1];
    const float hidden = 2.002f / STEPS + (fabsf(low[id]) + 64.0f) * 0x1p-19f;
    const int mine0 = 2 * (PAIRED ? t % 2 : t);                  // heads of this lane's results
    float total = 0.0f, floors = 0.0f, unread = 0.0f, surplus = 0.0f, spread = 0.0f, error = 0.0f, apart = 0.0f;
    int num_coarse = 0, num_value_blocks = 0;

    for (int b = blockIdx.y * WARPS + warp; b < blocks; b += gridDim.y * WARPS) {
        const i64 block = (i64)pid * capacity + b;
        u32 codes[STEPS16][KEYS / 2];
#pragma unroll
        for (int i = 0; i < STEPS16; ++i) {
            const u32* p = (const u32*)(upper + (block * G + (real ? head : 0)) * L + i * 16 + 4 * t + 2 * sub);
#pragma unroll
            for (int j = 0; j < KEYS / 2; ++j) codes[i][j] = p[j];
        }
        float factor[S];
#pragma unroll
        for (int s = 0; s < S; ++s) factor[s] = reach[(block * (S + 2) + s) * G + (real ? head : 0)];
        const float slack = reach[(block * (S + 2) + S) * G + (real ? head : 0)];
        const float r_block = value_spread[block], e_block = value_error[block];
        // Which keys are exact for some head, and which are read by some head: four bits a step and lane, keys 4 t ... 4 t + 3.
        u32 exact = 0, live = 0;
#pragma unroll
        for (int i = 0; i < STEPS16; ++i) {
            u32 flags = 0;
#pragma unroll
            for (int j = 0; j < KEYS; ++j) {
                const int code = (int)((codes[i][j / 2] >> (16 * (j % 2))) & 0xffff) ^ SIGNED;
                if (real && code >= cut) flags |= 1u << (2 * sub + j);
                if (real && code >= readable) flags |= 16u << (2 * sub + j);
            }
            flags |= __shfl_xor_sync(FULL, flags, 4);
            flags |= __shfl_xor_sync(FULL, flags, 8);
            flags |= __shfl_xor_sync(FULL, flags, 16);
            exact |= (flags & 15) << (4 * i);
            live |= ((flags >> 4) & ~flags & 15) << (4 * i);
        }
        // List the exact keys: lane t of head 0 has them all.
        const int number = r == 0 ? __popc(exact) : 0;
        if (__any_sync(FULL, exact != 0)) {
            int before = number;
            for (int m = 1; m < 4; m *= 2) { int y = __shfl_up_sync(FULL, before, m, 4); if (t >= m) before += y; }
            int at = 0;
            if (lane == 3) at = atomicAdd(mine + LISTED, before);
            at = __shfl_sync(FULL, at, 3) + before - number;
            if (r == 0)
                for (u32 left = exact; left; left &= left - 1) {
                    const int bit = __ffs(left) - 1, in_block = (bit / 4) * 16 + 4 * t + bit % 4;
                    const int code = (int)upper[block * G * L + in_block] ^ SIGNED;
                    if (at < room) listed[(i64)pid * room + at] = (b * L + in_block) | (code == ALWAYS ? DECIDED : 0);
                    ++at;
                }
        }
        const bool any_live = __any_sync(FULL, live != 0);
        if (r == 0) num_coarse += __popc(live);
        num_value_blocks += any_live;

        auto load = [&](int i, Words<W> to[4]) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int w = 0; w < W; ++w) to[j].x[w] = 0;
                if ((live >> (4 * i + j)) & 1) {
                    const u32* p = (const u32*)(value_codes + (block * L + i * 16 + 4 * t + j) * (D / 2)) + r * W;
                    if constexpr (W == 1) to[j].x[0] = __ldcs(p);
                    else to[j] = stream<W>(p);
                }
            }
        };
        Words<W> ahead[AHEAD][4];
        if (any_live)
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) load(i, ahead[i]);
        float acc[TILES][4];
#pragma unroll
        for (int j = 0; j < TILES; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.0f;
        float here = 0.0f, lived = 0.0f, skipped = 0.0f;
#pragma unroll
        for (int i = 0; i < STEPS16; ++i) {
            const u8* codes_of_radii = radius + (block * L + i * 16 + 4 * t + 2 * sub) * S;
            u32 weights[KEYS / 2];
#pragma unroll
            for (int j = 0; j < KEYS; ++j) {
                const int code = (int)((codes[i][j / 2] >> (16 * (j % 2))) & 0xffff) ^ SIGNED;
                float width = slack;
#pragma unroll
                for (int s = 0; s < S; ++s) width += (float)codes_of_radii[j * S + s] * factor[s];
                width = width * (1.0f + 0x1p-18f) + hidden;
                const float position = (float)(code - cut) * (1.0f / STEPS);
                const u32 bit = 1u << (4 * i + 2 * sub + j);
                const bool sketched = real && !(exact & bit);
                float a = sketched && code > 0 ? exp2_fast((position - width) * LOG2E + 15.0f) : 0.0f;
                const u32 rounded = pack(a, 0.0f);
                a = low_half(rounded);
                const float grow = exp2_fast((width + WEIGHT_SLACK) * LOG2E);
                const float lost = code > 0 ? 0x1p-25f * grow : exp2_fast((position + 1.0f / STEPS) * LOG2E + 15.0f);
                if (sketched) here += a * (grow - 1.0f) * 1.00001f + lost;
                floors += fmaxf(a - 0x1p-25f, 0.0f) * exp2_fast(-(width + WEIGHT_SLACK) * LOG2E) * 0.99999f;
                if (live & bit) lived += a; else skipped += a;
                const u32 used = live & bit ? rounded & 0xffff : 0;
                if (j % 2) weights[j / 2] |= used << 16; else weights[j / 2] = used;
            }
            if (any_live) {
                u32 b0, b1;
                if (PAIRED) {
                    const u32 other = __shfl_xor_sync(FULL, weights[0], 16);
                    b0 = sub ? other : weights[0];
                    b1 = sub ? weights[0] : other;
                } else {
                    b0 = weights[0];
                    b1 = weights[KEYS / 2 - 1];
                }
                Words<W>* v = ahead[i % AHEAD];
#pragma unroll
                for (int w = 0; w < W; ++w)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        u32 x = __byte_perm(v[0].x[w], v[1].x[w], half ? 0x7632 : 0x5410);
                        u32 y = __byte_perm(v[2].x[w], v[3].x[w], half ? 0x7632 : 0x5410);
                        const int tile = 4 * w + 2 * half;
                        mma(acc[tile], x & 0x000f000fu, x & 0x00f000f0u, y & 0x000f000fu, y & 0x00f000f0u, b0, b1);
                        x >>= 8, y >>= 8;
                        mma(acc[tile + 1], x & 0x000f000fu, x & 0x00f000f0u, y & 0x000f000fu, y & 0x00f000f0u, b0, b1);
                    }
                if (i + AHEAD < STEPS16) load(i + AHEAD, ahead[i % AHEAD]);
            }
        }
        const float whole = lived + skipped;
        total += whole;
        unread += skipped;
        surplus += here;
        spread += here * r_block;
        error += lived * e_block + skipped * r_block;
        apart += whole * (r_block + e_block);
        if (any_live) {  // scale the block's output by its frame
            float sum = lived;
            sum += __shfl_xor_sync(FULL, sum, 1);
            sum += __shfl_xor_sync(FULL, sum, 2);
            if (PAIRED) sum += __shfl_xor_sync(FULL, sum, 16);
            const float sum0 = __shfl_sync(FULL, sum, mine0 * 4), sum1 = __shfl_sync(FULL, sum, (mine0 + 1) * 4);
#pragma unroll
            for (int half = 0; half < 2; ++half) {  // low nibbles, then high
                const i64 at = block * D + half * (D / 2) + r * 4 * W;
                Words<2 * W> center;
                Words<W> scale;
                if constexpr (W == 1) scale.x[0] = *(const u32*)(value_scale + at);
                else scale = stream<W>((const u32*)(value_scale + at));
                center = stream<2 * W>((const u32*)(value_center + at));
                if (!PAIRED || t < 2)
#pragma unroll
                    for (int j = 0; j < TILES; ++j) {
                        const float s = table[(scale.x[j / 4] >> (8 * (j % 4))) & 255];
                        const float z = (j % 2 ? high_half(center.x[j / 2]) : low_half(center.x[j / 2])) - 8.0f * s;
                        const float up = half ? 0x1p20f * s : 0x1p24f * s;
                        const int channel = half * (D / 2) + r * 4 * W + j;
                        if (mine0 < G) out[warp][mine0][channel] += acc[j][half * 2] * up + sum0 * z;
                        if (mine0 + 1 < G) out[warp][mine0 + 1][channel] += acc[j][half * 2 + 1] * up + sum1 * z;
                    }
            }
        }
    }
    num_coarse = (int)sum_lanes<32>((float)num_coarse);
    if (lane == 0) {
        if (num_coarse) atomicAdd(mine + COARSE, num_coarse);
        if (num_value_blocks) atomicAdd(mine + VALUE_BLOCKS, num_value_blocks);
    }
    float one[7] = {total, floors, unread, surplus, spread, error, apart};
#pragma unroll
    for (int j = 0; j < 7; ++j) {
        one[j] += __shfl_xor_sync(FULL, one[j], 1);
        one[j] += __shfl_xor_sync(FULL, one[j], 2);
        if (PAIRED) one[j] += __shfl_xor_sync(FULL, one[j], 16);
        if (t == 0 && sub == 0 && real) sums[warp][head][j] = one[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < G * D; i += WARPS * 32) {
        float o = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) o += out[w][i / D][i % D];
        part_out[(((i64)pid * G + i / D) * gridDim.y + blockIdx.y) * D + i % D] = o;
    }
    for (int i = threadIdx.x; i < G * 7; i += WARPS * 32) {
        float o = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) o += sums[w][i / 7][i % 7];
        part_sums[(((i64)pid * G + i / 7) * gridDim.y + blockIdx.y) * 8 + i % 7] = o;
    }
}
