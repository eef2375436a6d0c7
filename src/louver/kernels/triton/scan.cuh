// What the scan takes apart and scales once a block: a frame, and the query by it. Read by scan.cu, whose macros these are.
#define W (D / 32)                         // 32-bit words of codes per lane and key
#define TILES (L / 16)
#define PLANES ((G + 3) / 4)               // groups of four heads
#define CHANNELS (4 * W)                   // channels of the query a lane scales: a quarter of one half
#define QUARTER (CHANNELS + 2)             // of a frame taken apart, padded against bank conflicts
#define TILE_BYTES (8 * D)
#define HALF_BYTES (L / 2 * (D / 2))       // of a block's codes
#define RADII (L / 2 * S)
#define FRAME_BYTES (2 * D + RADII + 32)   // channels, radii, where radii begin, their units
#define QUANTA 32512.0f                    // steps the largest channel of the scaled query is given
#define WHOLE 12582912.0f                  // 1.5 2^23: added to it, a float's low bits are a whole number; conversions are few a clock
#define WHOLE_BITS 0x4b400000
#define SPAN 65535.0f                      // codes of the grid: positions on it are kept from 0 to 1, where clamping is free
#define LOW_ZERO 32768.0f                  // a byte in the second byte of this float's bits adds its value,
#define HIGH_ZERO 2048.0f                  // of this one's a sixteenth: a high nibble its code
#define STAGED (L + 16 / (int)sizeof(Code))    // codes of a head, padded against bank conflicts
#define LEVELS (TOP - LOWEST)
#define FIRST_BIN (DROP ? COUNTED - LOWEST - 1.5f : -0.5f)   // half a bin below what is counted, in bins from where they begin

