// The scan of one decode step in CUDA C++, compiled at run time: bounds, and histograms of them; the twin of scan.py and of the counting in
// resolve.py. The cuts are made by the kernel that needs them (cuts.cuh).
//
// A warp takes a block of keys. The query, scaled by the block's frame, is rounded to 16-bit integers whose high and low bytes are two
// columns of an m16n8k32 product of bytes: column 2 h is the high byte of head h, 2 h + 1 its low byte, so that a lane holds both sums of
// its head and joins them exactly. One AND makes an operand of codes; high nibbles count 16 times. Codes reach a lane through a queue of
// its own in shared memory, AHEAD tiles deep, by asynchronous copies of exactly the bytes that the lane itself reads: no lane waits for
// another. Frames and radii are copied one block ahead, and shared by the warp; a lane takes D / 32 channels of a frame apart for all.
// Tiles of a block's first and second half alternate: their radii share bytes.
// Macros: D, G, L, S, FRAME, DROP, FIXED, Q (type of the query: 0 float32, 1 float16, 2 bfloat16), WARPS, AHEAD.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) scan(
    const void* __restrict__ q, const u8* __restrict__ codes, const u16* __restrict__ channels, const u8* __restrict__ scale_codes,
    const u8* __restrict__ radius, const float* __restrict__ least, const float* __restrict__ unit, const float* __restrict__ scales,
    const float* __restrict__ weight, const int* __restrict__ num_blocks, const int* __restrict__ kv_start,
    const int* __restrict__ kv_len, const float* low, const int* floor_code, Code* __restrict__ upper, float* __restrict__ reach,
    int* hist, float* masses, int num_kv_heads, int capacity, int sinks, int recent, float scale, float slack_scaled,
    float slack_centered, float slack_fixed, float inflation) {
    extern __shared__ __align__(16) u8 memory[];
    Shared& s = *(Shared*)memory;
    const int pid = blockIdx.x, row = pid / num_kv_heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int r = lane / 4, t = lane % 4;    // row of a tile, and quarter of a key; for the query: column, and quarter of a half
    const int stride = gridDim.y * WARPS;
    const i64 base = (i64)pid * capacity;
    int b = blockIdx.y * WARPS + warp;

    u8* const queue = s.codes[warp][0] + r * (D / 2) + t * 4 * W;
    const u8* here = codes + ((base + b) * L + r) * (D / 2) + t * 4 * W;    // of a block's tokens r, what this lane reads
    i64 hop = (i64)stride * L * (D / 2);
    asm volatile("" : "+l"(hop));            // or it is computed anew for every tile
    auto fetch_tile = [&](const u8* from, u8* to) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 4 * W; i += (W >= 4 ? 16 : 8))
                copy_async<(W >= 4 ? 16 : 8)>(to + j * 4 * D + i, from + j * 4 * D + i);
    };
    auto fetch_frame = [&](int block, int slot) {  // all 16-byte pieces of a block's frame, spread over the warp
        const i64 at = base + block;
        u8* to = s.frames[warp][slot];
#pragma unroll
        for (int i = lane; i < (2 * D + RADII) / 16; i += 32)
            copy_async<16>(to + 16 * i, i < D / 8 ? (const u8*)(channels + at * D) + 16 * i : radius + at * RADII + (16 * i - 2 * D));
        if (lane < 2 * S) copy_async<4>(to + 2 * D + RADII + 4 * lane, (lane < S ? least : unit - S) + at * S + lane);
    };
    // The queues' first tiles are megabytes: what the start depends on is asked for before them, or would wait behind them.
    constexpr int THREADS = WARPS * 32;
    const int blocks = num_blocks[row], length = kv_len[row] - kv_start[row];
    float xs[(G * D + THREADS - 1) / THREADS], us[(G * D + THREADS - 1) / THREADS];
#pragma unroll
    for (int j = 0; j < (G * D + THREADS - 1) / THREADS; ++j) {
        const int i = threadIdx.x + j * THREADS;
        xs[j] = i < G * D ? query_at(q, (i64)pid * G * D + i) : 0.0f;
        us[j] = FRAME == 2 || i >= G * D ? 1.0f : weight[(i64)pid * D + i % D];
    }
    float table[(255 + THREADS) / THREADS];
