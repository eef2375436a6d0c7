// What scan.cu is written in: its sizes, the forms in which numbers lie in floats' bits, a product of bytes, and what a CTA shares.
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
#define STAGED (L + 8)                     // codes of a head, padded against bank conflicts

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
    u16 staged[WARPS][G][STAGED];
    float2 apart[WARPS][8][QUARTER];       // scale, and center in 128ths of it, by lane's quarter
    u8 frames[WARPS][2][FRAME_BYTES];
    u8 codes[WARPS][AHEAD][TILE_BYTES];
};

