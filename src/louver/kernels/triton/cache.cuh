// Exact keys and values as the kernels of retrieval read them: rows or pages, 16 bytes a lane. Macros: D, G, BF16, PAGED.
#define LANES (D / 8)                   // lanes that read a key together

__device__ __forceinline__ float2 unpack(u32 x) {  // two stored elements
#if BF16
    return make_float2(__int_as_float(x << 16), __int_as_float(x & 0xffff0000u));
#else
    return make_float2(low_half(x), high_half(x));
#endif
}

__device__ __forceinline__ u32 pack_stored(float a, float b) {  // two elements as they are stored
#if BF16
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
#else
    return pack(a, b);
#endif
}
__device__ __forceinline__ void stored_mma(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    mma(c, a0, a1, a2, a3, b0, b1);
#endif
}
// Into the L2, for a kernel to come: a row by WARM_PIECES calls, each of a line.
#define WARM_PIECES (D > 64 ? D / 64 : 1)
__device__ __forceinline__ void warm(const u16* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

struct Place {  // where a cache's tokens lie: strides in elements, pages through a table
    const u16* data;
    i64 page, head, token;
    const int* table;
    i64 table_stride;
    int page_len;
    __device__ __forceinline__ const u16* at(int row, int kv_head, int position) const {
#if PAGED
        i64 p = table[row * table_stride + position / page_len];
        return data + p * page + kv_head * head + (i64)(position % page_len) * token;
#else
        return data + row * page + kv_head * head + (i64)position * token;
#endif
    }
    __device__ __forceinline__ uint4 piece(int row, int kv_head, int position, int lane) const {  // 8 channels
        uint4 x;
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(at(row, kv_head, position) + 8 * lane));
        return x;
    }
};
__device__ __forceinline__ void unpack8(uint4 x, float y[8]) {
    const float2 a = unpack(x.x), b = unpack(x.y), c = unpack(x.z), d = unpack(x.w);
    y[0] = a.x, y[1] = a.y, y[2] = b.x, y[3] = b.y, y[4] = c.x, y[5] = c.y, y[6] = d.x, y[7] = d.y;
}