#pragma unroll
    for (int j = 0; j < (255 + THREADS) / THREADS; ++j) table[j] = scales[min(threadIdx.x + j * THREADS, 255)];
    int widest_code = 0;
    if (b < blocks) {
        fetch_frame(b, 0);
        widest_code = scale_codes[base + b];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            fetch_tile(here + i / 2 * TILE_BYTES + i % 2 * HALF_BYTES, queue + i * TILE_BYTES);
            if (i % 2) commit();
        }
    }

#pragma unroll
    for (int j = 0; j < (255 + THREADS) / THREADS; ++j) if (threadIdx.x + j * THREADS < 256) s.table[threadIdx.x + j * THREADS] = table[j];
    for (int i = threadIdx.x; i < PLANES * CHANNELS * 32; i += THREADS)
        if (4 * (i / (CHANNELS * 32)) + (i % 32) / 8 >= G) s.query[0][0][i] = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < (G * D + THREADS - 1) / THREADS; ++j) {
        const int i = threadIdx.x + j * THREADS, g = i / D, d = i % D, h = d / (D / 2), c = d % (D / 2);
        if (i >= G * D) break;
        const float x = xs[j];
        s.query[g / 4][c % CHANNELS][((g % 4) * 2 + h) * 4 + c / CHANNELS] = make_float2(x, x * x * us[j]);
    }
    for (int i = threadIdx.x; i < G * BINS; i += THREADS) s.bins[0][i] = 0;
    __syncthreads();
    awaited();                             // where the grid lies, and clear histograms
    const Slack slack = {scale, slack_scaled, slack_centered, slack_fixed, inflation};
    float below[PLANES], kept[PLANES], lowest[PLANES], floors[PLANES], lifted[PLANES], levels_from[PLANES];
    int whole_floors[PLANES];
