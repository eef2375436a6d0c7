// The scores of a list and of the open block, for a ranked retrieval, and how many of them lie how high; the twin of rank_kernel, which
// also reads the rank off (here attend.cu does). A warp takes 16 keys as the first operand of m16n8k16 products, the group's queries are
// the second; a lane reads a quarter of two keys, and the order of the channels is its own. Keys times keys give their norms: |q||k| bounds
// the sum of |q_d k_d|, so one norm serves all heads. The values of keys that some cut keeps are asked for into the L2 (WARM), for
// attend.cu. The open block's scores lie behind the list's. Macros: D, G, L, WARM, and BF16, PAGED.
#define THREADS 256
#define KEYS 16                         // of a warp
#define PIECES (D / 32)                 // pieces of 16 bytes of a key a lane reads

extern "C" __global__ void __launch_bounds__(THREADS, D <= 128 ? 3 : 2) score(
    const float* q, const u16* __restrict__ k, const u16* __restrict__ v, const int* __restrict__ table, i64 k_page, i64 k_head,
    i64 k_token, i64 v_page, i64 v_head, i64 v_token, i64 table_stride, int page_len, const int* __restrict__ num_blocks,
    const int* __restrict__ kv_start, const int* __restrict__ kv_len, const float* low, const int* cuts, const int* listed,
    const int* counters, float* __restrict__ scores, float* __restrict__ slacks, int* rank_hist, int num_kv_heads, int room, float scale,
    float slack_share) {
    const int pid = blockIdx.x, row = pid / num_kv_heads, kv_head = pid % num_kv_heads, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int r = lane / 4, t = lane % 4;   // this lane's keys: r and r + 8, their pieces t, t + 4, ...; its heads: 2 t and 2 t + 1, or r
    const int start = kv_start[row], length = kv_len[row] - start, closed = num_blocks[row] * L;
    const Place keys = {k, k_page, k_head, k_token, table, table_stride, page_len};
    const Place values = {v, v_page, v_head, v_token, table, table_stride, page_len};
    awaited();
    let_next_start();
    const int n = counters[pid * COUNTERS + LISTED];
    u32 x[PIECES][4];                       // of head r, exact: queries and keys are of one type
    float length_q = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const float4* from = (const float4*)(q + ((i64)pid * G + min(r, G - 1)) * D + (4 * i + t) * 8);
        const float4 a = from[0], b = from[1];
        x[i][0] = pack_stored(a.x, a.y), x[i][1] = pack_stored(a.z, a.w), x[i][2] = pack_stored(b.x, b.y), x[i][3] = pack_stored(b.z, b.w);
        length_q += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
    }
    float origin[2], lowest[2], norm[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int id = pid * G + min(2 * t + h, G - 1);
        origin[h] = low[id], lowest[h] = (float)cuts[id * 2];
    }
    const int total = n + length - closed;
    if (n > room || length - closed > 2 * L) return;       // attended densely
    const int each = (total + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * each, end = min(begin + each, total);
    auto entry_at = [&](int j) { return j < n ? listed[(i64)pid * room + j] : (closed + j - n) | DECIDED; };
    int first = begin + warp * KEYS, entries[2];
    if (first >= end) return;
#pragma unroll
    for (int u = 0; u < 2; ++u) entries[u] = entry_at(min(first + r + 8 * u, end - 1));
    length_q += __shfl_xor_sync(FULL, length_q, 1);
    length_q += __shfl_xor_sync(FULL, length_q, 2);
    length_q = sqrtf(length_q) * slack_share * 1.001f;
#pragma unroll
    for (int h = 0; h < 2; ++h) norm[h] = __shfl_sync(FULL, length_q, 4 * (2 * t + h));
    for (; first < end; first += KEYS * THREADS / 32) {    // all lanes stay, for the products
        uint4 y[2][PIECES];
        int token[2];
        bool decided[2];
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            token[u] = start + (entries[u] & (DECIDED - 1)), decided[u] = entries[u] & DECIDED;
#pragma unroll
            for (int i = 0; i < PIECES; ++i) y[u][i] = keys.piece(row, kv_head, token[u], 4 * i + t);
        }
        const int next = first + KEYS * THREADS / 32;
        if (next < end)
#pragma unroll
            for (int u = 0; u < 2; ++u) entries[u] = entry_at(min(next + r + 8 * u, end - 1));
        float dots[4] = {0.0f, 0.0f, 0.0f, 0.0f}, low_norms[4] = {0.0f, 0.0f, 0.0f, 0.0f}, high_norms[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const uint4 a = y[0][i], b = y[1][i];
            stored_mma(dots, a.x, b.x, a.y, b.y, x[i][0], x[i][1]);
            stored_mma(dots, a.z, b.z, a.w, b.w, x[i][2], x[i][3]);
            stored_mma(low_norms, a.x, b.x, a.y, b.y, a.x, a.y);    // their diagonals are wanted
            stored_mma(low_norms, a.z, b.z, a.w, b.w, a.z, a.w);
            stored_mma(high_norms, a.x, b.x, a.y, b.y, b.x, b.y);
            stored_mma(high_norms, a.z, b.z, a.w, b.w, b.z, b.w);
        }
        const int holder = 4 * r + r / 2;
        const float squares[2] = {__shfl_sync(FULL, r % 2 ? low_norms[1] : low_norms[0], holder),
                                  __shfl_sync(FULL, r % 2 ? high_norms[3] : high_norms[2], holder)};
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            const int j = first + r + 8 * u;
            const float size = sqrtf(squares[u]);
            const i64 at = ((i64)pid * (room + 2 * L) + (j < n ? j : room + j - n)) * G;
            bool wanted = decided[u];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int head = 2 * t + h;
                if (j >= end || head >= G) continue;
                const float score = dots[2 * u + h], slack = norm[h] * size + 0x1p-60f;
                scores[at + head] = score;
                slacks[at + head] = slack;
                const float logit = (score - slack) * scale;
                const float position = (logit - origin[h]) * STEPS - (fabsf(logit) + fabsf(origin[h])) * (0x1p-20f * STEPS);
                const float place = floorf((floorf(position) - lowest[h]) * (1.0f / RANK_CODES));
                if (place >= 0.0f) {
                    atomicAdd(&rank_hist[(pid * G + head) * RANK_BINS + (int)fminf(place, RANK_BINS - 1.0f)], 1);
                    wanted = true;
                }
            }
            const u32 some = __ballot_sync(FULL, wanted && j < end);
            if (WARM && ((some >> (lane & ~3)) & 15))
#pragma unroll
                for (int i = t; i < WARM_PIECES; i += 4) warm(values.at(row, kv_head, token[u]) + i * (D / WARM_PIECES));
        }
    }
}
