// What a kernel sees of the caller's arrays: pointers, strides and lengths. No ownership, no Python.
#pragma once

#include <cstdint>

namespace louver {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// Keys or values: [batch, heads, kv_len, head_dim], or pages [pages, heads, page_len, head_dim] behind a block table.
struct CacheView {
    const char* data = nullptr;
    DType dtype = DType::float32;
    int64_t item_bytes = 4;
    int64_t stride_batch = 0, stride_head = 0, stride_token = 0, stride_dim = 1;  // in elements
    const int32_t* block_table = nullptr;                                         // [batch, table_width]
    int64_t table_width = 0;
    int64_t page_len = 0;

    const char* token(int64_t row, int64_t head, int64_t position) const {
        int64_t outer = row, inner = position;
        if (block_table != nullptr) {
            const int64_t page = block_table[row * table_width + position / page_len];
            outer = page < 0 ? 0 : page;
            inner = position % page_len;
        }
        return data + item_bytes * (outer * stride_batch + head * stride_head + inner * stride_token);
    }
};

enum class Metric : int { frame = 0, diagonal = 1, identity = 2 };

// The canonical sketch (src/louver/sketch/layout.py), every tensor contiguous with [batch, heads, blocks] in front, or
// [pages, heads, blocks of a page] where rows share pages.
struct SketchView {
    int64_t batch = 0, heads = 0, capacity = 0;  // capacity: blocks per row, or per page
    const int32_t* pages = nullptr;              // [batch, table_width]; null where every row has its own blocks
    int64_t table_width = 0;
    int64_t frame_len = 0, head_dim = 0, dims = 0, slices = 0;
    Metric metric = Metric::frame;
    bool clip = true;
    int32_t* num_blocks = nullptr;        // [batch]
    const float* query_weight = nullptr;  // [batch, heads, dims]
    uint8_t* key_codes = nullptr;         // [.., frame_len, dims / 2]
    int16_t* key_frame = nullptr;         // [.., dims], center * 64 + fall
    uint8_t* key_scale = nullptr;         // [..]
    uint8_t* key_radius = nullptr;        // [.., half_len, slices]
    float* radius_least = nullptr;        // [.., slices]
    float* radius_unit = nullptr;         // [.., slices]
    const float* value_mean = nullptr;    // [batch, heads, dims]
    float* value_spread = nullptr;        // [..]
    bool coded_values = false;            // the four below are there
    uint8_t* value_codes = nullptr;
    int16_t* value_frame = nullptr;
    uint8_t* value_scale = nullptr;
    float* value_error = nullptr;

