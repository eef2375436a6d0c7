// What the CUDA kernels of a step share; the constants are those of common.py. Every file is compiled with this text before it.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

#define PAIRED (G <= 4)                                   // columns 4..7 repeat heads 0..3, for the other half of the rows
#define STEPS 1024.0f
#define BELOW 20.0f
#define LOG2E 1.4426950408889634f
// A retrieval (DROP) keeps an upper bound as a byte: LOWEST says that it lies at most at the code where its head's levels begin, each level
// above allows LEVEL codes more, TOP says nothing, ALWAYS that the key is exact in any case. A level times LEVEL_BITS are the bits of a
// float16 that holds its weight (list.cu). A lower bound is counted in the level that an upper bound just above it has.
#define LEVEL_BITS 96                                     // 1024ths of an octave
#define LEVEL (LEVEL_BITS * 0.69314718f)                  // codes: 0.065 nats
#define LOWEST 11                                         // the first level whose bits are no subnormal's
#define TOP 254
#define SUNK 62                                           // levels, 4 nats, for the mass of keys below those that may be a cut's
#define COUNTED (LOWEST + 1 + (FIXED ? 0 : SUNK))         // the first level that lower bounds are counted in
#if DROP
#define BINS 256                                          // of levels
#define BIN_CODES LEVEL
#define ALWAYS 255
typedef u8 Code;
#else
#define BINS 1024                                         // 32 nats
#define BIN_CODES 32
#define ALWAYS 65535
typedef u16 Code;
#endif
#define PER (BINS / 32)                                   // bins a lane reads off when the cuts are made
#define FULL 0xffffffffu
#define SIGNED 32768
#define DECIDED (1 << 30)
#define RANK_BINS 1024
#define RANK_CODES 4
#define COUNTERS 8
enum { LISTED, COARSE, VALUE_BLOCKS, SPREAD, RANKED, EXACT };
#define CENTER_ZERO 8421376.0f                            // 2^23 + 512 * 64: what is added to 64 centers where a channel lies in 2^23's bits
#define INFINITE __int_as_float(0x7f800000)

__device__ __forceinline__ u32 pack(float a, float b) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
}
__device__ __forceinline__ float low_half(u32 x) {
    float r;
    asm("{.reg .b16 l,h; mov.b32 {l,h}, %1; cvt.f32.f16 %0, l;}" : "=f"(r) : "r"(x));
    return r;
}
__device__ __forceinline__ float high_half(u32 x) {
    float r;
    asm("{.reg .b16 l,h; mov.b32 {l,h}, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "r"(x));
    return r;
}
__device__ __forceinline__ void mma(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
template <int N> struct Words { u32 x[N]; };
template <int N> __device__ __forceinline__ Words<N> stream(const u32* p) {  // read once: do not keep it in L1
    Words<N> r;
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4)
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(r.x[i]), "=r"(r.x[i + 1]), "=r"(r.x[i + 2]), "=r"(r.x[i + 3]) : "l"(p + i));
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 2)
            asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(r.x[i]), "=r"(r.x[i + 1]) : "l"(p + i));
    }
    return r;
}
template <int N> __device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (int m = N / 2; m; m /= 2) x += __shfl_xor_sync(FULL, x, m);
    return x;
}
__device__ __forceinline__ float root(float x) {  // off by 2^-23 relative at most
    float r;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// Sums over LANES neighbouring lanes of N values at once: lane l is left with value l / (LANES / N).
template <int N, int LANES> __device__ __forceinline__ float sum_apart(const float (&v)[N], int lane) {
    if constexpr (N == 1) return sum_lanes<LANES>(v[0]);
    else {
        const bool upper = lane & (LANES / 2);
        float half[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
            half[i] = (upper ? v[i + N / 2] : v[i]) + __shfl_xor_sync(FULL, upper ? v[i] : v[i + N / 2], LANES / 2);
        return sum_apart<N / 2, LANES / 2>(half, lane);
    }
}
// Programmatic dependent launch: a kernel of a step may start while its predecessor ends. Whatever the predecessors wrote is read after
// awaited(), by loads that are not invariant (no const __restrict__): the compiler moves invariant ones above it.
__device__ __forceinline__ void awaited() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
template <int BYTES> __device__ __forceinline__ void copy_async(void* to, const void* from) {
    const u32 at = (u32)__cvta_generic_to_shared(to);
    if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void arrived() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
// Keys that a rule's rank asks for; share and tolerance in 2^-40.
__device__ __forceinline__ int needed(int length, i64 share, i64 tolerance, int count) {
    const i64 need = ((i64)length * share - tolerance + ((1ll << 40) - 1)) >> 40;
    return need > count ? (int)need : count;
}
#ifdef Q
__device__ __forceinline__ float query_at(const void* q, i64 i) {
#if Q == 0
    return ((const float*)q)[i];
#elif Q == 1
    return low_half(((const u16*)q)[i]);
#else
    return __int_as_float((u32)((const u16*)q)[i] << 16);
#endif
}
#endif
