// Causal attention over a paged KV cache on the CPU, for mixed prefill and decode rows.
//
// There are two phases, with a barrier between them:
//   1. Each row's key and value are written to their page.
//   2. Each task attends with an online softmax in fp32 (Milakov and Gimelshein 2018,
//      https://arxiv.org/abs/1805.02867). A task is a block of rows of one sequence and one
//      key/value head.
// The queries of a task are its rows times the query heads that share the key/value head. Together
// they read each key once:
//
//     keys of the sequence     0 ........ 31 | 32 ....... 63 | 64 ..      tiles of TILE keys
//     row 60, head 0           ███████████████ ████████████                the keys a query sees
//     row 60, head 1           ███████████████ ████████████
//     row 61, head 0           ███████████████ █████████████
//     row 61, head 1           ███████████████ █████████████
//
// Nothing is read beyond a sequence's length, because pages are not initialised. The vectors are
// those of GCC and Clang, eight floats wide; the compiler maps them to the processor's own.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

// Keys in a tile.
constexpr int TILE = 32;

constexpr int WIDTH = 8;
typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));
typedef float HalfVector __attribute__((vector_size(WIDTH / 2 * sizeof(float))));

inline Vector load(const float *from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline void store(float *to, Vector vector) { std::memcpy(to, &vector, sizeof vector); }

inline float total(Vector vector) {
    HalfVector halves[2];
    std::memcpy(halves, &vector, sizeof vector);
    const HalfVector sums = halves[0] + halves[1];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) { return as_float(uint32_t(value.bits) << 16); }

inline float widen(Float16 value) {
    // The exponent and fraction move to fp32's place. The product corrects the exponent's bias, for
    // denormal numbers too. Infinity and NaN get fp32's exponent.
    const uint32_t magnitude = value.bits & 0x7fffu;
    const float finite = as_float(magnitude << 13) * 0x1p112f;
    const float other = as_float((magnitude << 13) | 0x7f800000u);
    const float unsigned_value = magnitude < 0x7c00u ? finite : other;
    return value.bits & 0x8000u ? -unsigned_value : unsigned_value;
}

// e^x for x <= 0, within 2 units of the last place; 0 below -87. It has no calls, so it vectorises.
inline float exp_negative(float x) {
    const float clamped = std::max(x, -87.0f);
    const float n = std::nearbyint(clamped * 1.44269504f);
    // r = x - n ln 2, with ln 2 in two parts.
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const float scale = as_float(uint32_t(int32_t(n) + 127) << 23);
    return x < -87.0f ? 0.0f : p * scale;
}

// The products of one query with N keys.
template <int N>
inline void dot(const float *query, const float *const *keys, int head_dim, float *scores) {
    Vector sums[N] = {};
    int d = 0;
    for (; d + WIDTH <= head_dim; d += WIDTH) {
        const Vector q = load(query + d);
        for (int n = 0; n < N; n++) sums[n] += q * load(keys[n] + d);
    }
    for (int n = 0; n < N; n++) scores[n] = total(sums[n]);
    for (; d < head_dim; d++)
        for (int n = 0; n < N; n++) scores[n] += query[d] * keys[n][d];
}

// For N vectors, from component d on: mixed = mixed * shrink + the sum of weights[t] * values[t].
template <int N>
inline void mix(float *mixed, float shrink, const float *weights, const float *const *values,
                int count, int d) {
    Vector sums[N];
    for (int n = 0; n < N; n++) sums[n] = load(mixed + d + n * WIDTH) * shrink;
    for (int t = 0; t < count; t++)
        for (int n = 0; n < N; n++) sums[n] += weights[t] * load(values[t] + d + n * WIDTH);
    for (int n = 0; n < N; n++) store(mixed + d + n * WIDTH, sums[n]);
}

}  // namespace

extern "C" {

// Mirrored by _Arguments in compiled.py. Strides are in elements.
struct Arguments {
    const void *query, *key, *value;  // rows of heads of head_dim numbers
    void *key_cache, *value_cache;    // [pages, kv_heads, page_size, head_dim]
    float *output;                    // [rows, heads, head_dim]
    const int32_t *page_table;        // [slots, page_table_stride]
    const int32_t *slots;             // [sequences]
    const int32_t *query_starts;      // [sequences + 1]
    const int32_t *kv_lengths;        // [sequences]
    const int32_t *block_sequences;   // [blocks], the sequence of each block of rows
    const int32_t *block_rows;        // [blocks], the first row of each block
    int64_t query_stride, key_stride, value_stride, page_table_stride;
    int32_t num_blocks, rows_per_block;
    int32_t num_heads, num_kv_heads, head_dim, page_size;
    int32_t element;  // 0 fp32, 1 bf16, 2 fp16
    int32_t num_threads;
};
}

