// Nothing dropped: make this step's cuts (every CTA does, as in list.cu), list the exact keys, attend every other closed key with its estimated weight and sketched value; the twin of
// tiers_kernel, with the same sums. A warp takes a block. Values are the first operand of an m16n8k16 product (channels x keys), weights
// the second: a byte of codes from each of two keys makes two operands with one AND each. A lane computes the weights of one query
// head, so the certificate's sums stay in its registers.
//
// What decides and weighs keys is copied to shared memory two blocks ahead; so the live keys of the next block are known while this one
// is summed, and their values come through a queue of the lane's own, AHEAD steps of 16 keys deep. A slot of a key that is not live
// holds what was there: any nibble is a number, and its weight is zero. Macros: D, G, L, S, WARPS, AHEAD.
#define KEYS (PAIRED ? 2 : 4)           // keys of a step of 16 a lane weighs
#define STEPS16 (L / 16)
#define W (D / 64)                      // 32-bit words of value codes a lane reads of a key
#define TILES (D / 16)
#define WEIGHT_SLACK 0x1p-10f
#define ROW (2 * L + 32)                // bytes of a head's codes, padded against bank conflicts
#define OUT_HALF (D / 2 + 16)
#define OUT_ROW (D + 36)
#define REACH ((S + 2) * G * 4)
#define BYTE_ZERO 32768.0f              // a byte in the second byte of this float's bits adds its value: conversions are few a clock
#define HALF_ZERO 8388608.0f            // 2^23: so does a half in its low bits