__device__ __forceinline__ void product(int c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float sum_clamped(float a, float b) {
    float r;
    asm("add.sat.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
struct Shared {
    float table[256];
    float2 query[PLANES][CHANNELS][32];    // q, and q^2 times the metric's weight, as lanes read them
    int bins[G][BINS];
    Code staged[WARPS][G][STAGED];
    float2 apart[WARPS][8][QUARTER];       // scale, and center in 128ths of it, by lane's quarter
    u8 frames[WARPS][2][FRAME_BYTES];
    u8 codes[WARPS][AHEAD][TILE_BYTES];
};
// A lane takes W channels of a frame apart, for all of its warp.
__device__ __forceinline__ void take_apart(Shared& s, const u8* frame, int warp, int lane, int widest_code) {
    const u32* const packed = (const u32*)(frame + 2 * W * lane);
    const float* const scale_of = s.table + widest_code;
    float4* const to = (float4*)&s.apart[warp][lane / 4][W * (lane % 4)];
#pragma unroll
    for (int i = 0; i < W / 2; ++i) {
        const u32 word = packed[i], centers = (word & 0xffc0ffc0u) ^ 0x80008000u;
        to[i] = make_float4(
            scale_of[-(int)(word & 63)], __uint_as_float(__byte_perm(centers, 0x4b000000u, 0x7410)) - CENTER_ZERO,
            scale_of[-(int)(word >> 16 & 63)], __uint_as_float(__byte_perm(centers, 0x4b000000u, 0x7432)) - CENTER_ZERO);
    }
}
struct Asked {                             // what a block is asked: the query in its frame, and what goes with its bounds, of the heads a lane holds
    u32 p[PLANES][2][W];
    float offset[PLANES], step[PLANES], factor[PLANES][S], drop[PLANES], base_width[PLANES][2];
};
struct Slack { float scale, scaled, centered, fixed, inflation; };
// Scale the query by a block's frame, and round it; ``reach``: of the block. False where what a lane made is not finite enough.
__device__ __forceinline__ bool scale_query(
    const Shared& s, const u8* frame, int warp, int lane, const float (&lowest)[PLANES], const float (&floors)[PLANES],
    const Slack& given, float* reach, Asked& to) {
    const int r = lane / 4, t = lane % 4, half = r % 2;
    const bool odd = half;
    const float scale = given.scale, step_share = STEPS / SPAN, k = scale * step_share;
    bool fits = true;
#pragma unroll
    for (int n = 0; n < PLANES; ++n) {
        float part[CHANNELS], bias = 0.0f, centered = 0.0f, square = 0.0f, widest = 0.0f;
        const float4* const channel = (const float4*)s.apart[warp][4 * half + t];
#pragma unroll
        for (int c = 0; c < CHANNELS; c += 2) {
            const float4 two = channel[c / 2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float2 x = s.query[n][c + j][lane];
                const float sigma = j ? two.z : two.x, y = x.x * sigma, z = y * (j ? two.w : two.y);
                part[c + j] = y;
                widest = fmaxf(widest, fabsf(y));
                bias += z;
                centered += fabsf(z);
                square += FRAME == 1 ? x.y * sigma : x.y;
            }
        }
        bias *= 0x1p-7f;
        centered *= 0x1p-7f;
#pragma unroll
        for (int m = 1; m <= 4; m *= 2) {
            widest = fmaxf(widest, __shfl_xor_sync(FULL, widest, m));
            bias += __shfl_xor_sync(FULL, bias, m);
            centered += __shfl_xor_sync(FULL, centered, m);
            if (m == 1 || (m == 2 && S < 4)) square += __shfl_xor_sync(FULL, square, m);
        }
        const float size = fmaxf(widest, 1e-30f), inverse = __fdividef(QUANTA, size);
#pragma unroll
        for (int w = 0; w < W; ++w) {
            u32 whole[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) whole[j] = __float_as_uint(fmaf(part[4 * w + j], inverse, WHOLE + 128.0f));
            const u32 x = __byte_perm(whole[0], whole[1], 0x5410), y = __byte_perm(whole[2], whole[3], 0x5410);
            const u32 fine = __byte_perm(x, y, 0x6420) ^ 0x80808080u, coarse = __byte_perm(x, y, 0x7531);
            const u32 other = __shfl_xor_sync(FULL, odd ? coarse : fine, 4);  // the partner scaled the other half
            to.p[n][0][w] = odd ? other : coarse;
            to.p[n][1][w] = odd ? fine : other;
        }
        float squares[S];
        if (S == 1) squares[0] = square + __shfl_xor_sync(FULL, square, 4);
        if (S == 2) {
            const float other = __shfl_xor_sync(FULL, square, 4);
            squares[0] = odd ? other : square;
            squares[S - 1] = odd ? square : other;
        }
        if (S == 4) {
#pragma unroll
            for (int j = 0; j < S; ++j) squares[j] = __shfl_sync(FULL, square, (lane & ~7) | (4 * (j / 2)) | (2 * (j % 2)));
        }
        const float* const leasts = (const float*)(frame + 2 * D + RADII);
        const float slack = given.scaled * size + given.centered * centered + given.fixed;
        const float allowed = (fabsf(lowest[n]) + scale * (centered + 8.0f * D * size)) * 0x1p-19f;  // rounding of what follows, nats
        float mine_offset = bias * k + (slack * scale - lowest[n] + allowed) * step_share + 1.0f / SPAN;
        float mine_factor[S], mine_least = 0.0f, reached = slack * scale + 2.0f * allowed;
        const float doubt = reached * step_share;
        const bool writes = !DROP && t == 0 && !odd && 4 * n + r / 2 < G;    // `reach` is for who weighs keys by it
        float* const out = reach + 4 * n + r / 2;
        float most = 0.0f;
#pragma unroll
        for (int j = 0; j < S; ++j) {
            const float norm = root(squares[j]) * given.inflation * scale;
            mine_factor[j] = norm * leasts[S + j];
            mine_least = fmaf(norm, leasts[j], mine_least);
            most += mine_factor[j];
            if (writes) out[j * G] = mine_factor[j];
        }
        reached += mine_least;
        most = fmaf(most, 14.0f, reached);
        fits = fits && size < 1e30f && fabsf(mine_offset) < 1e30f && most < 1e27f;
        if (writes) out[S * G] = reached;
        if (writes) out[(S + 1) * G] = most;
        const int holder = 8 * t;        // a lane that scaled the head whose results this lane holds
        to.step[n] = __shfl_sync(FULL, size * (0.0625f / QUANTA) * k, holder);    // of sixteenths, as codes are summed
        to.drop[n] = fmaf(2.0f, __shfl_sync(FULL, doubt, holder), (3.0f + floors[n] + BIN_CODES / 2) * (1.0f / SPAN));
        to.base_width[n][0] = to.base_width[n][1] = __shfl_sync(FULL, mine_least * (step_share * (1.0f + 0x1p-18f)), holder);
#pragma unroll
        for (int j = 0; j < S; ++j) {
            to.factor[n][j] = __shfl_sync(FULL, mine_factor[j] * (step_share * (1.0f + 0x1p-18f)), holder);
            to.base_width[n][0] -= (LOW_ZERO - 0x1p-6f) * to.factor[n][j];    // 2^-6: what rounding of sums with LOW_ZERO costs, and more
            to.base_width[n][1] -= (HIGH_ZERO - 0x1p-6f) * to.factor[n][j];
        }
        // 8 sum(p), in whole numbers: every row of the result is the same.
        int zero[4] = {};
#pragma unroll
        for (int w = 0; w < W; w += 2)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                product(zero, 0x08080808u, 0x08080808u, 0x08080808u, 0x08080808u, to.p[n][h][w], to.p[n][h][w + 1]);
        to.offset[n] = fmaf((float)(zero[0] * 256 + zero[1]), -16.0f * to.step[n], __shfl_sync(FULL, mine_offset, holder));
    }
    return fits;
}