namespace {

// The working memory of one thread.
struct Scratch {
    std::vector<float> queries, mixed, keys, values, scores, best, sum;

    void reserve(int num_queries, int head_dim) {
        queries.resize(size_t(num_queries) * head_dim);
        mixed.resize(size_t(num_queries) * head_dim);
        keys.resize(size_t(TILE) * head_dim);
        values.resize(size_t(TILE) * head_dim);
        scores.resize(size_t(num_queries) * TILE);
        best.resize(num_queries);
        sum.resize(num_queries);
    }
};

template <typename Element>
class Kernel {
   public:
    explicit Kernel(const Arguments &arguments) : a(arguments) {}

    void append(int row, int sequence) const {
        const int position =
            a.kv_lengths[sequence] - (a.query_starts[sequence + 1] - row);
        for (int head = 0; head < a.num_kv_heads; head++) {
            const int64_t to = offset(sequence, position, head);
            const int64_t from = int64_t(head) * a.head_dim;
            const size_t size = size_t(a.head_dim) * sizeof(Element);
            std::memcpy(static_cast<Element *>(a.key_cache) + to,
                        static_cast<const Element *>(a.key) + row * a.key_stride + from, size);
            std::memcpy(static_cast<Element *>(a.value_cache) + to,
                        static_cast<const Element *>(a.value) + row * a.value_stride + from, size);
        }
    }

    void attend(int block, int kv_head, Scratch &scratch) const {
        const int head_dim = a.head_dim;
        const int group = a.num_heads / a.num_kv_heads;
        const int sequence = a.block_sequences[block];
        const int first_row = a.block_rows[block];
        const int end_row = a.query_starts[sequence + 1];
        const int num_rows = std::min(a.rows_per_block, end_row - first_row);
        const int num_queries = num_rows * group;
        // The number of keys that the first row sees; each further row sees one more.
        const int first_visible = a.kv_lengths[sequence] - (end_row - first_row) + 1;
        const int num_keys = first_visible + num_rows - 1;

        load_queries(first_row, kv_head, num_queries, group, head_dim, scratch);
        for (int start = 0; start < num_keys; start += TILE) {
            const int tile = std::min(TILE, num_keys - start);
            const float *keys[TILE], *values[TILE];
            locate(sequence, kv_head, start, tile, head_dim, scratch, keys, values);
            for (int query = 0; query < num_queries; query++) {
                const int visible = std::min(tile, first_visible + query / group - start);
                if (visible > 0)
                    step(query, visible, head_dim, keys, values, scratch);
            }
        }
        store(first_row, kv_head, num_queries, group, head_dim, scratch);
    }

   private:
    int64_t offset(int sequence, int position, int head) const {
        const int32_t *pages = a.page_table + a.slots[sequence] * a.page_table_stride;
        const int64_t page = pages[position / a.page_size];
        return ((page * a.num_kv_heads + head) * a.page_size + position % a.page_size) * a.head_dim;
    }

    void load_queries(int first_row, int kv_head, int num_queries, int group, int head_dim,
                      Scratch &scratch) const {
        const float scale = 1.0f / std::sqrt(float(head_dim));
        for (int query = 0; query < num_queries; query++) {
            const Element *from = static_cast<const Element *>(a.query) +
                                  (first_row + query / group) * a.query_stride +
                                  int64_t(kv_head * group + query % group) * head_dim;
            float *to = &scratch.queries[size_t(query) * head_dim];
            for (int d = 0; d < head_dim; d++) to[d] = widen(from[d]) * scale;
        }
        std::fill_n(scratch.mixed.begin(), size_t(num_queries) * head_dim, 0.0f);
        std::fill_n(scratch.best.begin(), num_queries, -std::numeric_limits<float>::infinity());
        std::fill_n(scratch.sum.begin(), num_queries, 0.0f);
    }