#pragma unroll
    for (int n = 0; n < PLANES; ++n) {
        below[n] = kept[n] = 0.0f;
        const int scaled_head = 4 * n + r / 2, mine = 4 * n + t;
        lowest[n] = scaled_head < G ? low[pid * G + scaled_head] : 0.0f;
        whole_floors[n] = mine < G ? floor_code[pid * G + mine] : 0;
        floors[n] = (float)whole_floors[n];
        lifted[n] = (floors[n] + 0.5f * BIN_CODES) * (LOG2E / STEPS) - BELOW * LOG2E;
        levels_from[n] = (0.5f - floors[n] / LEVEL) / LEVELS;   // half a level: to the nearest is upwards
    }
    int slot = 0;
    for (; b < blocks; b += stride, slot ^= 1, here += hop) {
        const int next = b + stride;
        const bool more = next < blocks;
        const i64 block = base + b;
        arrived<AHEAD / 2 - 1>();
        __syncwarp();
        const u8* const frame = s.frames[warp][slot];
        take_apart(s, frame, warp, lane, widest_code);
        if (more) {
            fetch_frame(next, slot ^ 1);  // joins the group of the next tile asked for
            widest_code = scale_codes[base + next];
        }
        __syncwarp();

        Asked asked;
        const bool fits = scale_query(s, frame, warp, lane, lowest, floors, slack, reach + block * (S + 2) * G, asked);
        const bool usable = __all_sync(FULL, fits);
        const int first = max(sinks - b * L, 0), span = usable ? max(length - recent - b * L - first, 0) : 0;
        u32 boundless = 0;
#pragma unroll
        for (int i = lane; i < RADII / 4; i += 32) {
            const u32 x = ((const u32*)(frame + 2 * D))[i], pairs = x & x >> 1;
            boundless |= pairs & pairs >> 2 & 0x11111111u;
        }
        const bool rare = span < L || first > 0 || __any_sync(FULL, boundless != 0);    // some key of the block is exact in any case

        const u8* ahead = here + (AHEAD == TILES ? hop : AHEAD / 2 * TILE_BYTES);    // of the tile to ask for next
        const u8* radii = frame + 2 * D + r * S;
        u8* own = queue;
        Code* staged = s.staged[warp][0] + t * STAGED + r;
        int from_first = r - first;
#pragma unroll 1
        for (int pair = 0; pair < TILES / 2; ++pair, ahead += TILE_BYTES, radii += 16 * S, staged += 16, from_first += 16) {
          u32 both[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) both[j] = S == 1 ? radii[8 * j] : S == 2 ? ((const u16*)radii)[8 * j] : ((const u32*)radii)[8 * j];
          if (AHEAD < TILES && pair == TILES / 2 - AHEAD / 2) ahead += hop - HALF_BYTES;
          const bool asks = more || (AHEAD < TILES && pair < TILES / 2 - AHEAD / 2);
          arrived<AHEAD / 2 - 1>();
          int lo[2][PLANES][4] = {}, hi[2][PLANES][4] = {};
#pragma unroll
          for (int second = 0; second < 2; ++second) {
            const u8* const from = own + second * TILE_BYTES;
            u32 a[W], c[W];
            if constexpr (W == 2) {
                const uint2 x = *(const uint2*)from, y = *(const uint2*)(from + 4 * D);
                a[0] = x.x, a[1] = x.y, c[0] = y.x, c[1] = y.y;
            } else
#pragma unroll
                for (int w = 0; w < W; w += 4) {
                    const uint4 x = *(const uint4*)(from + 4 * w), y = *(const uint4*)(from + 4 * D + 4 * w);
                    a[w] = x.x, a[w + 1] = x.y, a[w + 2] = x.z, a[w + 3] = x.w;
                    c[w] = y.x, c[w + 1] = y.y, c[w + 2] = y.z, c[w + 3] = y.w;
                }
#pragma unroll
            for (int w = 0; w < W; w += 2)
#pragma unroll
                for (int n = 0; n < PLANES; ++n) {
                    product(lo[second][n], a[w] & 0x0f0f0f0fu, c[w] & 0x0f0f0f0fu, a[w + 1] & 0x0f0f0f0fu, c[w + 1] & 0x0f0f0f0fu, asked.p[n][0][w], asked.p[n][0][w + 1]);
                    product(hi[second][n], a[w] & 0xf0f0f0f0u, c[w] & 0xf0f0f0f0u, a[w + 1] & 0xf0f0f0f0u, c[w + 1] & 0xf0f0f0f0u, asked.p[n][1][w], asked.p[n][1][w + 1]);
                }
          }
          // What was in the queue has been read: ask for the pair AHEAD / 2 of this one.
          if (asks) {
            fetch_tile(ahead, own);
            fetch_tile(ahead + HALF_BYTES, own + TILE_BYTES);
          }
          commit();
          float width[PLANES][4], position[PLANES][4];     // of the keys r + 8 j of either tile
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int j = i % 2;
            const bool second = i / 2;
            const u32 packed = both[j] & (second ? 0xf0f0f0f0u : 0x0f0f0f0fu);
#pragma unroll
            for (int n = 0; n < PLANES; ++n) {
                const int* const low_sums = lo[second][n] + 2 * j;
                const int* const high_sums = hi[second][n] + 2 * j;
                const int high = low_sums[0] * 16 + high_sums[0], fine = low_sums[1] * 16 + high_sums[1];
                width[n][i] = asked.base_width[n][second];
#pragma unroll
                for (int m = 0; m < S; ++m)                // a code's byte in these bits: the code, and the zero of its half
                    width[n][i] = fmaf(__uint_as_float(__byte_perm(packed, second ? 0x45000000u : 0x47000000u, 0x7404 | m << 4)), asked.factor[n][m], width[n][i]);
                // The offset holds the step that rounding down may cost.
                position[n][i] = sum_clamped(fmaf((float)(high * 256 + fine), asked.step[n], asked.offset[n]), width[n][i]);
            }
          }
          if (rare) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                bool decided = (u32)(from_first + i % 2 * 8 + i / 2 * (L / 2)) >= (u32)span;
#pragma unroll
                for (int m = 0; m < S; ++m) decided = decided || (both[i % 2] >> (8 * m + 4 * (i / 2)) & 15) == 15;
#pragma unroll
                for (int n = 0; n < PLANES; ++n) position[n][i] = decided ? 1.0f : position[n][i];
            }
          }
          float lower[PLANES][4];
          int over[PLANES][4];
          bool some = false, counts[PLANES][4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int n = 0; n < PLANES; ++n) {
                const int mine = 4 * n + t;
                const float at = position[n][i];
                const float rounded = DROP ? fmaf(__saturatef(fmaf(at, SPAN / (LEVEL * LEVELS), levels_from[n])), LEVELS, WHOLE + LOWEST) : fmaf(at, SPAN, WHOLE + SIGNED);
                if (mine < G) staged[4 * n * STAGED + i % 2 * 8 + i / 2 * (L / 2)] = (Code)__float_as_int(rounded);
                // From half a bin above the floor: rounded to the nearest, it is the bin or the one below.
                lower[n][i] = at - fmaf(2.0f, width[n][i], asked.drop[n]);
                const bool inside = mine < G && at < (SPAN - 0.5f) / SPAN, reaches = inside && lower[n][i] >= FIRST_BIN * BIN_CODES / SPAN;
                if (DROP) counts[n][i] = reaches;
                else {
                    over[n][i] = __float_as_int(rounded) - (WHOLE_BITS + SIGNED) - whole_floors[n];
                    const float weight_up = exp2_fast(fmaf(at, SPAN * LOG2E / STEPS, -BELOW * LOG2E));
                    const float weight_down = exp2_fast(fmaf(lower[n][i], SPAN * LOG2E / STEPS, lifted[n]));
                    counts[n][i] = inside && over[n][i] >= 0;
                    below[n] += inside && over[n][i] < 0 ? weight_up : 0.0f;
                    kept[n] += reaches ? weight_down : 0.0f;
                }
                some = some || counts[n][i];
            }
          if (DROP && rare)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int n = 0; n < PLANES; ++n)
                    if (4 * n + t < G && position[n][i] >= 1.0f) staged[4 * n * STAGED + i % 2 * 8 + i / 2 * (L / 2)] = (Code)ALWAYS;
          if (some)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int n = 0; n < PLANES; ++n) {
                    const int bin = DROP ? __float_as_int(fmaf(lower[n][i], SPAN / BIN_CODES, WHOLE + LOWEST + 1)) - WHOLE_BITS : (int)((u32)over[n][i] / (u32)BIN_CODES);
                    if (counts[n][i]) atomicAdd(&s.bins[4 * n + t][min(bin, DROP ? TOP : BINS - 1)], 1);
                }
          own += 2 * TILE_BYTES;
          if (AHEAD < TILES && own == queue + AHEAD * TILE_BYTES) own = queue;
        }
        __syncwarp();
        uint4* to = (uint4*)(upper + block * G * L);
        constexpr int PIECE = 16 / sizeof(Code);