    // Bytes of a block's radii in one slice: two tokens share one.
    int64_t half_len() const { return (frame_len + 1) / 2; }
    int64_t block(int64_t row, int64_t head, int64_t index) const {
        if (pages == nullptr) return (row * heads + head) * capacity + index;
        const int64_t page = pages[row * table_width + index / capacity];
        return (page * heads + head) * capacity + index % capacity;
    }
    // As slice_lengths in geometry/bounds.py: contiguous slices, as even as they go.
    int64_t slice_begin(int64_t slice) const {
        const int64_t base = dims / slices, extra = dims % slices;
        return slice * base + (slice < extra ? slice : extra);
    }
};

constexpr int kNoBound = 15;
constexpr float kLargestFramed = 60000.0f;

// Where a step's evidence goes; [batch, num_q_heads] each, float32.
struct StepOutput {
    char* out = nullptr;  // [batch, num_q_heads, head_dim], dtype of the query, contiguous
    float* lse = nullptr;
    float* certificate = nullptr;
    float* arithmetic = nullptr;
    float* dropped = nullptr;
    float* tau = nullptr;
    int64_t* counts = nullptr;      // [batch, num_kv_heads, kNumCounts]
    uint8_t* exact_mask = nullptr;  // [batch, num_q_heads, mask_len], zero on entry; null unless asked for
    int64_t mask_len = 0;
};

// The order of louver.protocols.COUNTS.
enum Count { kKeys, kBlocks, kOpen, kScanned, kExact, kCoarse, kValueBlocks, kNumCounts };

// Where a search's keys go: every thread of a (row, KV head) has its own part of a query head's capacity.
struct FoundKeys {
    int64_t capacity = 0;  // at least the longest row
    int64_t threads = 1;
    int32_t* tokens = nullptr;   // [batch, num_q_heads, capacity], positions in the cache
    float* scores = nullptr;     // the same
    int64_t* begins = nullptr;   // [batch, num_q_heads, threads], in tokens
    int64_t* counts = nullptr;   // the same; zero on entry
    int64_t* scanned = nullptr;  // [batch, num_kv_heads, threads], keys of closed blocks read in full; zero on entry
    int32_t* order = nullptr;    // [batch, num_kv_heads, capacity], scratch
};

// Keys named in compressed sparse rows, a row per (batch, query head); checked by the caller.
struct NamedKeys {
    const int64_t* indptr = nullptr;   // [batch * num_q_heads + 1]
    const int64_t* indices = nullptr;  // positions in the cache
};

struct Rule {
    bool drop = false;
    double share = 0;
    int64_t count = 0;
    bool has_tau = false;
    float tau = 0;
    float unread_mass = 0;
    int64_t sinks = 0, recent = 0;
    bool keep_best = false;
};

// What a step under error:EPS has to certify, and what its reads cost.
struct Asked {
    float error = 0;                 // times |out|
    const int64_t* bytes = nullptr;  // [kNumCounts], of each thing counted
    int64_t* more_bytes = nullptr;   // [batch, num_kv_heads], read and not counted
};

// The same of a step under mass:EPS.
struct AskedMass {
    double share = 0;                // of the mass, to be dropped at most
    const int64_t* bytes = nullptr;  // [kNumCounts]
};

// Bounds as the op `bounds` leaves them, [batch, .., sketched] in row coordinates.
struct BoundsView {
    const float* estimate = nullptr;     // [batch, num_q_heads, sketched]
    const float* half_width = nullptr;   // the same
    const uint8_t* undecided = nullptr;  // [batch, num_kv_heads, sketched]
    int64_t sketched = 0;
};

// Thresholds on the upper bound, [batch, num_q_heads] each; see louver.protocols.Cuts.
struct CutsView {
    const float *unread = nullptr, *fine = nullptr, *exact = nullptr;
    const int64_t* rank = nullptr;  // null where there is none
};

// A BoundSummary; [batch, num_q_heads, ..], kBins bins and kBins + 1 edges.
constexpr int64_t kBins = 1024;
struct SummaryView {
    float* edges = nullptr;
    int32_t *upper_count = nullptr, *lower_count = nullptr;
    float *upper_mass = nullptr, *lower_mass = nullptr;
    float *decided_mass = nullptr, *best_lower = nullptr, *shift = nullptr, *retired_mass = nullptr;
};

// What keys are to a summary (uint8): those of a block that are exact in any case, or absent; bounded; bounded and
// given up.
constexpr int kDecided = 0, kUndecided = 1, kRetired = 2;

// Keys in groups, subspace by subspace, and the groups' upper bounds.
struct GroupsView {
    int64_t heads = 0, subspaces = 0, rows = 0, keys = 0, count = 0;  // rows: queries of a head; count: groups
    const void* group = nullptr;  // [heads, subspaces, keys], int16 or, where wide, int32
    bool wide = false;
    const float* upper = nullptr;  // [heads, subspaces, rows, count]
};

// One decode step's question: q [batch, num_q_heads, head_dim] contiguous, over row tokens kv_start .. kv_len.
struct Problem {
    const char* q = nullptr;
    DType q_dtype = DType::float32;
    CacheView keys, values;
    const int32_t* kv_start = nullptr;
    const int32_t* kv_len = nullptr;
    int64_t batch = 0, num_q_heads = 0, num_kv_heads = 0, head_dim = 0;
    float softmax_scale = 1;

    int64_t group_size() const { return num_q_heads / num_kv_heads; }
    int64_t row_len(int64_t row) const { return kv_len[row] > kv_start[row] ? kv_len[row] - kv_start[row] : 0; }
};

}  // namespace louver