    // Finds the keys and values of a tile: in their pages, or widened to fp32 in the scratch.
    void locate(int sequence, int kv_head, int start, int tile, int head_dim, Scratch &scratch,
                const float **keys, const float **values) const {
        for (int t = 0; t < tile; t++) {
            const int64_t from = offset(sequence, start + t, kv_head);
            const Element *key = static_cast<const Element *>(a.key_cache) + from;
            const Element *value = static_cast<const Element *>(a.value_cache) + from;
            if constexpr (sizeof(Element) == sizeof(float)) {
                keys[t] = key;
                values[t] = value;
            } else {
                float *wide_key = &scratch.keys[size_t(t) * head_dim];
                float *wide_value = &scratch.values[size_t(t) * head_dim];
                for (int d = 0; d < head_dim; d++) wide_key[d] = widen(key[d]);
                for (int d = 0; d < head_dim; d++) wide_value[d] = widen(value[d]);
                keys[t] = wide_key;
                values[t] = wide_value;
            }
        }
    }

    // Adds the first `visible` keys of a tile to one query's running softmax.
    static void step(int query, int visible, int head_dim, const float *const *keys,
                     const float *const *values, Scratch &scratch) {
        const float *q = &scratch.queries[size_t(query) * head_dim];
        float *scores = &scratch.scores[size_t(query) * TILE];
        int t = 0;
        for (; t + 4 <= visible; t += 4) dot<4>(q, keys + t, head_dim, scores + t);
        for (; t < visible; t++) dot<1>(q, keys + t, head_dim, scores + t);

        float best = scratch.best[query];
#pragma omp simd reduction(max : best)
        for (int i = 0; i < visible; i++) best = scores[i] > best ? scores[i] : best;
        // In the first tile this is exp_negative(-infinity), which is 0.
        const float shrink = exp_negative(scratch.best[query] - best);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < visible; i++) {
            scores[i] = exp_negative(scores[i] - best);
            sum += scores[i];
        }
        scratch.best[query] = best;
        scratch.sum[query] = scratch.sum[query] * shrink + sum;

        float *mixed = &scratch.mixed[size_t(query) * head_dim];
        int d = 0;
        for (; d + 8 * WIDTH <= head_dim; d += 8 * WIDTH)
            mix<8>(mixed, shrink, scores, values, visible, d);
        for (; d + 4 * WIDTH <= head_dim; d += 4 * WIDTH)
            mix<4>(mixed, shrink, scores, values, visible, d);
        for (; d + WIDTH <= head_dim; d += WIDTH)
            mix<1>(mixed, shrink, scores, values, visible, d);
        for (; d < head_dim; d++) {
            mixed[d] *= shrink;
            for (int i = 0; i < visible; i++) mixed[d] += scores[i] * values[i][d];
        }
    }

    void store(int first_row, int kv_head, int num_queries, int group, int head_dim,
               const Scratch &scratch) const {
        for (int query = 0; query < num_queries; query++) {
            const float share = 1.0f / scratch.sum[query];
            const float *from = &scratch.mixed[size_t(query) * head_dim];
            float *to = a.output + (int64_t(first_row + query / group) * a.num_heads +
                                    kv_head * group + query % group) *
                                       head_dim;
            for (int d = 0; d < head_dim; d++) to[d] = from[d] * share;
        }
    }

    const Arguments &a;
};

template <typename Element>
void run(const Arguments &a) {
    const Kernel<Element> kernel(a);
    const int num_tasks = a.num_blocks * a.num_kv_heads;
    const int group = a.num_heads / a.num_kv_heads;
#pragma omp parallel num_threads(a.num_threads)
    {
        Scratch scratch;
        scratch.reserve(a.rows_per_block * group, a.head_dim);
#pragma omp for schedule(static)
        for (int block = 0; block < a.num_blocks; block++) {
            const int sequence = a.block_sequences[block];
            const int first = a.block_rows[block];
            const int end = std::min(first + a.rows_per_block, a.query_starts[sequence + 1]);
            for (int row = first; row < end; row++) kernel.append(row, sequence);
        }
        // One head after the other, so that a prompt's blocks find its keys in the core's cache.
        // Late blocks come first, because they see the most keys.
#pragma omp for schedule(dynamic, 1)
        for (int task = num_tasks - 1; task >= 0; task--)
            kernel.attend(task % a.num_blocks, task / a.num_blocks, scratch);
    }
}

}  // namespace

extern "C" {

// Lets the caller check that it lays out Arguments in the same way.
int64_t tokasaurus_arguments_size() { return sizeof(Arguments); }

void tokasaurus_paged_attention(const Arguments *arguments) {
    switch (arguments->element) {
        case 0: return run<float>(*arguments);
        case 1: return run<BFloat16>(*arguments);
        default: return run<Float16>(*arguments);
    }
}
}