#pragma unroll
        for (int i = lane; i < G * L / PIECE; i += 32) to[i] = *(const uint4*)&s.staged[warp][i / (L / PIECE)][i % (L / PIECE) * PIECE];
    }
    arrived<0>();

    if (!DROP) {
#pragma unroll
        for (int n = 0; n < PLANES; ++n) {
            for (int m = 4; m < 32; m *= 2) {
                below[n] += __shfl_xor_sync(FULL, below[n], m);
                kept[n] += __shfl_xor_sync(FULL, kept[n], m);
            }
            if (lane < 4 && 4 * n + t < G) {
                if (below[n] > 0.0f) atomicAdd(&masses[(pid * G + 4 * n + t) * 2], below[n]);
                if (kept[n] > 0.0f) atomicAdd(&masses[(pid * G + 4 * n + t) * 2 + 1], kept[n]);
            }
        }
    }
    let_next_start();
    __syncthreads();
    // Handed on, all that a thread reads at once.
    constexpr int OWN_BINS = (G * BINS + THREADS - 1) / THREADS;
    int counted[OWN_BINS];
#pragma unroll
    for (int j = 0; j < OWN_BINS; ++j) {
        const int i = threadIdx.x + j * THREADS;
        counted[j] = i < G * BINS ? s.bins[0][i] : 0;
    }
#pragma unroll
    for (int j = 0; j < OWN_BINS; ++j)
        if (counted[j]) atomicAdd(&hist[pid * G * BINS + threadIdx.x + j * THREADS], counted[j]);
}