struct __align__(16) Block {            // what decides and weighs a block's keys, and the frame of its values
    u8 upper[G][ROW];
    u8 radius[L / 2 * S];
    u8 frame[2 * D];
    u8 reach[(REACH + 15) / 16 * 16];
    float spread, error, unused[2];
};
struct Shared {
    float table[256];
    union {
        float out[WARPS][G][OUT_ROW];      // by half, channel of a lane, and lane: no two of a warp's lanes meet in a bank
        int bins[G][BINS + 32];            // before: to make the cuts of
    };
    int cuts[G][2];
    float taus[G];
    float sums[WARPS][G][7];
    Block blocks[WARPS][3];
    u32 values[WARPS][AHEAD][4][32][W];
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) tiers(
    const u8* upper, const u8* reach, const u8* __restrict__ radius, const u8* __restrict__ value_codes,
    const u8* __restrict__ value_frame, const u8* __restrict__ value_scale, const float* __restrict__ value_error,
    const float* __restrict__ value_spread, const float* __restrict__ scales, const int* __restrict__ num_blocks, const float* low,
    const int* hist, const int* floor_code, const float* masses, const int* __restrict__ kv_start, const int* __restrict__ kv_len,
    int* __restrict__ cuts, float* __restrict__ tau, int* __restrict__ listed, int* counters, float* __restrict__ part_out,
    float* __restrict__ part_sums, int num_kv_heads, int capacity, int room, float scale, i64 share, i64 tolerance, int count,
    float unread_mass) {
    extern __shared__ __align__(16) u8 memory[];
    Shared& s = *(Shared*)memory;
    const int pid = blockIdx.x, row = pid / num_kv_heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int r = lane / 4, t = lane % 4;
    const int blocks = num_blocks[row], stride = gridDim.y * WARPS;
    int b = blockIdx.y * WARPS + warp;
    auto fetch_frame = [&](int block, int slot) {   // of a block, what no kernel of the step writes
        const i64 at = (i64)pid * capacity + block;
        Block& to = s.blocks[warp][slot];
        auto pieces = [&](u8* into, const u8* from, int bytes) {
            for (int i = lane; i < bytes / 16; i += 32) copy_async<16>(into + 16 * i, from + 16 * i);
        };
        pieces(to.radius, radius + at * (L / 2) * S, L / 2 * S);
        pieces(to.frame, value_frame + at * 2 * D, 2 * D);
        if (lane == 0) copy_async<4>(&to.spread, value_spread + at);
        if (lane == 1) copy_async<4>(&to.error, value_error + at);
    };
    auto fetch_bounds = [&](int block, int slot) {
        const i64 at = (i64)pid * capacity + block;
        Block& to = s.blocks[warp][slot];
#pragma unroll
        for (int i = lane; i < G * L / 8; i += 32)
            copy_async<16>(&to.upper[i / (L / 8)][16 * (i % (L / 8))], upper + at * G * L * 2 + 16 * i);
        for (int i = lane; i < REACH / 4; i += 32) copy_async<4>(to.reach + 4 * i, reach + at * REACH + 4 * i);
    };
    if (b < blocks) fetch_frame(b, 0);
    if (b + stride < blocks) fetch_frame(b + stride, 1);
    for (int i = threadIdx.x; i < 256; i += WARPS * 32) s.table[i] = scales[i];
    const int length = kv_len[row] - kv_start[row];
    awaited();
    let_next_start();
    int4 some[BIN_PIECES(WARPS * 32)];
    read_bins<WARPS * 32>(hist + pid * G * BINS, some);
    if (b < blocks) fetch_bounds(b, 0);
    commit();
    if (b + stride < blocks) fetch_bounds(b + stride, 1);
    commit();

    pad_bins<WARPS * 32>(some, s.bins);
    __syncthreads();
    for (int g = warp; g < G; g += WARPS) {
        const int id = pid * G + g;
        make_cuts(s.bins[g], floor_code[id], low[id], masses[id * 2], masses[id * 2 + 1], needed(length, share, tolerance, count), scale,
                  unread_mass, s.cuts[g], s.taus + g);
        if (blockIdx.y == 0 && lane == 0) cuts[id * 2] = s.cuts[g][0], cuts[id * 2 + 1] = s.cuts[g][1], tau[id] = s.taus[g];
    }
    __syncthreads();
    for (int i = lane; i < G * OUT_ROW; i += 32) s.out[warp][0][i] = 0.0f;

    int* mine = counters + pid * COUNTERS;
    const int head = PAIRED ? r % 4 : r, sub = PAIRED ? r / 4 : 0;
    const bool real = head < G;
    const int id = pid * G + (real ? head : 0);
    const int cut = s.cuts[real ? head : 0][0] - SIGNED, readable = s.cuts[real ? head : 0][1] - SIGNED;    // as codes are stored
    const float hidden = 2.002f / STEPS + (fabsf(low[id]) + 64.0f) * 0x1p-19f;
    const int mine0 = 2 * (PAIRED ? t % 2 : t);                  // heads of this lane's results
    float total = 0.0f, floors = 0.0f, unread = 0.0f, surplus = 0.0f, spread = 0.0f, error = 0.0f, apart = 0.0f;
    int num_coarse = 0, num_value_blocks = 0;

    // Which keys are exact for some head, and which are read by some head: four bits a step and lane, keys 4 t ... 4 t + 3.
    auto decide = [&](const Block& of, int block, u32& exact, u32& live) {
        u32 reached = 0, read = 0;
#pragma unroll
        for (int i = 0; i < STEPS16; ++i) {
            const u32* codes = (const u32*)(of.upper[real ? head : 0] + 2 * (i * 16 + 4 * t + 2 * sub));
#pragma unroll
            for (int j = 0; j < KEYS; ++j) {
                const int code = j % 2 ? (int)codes[j / 2] >> 16 : (int)(short)codes[j / 2];
                const u32 bit = 1u << (4 * i + j) << (2 * sub);
                if (real && code >= cut) reached |= bit;
                if (real && code >= readable) read |= bit;
            }
        }
#pragma unroll
        for (int m = 4; m < 32; m *= 2) {
            reached |= __shfl_xor_sync(FULL, reached, m);
            read |= __shfl_xor_sync(FULL, read, m);
        }
        exact = reached;
        live = read & ~reached;
        // List the exact keys: lane t of head 0 has them all.
        if (__any_sync(FULL, exact != 0)) {
            const int number = r == 0 ? __popc(exact) : 0;
            int before = number;
            for (int m = 1; m < 4; m *= 2) { int y = __shfl_up_sync(FULL, before, m, 4); if (t >= m) before += y; }
            int at = 0;
            if (lane == 3) at = atomicAdd(mine + LISTED, before);
            at = __shfl_sync(FULL, at, 3) + before - number;
            if (r == 0)
                for (u32 left = exact; left; left &= left - 1) {
                    const int bit = __ffs(left) - 1, in_block = (bit / 4) * 16 + 4 * t + bit % 4;
                    const int code = *(const short*)(of.upper[0] + 2 * in_block) + SIGNED;
                    if (at < room) listed[(i64)pid * room + at] = (block * L + in_block) | (code == ALWAYS ? DECIDED : 0);
                    ++at;
                }
        }
        if (r == 0) num_coarse += __popc(live);
        num_value_blocks += __any_sync(FULL, live != 0);
    };
    const u8* const values_at = value_codes + ((i64)pid * capacity * L + 4 * t) * (D / 2) + r * 4 * W;
    auto fetch_values = [&](const u8* from, int slot, u32 four) {  // a step's keys of this lane that are alive
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if ((four >> j) & 1) copy_async<4 * W>(s.values[warp][slot][j][lane], from + j * (D / 2));
    };
    u32 exact = 0, live = 0;
    arrived<1>();
    __syncwarp();
    if (b < blocks) decide(s.blocks[warp][0], b, exact, live);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        fetch_values(values_at + ((i64)b * L + i * 16) * (D / 2), i, live >> (4 * i));
        commit();
    }
    for (int slot = 0; b < blocks; b += stride, slot = slot == 2 ? 0 : slot + 1) {
        const Block& here_block = s.blocks[warp][slot];
        const int next = b + stride;
        // The groups of a turn: AHEAD of values are behind the next block's, which was asked for a turn ago.
        arrived<AHEAD - 1>();
        __syncwarp();
        u32 next_exact = 0, next_live = 0;
        if (next < blocks) decide(s.blocks[warp][slot == 2 ? 0 : slot + 1], next, next_exact, next_live);
        if (next + stride < blocks) {   // joins the group of the next step
            fetch_frame(next + stride, slot == 0 ? 2 : slot - 1);
            fetch_bounds(next + stride, slot == 0 ? 2 : slot - 1);
        }

        const int widest = value_scale[(i64)pid * capacity + b];
        const float* reached = (const float*)here_block.reach + (real ? head : 0);
        // In steps of log2: half-width = base + sum of codes times factors, weight = 2^(at code - half-width).
        float factor[S], base = (reached[S * G] * (1.0f + 0x1p-18f) + hidden) * LOG2E;
#pragma unroll
        for (int j = 0; j < S; ++j) {
            factor[j] = reached[j * G] * (LOG2E * (1.0f + 0x1p-17f));
            base -= (BYTE_ZERO - 0x1p-6f) * factor[j];
        }
        const float from_cut = 15.0f - (cut + SIGNED) * (LOG2E / STEPS), grown = WEIGHT_SLACK * LOG2E;
        const bool any_live = __any_sync(FULL, live != 0);
        float acc[TILES][4];
#pragma unroll
        for (int j = 0; j < TILES; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.0f;
        float here = 0.0f, lived = 0.0f, skipped = 0.0f;
        const u32 exact_mine = exact >> (2 * sub), live_mine = live >> (2 * sub);
#pragma unroll 1
        for (int turn = 0; turn < STEPS16 / AHEAD; ++turn) {
          // What a step leaves empty in the queue is filled for the step AHEAD of it.
          const bool wraps = turn == STEPS16 / AHEAD - 1;
          const u8* const from = values_at + (i64)(wraps ? next : b) * (L * (D / 2)) + (wraps ? 0 : (turn + 1) * AHEAD * 8 * D);
          const u32 wanted = wraps ? next_live : live >> (4 * AHEAD * (turn + 1));
          const u32 exact_now = exact_mine >> (4 * AHEAD * turn), live_now = live_mine >> (4 * AHEAD * turn);
#pragma unroll
          for (int i = 0; i < AHEAD; ++i) {
            if (turn || i) arrived<AHEAD - 1>();
            const int first = (turn * AHEAD + i) * 16 + 4 * t + 2 * sub;
            const u32* codes = (const u32*)(here_block.upper[real ? head : 0] + 2 * first);
            const bool second = turn * AHEAD + i >= STEPS16 / 2;    // of the block's halves, whose radii share bytes
            const u8* radii = here_block.radius + (first - (second ? L / 2 : 0)) * S;
            u32 weights[KEYS / 2];
#pragma unroll
            for (int j = 0; j < KEYS; ++j) {
                if (j % 2 == 0) weights[j / 2] = 0;
                const u32 both = codes[j / 2] ^ (SIGNED | SIGNED << 16);
                const float code = __uint_as_float(__byte_perm(both, 0x4b000000u, j % 2 ? 0x7432 : 0x7410)) - HALF_ZERO;
                // The radii of two keys lie in one word where they are one or two bytes each.
                const u32 both_radii = S == 4 ? ((const u32*)radii)[j] : S == 2 ? ((const u32*)radii)[j / 2] : ((const u16*)radii)[j / 2];
                const u32 packed = both_radii >> (second ? 4 : 0) & 0x0f0f0f0fu;
                float width = base;
#pragma unroll
                for (int m = 0; m < S; ++m) {
                    const int byte = S == 4 ? m : (j % 2) * S + m;
                    width = fmaf(__uint_as_float(__byte_perm(packed, 0x47000000u, 0x7404 | byte << 4)), factor[m], width);
                }
                const float place = fmaf(code, LOG2E / STEPS, from_cut);
                const u32 bit = 1u << (4 * i + j);
                const bool sketched = real && !(exact_now & bit), alive = live_now & bit, placed = code > 0.0f;
                const float estimate = exp2_fast(place - width);
                const u32 rounded = pack(sketched && placed ? estimate : 0.0f, 0.0f);
                const float a = low_half(rounded);
                const float grow = exp2_fast(width + grown), shrink = exp2_fast(-grown - width) * 0.99999f;
                float lost = 0x1p-25f * grow;
                if (!placed) lost = exp2_fast(place + LOG2E / STEPS);
                const float more = fmaf(a * 1.00001f, grow, lost) - a * 0.99999f;
                here += sketched ? more : 0.0f;
                floors = fmaf(fmaxf(a - 0x1p-25f, 0.0f), shrink, floors);
                lived += alive ? a : 0.0f;
                skipped += a;
                if (alive) weights[j / 2] |= j % 2 ? rounded << 16 : rounded;
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
                u32 v[4][W];
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int w = 0; w < W; ++w) v[j][w] = s.values[warp][i][j][lane][w];
#pragma unroll
                for (int w = 0; w < W; ++w)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        u32 x = __byte_perm(v[0][w], v[1][w], half ? 0x7632 : 0x5410);
                        u32 y = __byte_perm(v[2][w], v[3][w], half ? 0x7632 : 0x5410);
                        const int tile = 4 * w + 2 * half;
                        mma(acc[tile], x & 0x000f000fu, x & 0x00f000f0u, y & 0x000f000fu, y & 0x00f000f0u, b0, b1);
                        x >>= 8, y >>= 8;
                        mma(acc[tile + 1], x & 0x000f000fu, x & 0x00f000f0u, y & 0x000f000fu, y & 0x00f000f0u, b0, b1);
                    }
            }
            fetch_values(from + i * 8 * D, i, wanted >> (4 * i));
            commit();
          }
        }
        skipped -= lived;
        const float whole = lived + skipped, r_block = here_block.spread, e_block = here_block.error;
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
            sum *= 0x1p-7f;                  // centers come in 128ths of the scale
            const float sum0 = __shfl_sync(FULL, sum, mine0 * 4), sum1 = __shfl_sync(FULL, sum, (mine0 + 1) * 4);
