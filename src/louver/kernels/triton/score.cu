// The scores of a list and of the open block, for a ranked retrieval, and how many of them lie how high; the twin of rank_kernel, which
// also reads the rank off (here attend.cu does). LANES lanes a key, 16 bytes each, BATCH keys in flight a lane; |q||k| bounds the sum of
// |q_d k_d|, so one norm serves all heads. The open block's scores lie behind the list's. Macros: D, G, L, and BF16, PAGED.
#define THREADS 256
#define WIDE (G <= 1 ? 1 : G <= 2 ? 2 : G <= 4 ? 4 : 8)
#define BATCH 4                         // keys a lane has asked for
#define TOGETHER (LANES / WIDE < BATCH ? LANES / WIDE : BATCH)  // keys whose sums over lanes are taken at once
#define HOLDERS (LANES / (TOGETHER * WIDE))                     // lanes that end with the same score
#define GROUPS (THREADS / LANES)

extern "C" __global__ void __launch_bounds__(THREADS, G <= 4 ? 3 : 2) score(
    const float* q, const u16* __restrict__ k, const int* __restrict__ table, i64 k_page, i64 k_head, i64 k_token, i64 table_stride,
    int page_len, const int* __restrict__ num_blocks, const int* __restrict__ kv_start, const int* __restrict__ kv_len,
    const float* low, const int* cuts, const int* listed, const int* counters, float* __restrict__ scores,
    float* __restrict__ slacks, int* rank_hist, int num_kv_heads, int room, float scale, float slack_share) {
    const int pid = blockIdx.x, row = pid / num_kv_heads, lane = threadIdx.x % 32;
    const int l = lane % LANES, group = threadIdx.x / LANES;
    const int start = kv_start[row], length = kv_len[row] - start, closed = num_blocks[row] * L;
    const Place keys = {k, k_page, k_head, k_token, table, table_stride, page_len};
    awaited();
    let_next_start();
    float x[G][8], length_q[WIDE];
#pragma unroll
    for (int g = 0; g < WIDE; ++g) length_q[g] = 0.0f;
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const float4* from = (const float4*)(q + ((i64)pid * G + g) * D + 8 * l);
        const float4 a = from[0], b = from[1];
        x[g][0] = a.x, x[g][1] = a.y, x[g][2] = a.z, x[g][3] = a.w, x[g][4] = b.x, x[g][5] = b.y, x[g][6] = b.z, x[g][7] = b.w;
#pragma unroll
        for (int c = 0; c < 8; ++c) length_q[g] += x[g][c] * x[g][c];
    }
    const int n = counters[pid * COUNTERS + LISTED], total = n + length - closed;
    if (n > room || length - closed > 2 * L) return;       // attended densely
    const int each = (total + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * each, end = min(begin + each, total);
    if (begin >= end) return;
    const int which = l / HOLDERS, head = which % WIDE;    // of a round: the key and the head this lane ends with
    const bool writes = l % HOLDERS == 0 && head < G;
    const int id = pid * G + min(head, G - 1);
    float norm = 0.0f;
#pragma unroll
    for (int g = 0; g < G; ++g) {
        float sum = length_q[g];
        for (int m = LANES / 2; m; m /= 2) sum += __shfl_xor_sync(FULL, sum, m);
        if (head == g) norm = sqrtf(sum) * slack_share * 1.001f;
    }
    const float origin = low[id], lowest = (float)cuts[id * 2];
    for (int first = begin; first < end; first += BATCH * GROUPS) {  // all lanes stay, for the sums
        int tokens[BATCH];
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
            const int j = min(first + u * GROUPS + group, end - 1);
            tokens[u] = j < n ? listed[(i64)pid * room + j] & (DECIDED - 1) : closed + j - n;
        }
        uint4 piece[BATCH];
#pragma unroll
        for (int u = 0; u < BATCH; ++u) piece[u] = keys.piece(row, pid % num_kv_heads, start + tokens[u], l);
#pragma unroll
        for (int round = 0; round < BATCH; round += TOGETHER) {
            float dots[TOGETHER * WIDE], squares[TOGETHER];
#pragma unroll
            for (int u = 0; u < TOGETHER; ++u) {
                float y[8];
                unpack8(piece[round + u], y);
                squares[u] = 0.0f;
#pragma unroll
                for (int c = 0; c < 8; ++c) squares[u] += y[c] * y[c];
#pragma unroll
                for (int g = 0; g < WIDE; ++g) {
                    float dot = 0.0f;
                    if (g < G)
#pragma unroll
                        for (int c = 0; c < 8; ++c) dot += y[c] * x[g < G ? g : 0][c];
                    dots[u * WIDE + g] = dot;
                }
            }
            const float score = sum_apart<TOGETHER * WIDE, LANES>(dots, l);
            const float square = sum_apart<TOGETHER, LANES>(squares, l);
            const int j = first + (round + which / WIDE) * GROUPS + group;
            if (writes && j < end) {
                const i64 at = ((i64)pid * (room + 2 * L) + (j < n ? j : room + j - n)) * G + head;
                const float slack = norm * sqrtf(square) + 0x1p-60f;
                scores[at] = score;
                slacks[at] = slack;
                const float logit = (score - slack) * scale;
                const float position = (logit - origin) * STEPS - (fabsf(logit) + fabsf(origin)) * (0x1p-20f * STEPS);
                const float place = floorf((floorf(position) - lowest) * (1.0f / RANK_CODES));
                if (place >= 0.0f) atomicAdd(&rank_hist[id * RANK_BINS + (int)fminf(place, RANK_BINS - 1.0f)], 1);
            }
        }
    }
}
