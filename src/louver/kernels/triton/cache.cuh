// Exact keys and values as the kernels of retrieval read them: rows or pages, 16 bytes a lane. Macros: D, G, BF16, PAGED.
#define LANES (D / 8)                   // lanes that read a key together

__device__ __forceinline__ float2 unpack(u32 x) {  // two stored elements
#if BF16
    return make_float2(__int_as_float(x << 16), __int_as_float(x & 0xffff0000u));
#else
    return make_float2(low_half(x), high_half(x));
#endif
}

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