#pragma unroll
            for (int pass = 0; pass < (PAIRED ? 1 : 2); ++pass) {   // paired columns are the same: half of the lanes take each half
                const int half = PAIRED ? t / 2 : pass, at = half * (D / 2) + r * 4 * W;
                const u32* channels = (const u32*)(here_block.frame + 2 * at);
                const float* const scale_of = s.table + widest;
                const float lift = half ? 0x1p20f : 0x1p24f;
                float* const to = s.out[warp][0] + half * OUT_HALF + r;
#pragma unroll
                for (int j = 0; j < TILES; ++j) {
                    const u32 word = channels[j / 2], center = (word & 0xffc0ffc0u) ^ 0x80008000u;
                    const float sigma = scale_of[-(int)(word >> 16 * (j % 2) & 63)];
                    // 64 centers, less 16: of codes' sums as of centers, half a scale counts 64
                    const float z = __uint_as_float(__byte_perm(center, 0x4b000000u, j % 2 ? 0x7432 : 0x7410)) - (CENTER_ZERO + 1024.0f);
                    const float x0 = half ? acc[j][2] : acc[j][0], x1 = half ? acc[j][3] : acc[j][1];
                    if (mine0 < G) to[mine0 * OUT_ROW + 8 * j] += sigma * fmaf(sum0, z, x0 * lift);
                    if (mine0 + 1 < G) to[(mine0 + 1) * OUT_ROW + 8 * j] += sigma * fmaf(sum1, z, x1 * lift);
                }
            }
        }
        exact = next_exact;
        live = next_live;
    }
    arrived<0>();
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
        if (t == 0 && sub == 0 && real) s.sums[warp][head][j] = one[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < G * D; i += WARPS * 32) {
        const int within = i % (D / 2), from = (i % D) / (D / 2) * OUT_HALF + within % TILES * 8 + within / TILES;
        float o = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) o += s.out[w][i / D][from];
        part_out[(((i64)pid * G + i / D) * gridDim.y + blockIdx.y) * D + i % D] = o;
    }
    for (int i = threadIdx.x; i < G * 7; i += WARPS * 32) {
        float o = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) o += s.sums[w][i / 7][i % 7];
        part_sums[(((i64)pid * G + i / 7) * gridDim.y + blockIdx.y) * 8 + i % 7] = o;
    }
}
