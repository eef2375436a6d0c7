// What a replayed step takes in and hands out, copied: one piece of memory, or two, in words of 32 bits.
extern "C" __global__ void copy_words(const u32* a, u32* into_a, i64 words_a, const u32* b, u32* into_b, i64 words_b) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < words_a) into_a[i] = a[i];
    else if (i - words_a < words_b) into_b[i - words_a] = b[i - words_a];
}
