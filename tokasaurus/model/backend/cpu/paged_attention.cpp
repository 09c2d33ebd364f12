// Causal attention over a paged KV cache on the CPU, for mixed prefill and decode rows.
//
// A batch is planned once for all layers, and then run for each layer in three phases:
//   1. Each row's key is normed and rotated, and written to its page with its value.
//   2. Each task attends with an online softmax in fp32 (Milakov and Gimelshein 2018,
//      https://arxiv.org/abs/1805.02867). A task is a block of rows and a range of positions that
//      these rows read from the same pages, for each key/value head.
//   3. Rows that several tasks attended for are merged by their log-sum-exp.
//
// Tasks come from two sources. A sequence's own positions are cut into blocks of its rows, and a
// long context into ranges, so that every thread has work. A group's shared pages are read once for
// all its rows, which may be decode rows and rows of prompts (Juravsky et al. 2024, Hydragen,
// https://arxiv.org/abs/2402.05099)::
//
//     positions   0 ......... 127 | 128 .... 191 | 192 ....
//     row 1       ┌─────────────┐ ┌────────────────────────┐    a task of the group of rows 1 to 3,
//     row 2       │  group 1-3  │ ├────────────────────────┤    and one for each row: each row has
//     row 3       └─────────────┘ └────────────────────────┘    two partial results to merge
//
// The queries of a task are its rows times the query heads that share the key/value head. They meet
// a tile of TILE keys at a time. Few queries read it where it lies. For many it is first laid out
// for products of matrices: the keys transposed, both in fp32 or, with instructions for that, in
// pairs of bf16.
//
// Nothing is read beyond a sequence's length, because pages are not initialised.

#include <algorithm>
#include <atomic>
#include <vector>

#include "products.h"

namespace {

// Keys in a tile.
constexpr int TILE = 64;

// Queries in a task, where there are that many: enough of them to use each tile often, few enough
// to spread a short prompt over the cores, and to keep a task's memory in a core's cache.
constexpr int QUERIES = 96;

// Tasks of fewer queries read keys and values where they lie.
constexpr int FEW_QUERIES = 8;

// What laying out a key costs, in queries that meet it.
constexpr int LAYOUT_COST = 8;

// Multiply-adds of one layer that justify one more thread; they take about 20 microseconds.
constexpr int64_t WORK_PER_THREAD = 500000;

// A thread gets this many tasks, where a few long ones can be cut.
constexpr int TASKS_PER_THREAD = 4;
constexpr int MIN_KEYS_PER_TASK = 256;

inline int round_up(int number, int multiple) {
    return (number + multiple - 1) / multiple * multiple;
}

inline int ceil_div(int64_t number, int64_t divisor) {
    return int((number + divisor - 1) / divisor);
}

}  // namespace

extern "C" {

// Rows of a batch: a range of them, or two ranges with a gap between them.
struct Rows {
    int32_t first;
    int32_t num_before_gap;
    int32_t after_gap;
    int32_t count;

    int row(int index) const {
        return index < num_before_gap ? first + index : after_gap + index - num_before_gap;
    }
    Rows part(int from, int size) const {
        if (from < num_before_gap) return {first + from, num_before_gap - from, after_gap, size};
        return {row(from), size, 0, size};
    }
};

struct Task {
    int32_t slot;          // the row of the page table
    Rows rows;
    int32_t begin, end;    // positions
    int32_t visible;       // positions before this one are visible to the first row,
    int32_t visible_step;  // and this many more to each further row
    int32_t partial;       // the number of its result among those of each of its rows
    float cost;
};

// Mirrored by _Plan in compiled.py.
struct Plan {
    const int32_t *page_table;    // [slots, page_table_stride]
    const int32_t *slots;         // [sequences]
    const int32_t *query_starts;  // [sequences + 1]
    const int32_t *kv_lengths;    // [sequences]
    const int32_t *own_starts;    // [sequences], positions before that are in groups; or null
    // [groups]. The rows of a group are decode rows, then rows of chunks.
    const int32_t *group_first_rows, *group_num_decodes;
    const int32_t *group_first_chunk_rows, *group_num_rows;
    const int32_t *group_begins, *group_ends;  // positions
    // Filled by tokasaurus_plan_attention.
    Task *tasks;
    int32_t *row_slots, *row_positions;  // [rows]
    int32_t *partial_starts;             // [rows + 1], in partials of the rows before
    float *workspace;                    // set later, of workspace_size floats
    int64_t page_table_stride, workspace_size;
    int32_t num_sequences, num_rows, num_groups, num_tasks, num_partials;
    int32_t num_heads, num_kv_heads, head_dim, page_size;
    int32_t element;  // 0 fp32, 1 bf16, 2 fp16
    int32_t num_threads;
    // Filled by tokasaurus_plan_attention: how threads take tasks.
    int32_t heads_at_once, takes_ahead;
};

// The tensors of one layer. Mirrored by _Layer in compiled.py.
struct Layer {
    const Plan *const *plan;             // of the batch
    const void *heads;                   // [rows, heads + 2 * kv_heads, head_dim], contiguous
    const float *cosines, *sines;        // [rows, head_dim / 2]
    const void *query_norm, *key_norm;   // [head_dim], or null
    void *key_cache, *value_cache;       // [pages, kv_heads, page_size, head_dim]
    void *output;                        // [rows, heads, head_dim]
    float eps;
};
}

namespace {

// --- planning ------------------------------------------------------------------------------------

class Planner {
   public:
    explicit Planner(Plan &plan)
        : p(plan),
          group(plan.num_heads / plan.num_kv_heads),
          rows_per_task(std::max(QUERIES / group, 1)),
          num_tasks(0) {}

    void plan() {
        std::fill_n(p.partial_starts, p.num_rows + 1, 0);
        const double total = count_costs();
        if (p.num_threads > 1) most = std::max(total / (p.num_threads * TASKS_PER_THREAD), 1.0);
        for (int s = 0; s < p.num_sequences; s++) {
            const int first = p.query_starts[s], end = p.query_starts[s + 1];
            for (int row = first; row < end; row++) {
                p.row_slots[row] = p.slots[s];
                p.row_positions[row] = p.kv_lengths[s] - end + row;
            }
        }
        for (int g = 0; g < p.num_groups; g++) {
            const Rows rows = {p.group_first_rows[g], p.group_num_decodes[g],
                               p.group_first_chunk_rows[g], p.group_num_rows[g]};
            add(rows, p.group_begins[g], p.group_ends[g], p.group_ends[g], 0);
        }
        for (int s = 0; s < p.num_sequences; s++) {
            const int first = p.query_starts[s], count = p.query_starts[s + 1] - first;
            add({first, count, 0, count}, own_start(s), p.kv_lengths[s],
                p.kv_lengths[s] - count + 1, 1);
        }
        p.num_tasks = num_tasks;
        place_partials();
        std::sort(p.tasks, p.tasks + num_tasks,
                  [](const Task &a, const Task &b) { return a.cost > b.cost; });
        const double largest = num_tasks ? p.tasks[0].cost : 0;
        p.takes_ahead = largest <= most;
        p.heads_at_once = largest * p.num_kv_heads <= most ? p.num_kv_heads : 1;
    }

   private:
    int own_start(int sequence) const { return p.own_starts ? p.own_starts[sequence] : 0; }

    double cost(int num_rows, int num_keys) const {
        return double(num_keys) * (num_rows * group + LAYOUT_COST);
    }

    // The costs of all heads together. Also decides the number of threads.
    double count_costs() {
        double costs = 0, pairs = 0;
        for (int g = 0; g < p.num_groups; g++) {
            const int keys = p.group_ends[g] - p.group_begins[g], rows = p.group_num_rows[g];
            costs += cost(rows, keys);
            pairs += double(rows) * keys;
        }
        for (int s = 0; s < p.num_sequences; s++) {
            const int rows = p.query_starts[s + 1] - p.query_starts[s];
            const int keys = p.kv_lengths[s] - own_start(s);
            costs += cost(rows, keys);
            pairs += double(rows) * keys;
        }
        const double work = 2 * pairs * p.num_heads * p.head_dim;
        p.num_threads = int(std::min(double(p.num_threads), 1 + work / WORK_PER_THREAD));
        return costs * p.num_kv_heads;
    }

    // Cuts rows into blocks, and the positions of each block into ranges.
    void add(const Rows &rows, int begin, int end, int visible, int step) {
        const int keys = end - begin;
        const int largest = std::min(rows.count, rows_per_task);
        int parts = std::min(ceil_div(int64_t(cost(largest, keys)), int64_t(most)),
                             keys / MIN_KEYS_PER_TASK);
        parts = std::max(parts, 1);
        const int part = round_up(ceil_div(keys, parts), TILE);
        const int slot = p.row_slots[rows.row(0)];
        for (int first = 0; first < rows.count; first += rows_per_task) {
            const int count = std::min(rows_per_task, rows.count - first);
            const int block_visible = visible + first * step;
            const int block_end = std::min(end, block_visible + (count - 1) * step);
            for (int from = begin, n = 0; from < end; from += part, n++) {
                // Rows of the same sequence have as many results, some of them empty.
                const int to = std::min(from + part, block_end);
                p.tasks[num_tasks++] = {
                    slot,
                    rows.part(first, count),
                    from,
                    std::max(from, to),
                    block_visible,
                    step,
                    p.partial_starts[rows.row(first)] + n,
                    float(cost(count, std::max(to - from, 0))),
                };
            }
        }
        const int num_parts = ceil_div(keys, part);
        for (int index = 0; index < rows.count; index++)
            p.partial_starts[rows.row(index)] += num_parts;
    }

    // Turns the rows' numbers of partials into places. A row with a single one needs none.
    void place_partials() {
        int place = 0;
        for (int row = 0; row <= p.num_rows; row++) {
            const int count = row < p.num_rows ? p.partial_starts[row] : 0;
            p.partial_starts[row] = place;
            place += count > 1 ? count : 0;
        }
        p.num_partials = place;
        p.workspace_size =
            int64_t(place) * p.num_heads * (round_up(p.head_dim, WIDTH) + 2);
    }

    Plan &p;
    const int group, rows_per_task;
    int num_tasks;
    double most = 1e18;  // the cost of a task
};

// --- layouts of a tile ---------------------------------------------------------------------------

// Words in fp32, from elements of any kind.
template <typename Element>
struct WideLayout {
    static void multiply(const Product &product, int num_rows, int num_columns) {
        ::multiply<Wide>(product, num_rows, num_columns);
    }
    static int query_words(int head_dim) { return head_dim; }
    static int weight_words(int num_keys) { return num_keys; }

    static Words key_words(const Element *key, int word) {
        return bits_as<Words>(load(key + word));
    }
    static uint32_t key_word(const Element *key, int word) {
        return bits_as<uint32_t>(load(key + word, 1)[0]);
    }
    static void lay_out_query(const float *query, int head_dim, uint32_t *words) {
        std::memcpy(words, query, size_t(head_dim) * sizeof(float));
    }
    static void lay_out_values(const Element *const *values, int count, int head_dim, int stride,
                               uint32_t *words) {
        for (int t = 0; t < count; t++)
            for (int d = 0; d < head_dim; d += WIDTH)
                store_words(words + t * stride + d,
                            bits_as<Words>(load(values[t] + d, head_dim - d)));
    }
    // The weights of a tile stay where they are.
    static const uint32_t *weights(const float *scores, int, uint32_t *) {
        return reinterpret_cast<const uint32_t *>(scores);
    }
    static constexpr int weight_stride = TILE;
};

#if defined(__AVX512BF16__)
// Pairs of bf16.
struct PairsLayout {
    using Element = BFloat16;
    static void multiply(const Product &product, int num_rows, int num_columns) {
#if defined(__AMX_BF16__)
        if (product.depth % TILE_ROWS == 0 && may_use_tiles()) {
            const Tiles tiles;
            return multiply_tiles(product, num_rows, num_columns);
        }
#endif
        ::multiply<Pairs>(product, num_rows, num_columns);
    }
    static int query_words(int head_dim) { return head_dim / 2; }
    static int weight_words(int num_keys) { return (num_keys + 1) / 2; }

    static Words key_words(const Element *key, int word) { return load_words(key + 2 * word); }
    static uint32_t key_word(const Element *key, int word) {
        uint32_t pair;
        std::memcpy(&pair, key + 2 * word, sizeof pair);
        return pair;
    }
    static void lay_out_query(const float *query, int head_dim, uint32_t *words) {
        BFloat16 *to = reinterpret_cast<BFloat16 *>(words);
        for (int d = 0; d < head_dim; d += WIDTH)
            store(to + d, load(query + d, head_dim - d), head_dim - d);
    }
    // Pairs the values of two keys. There are TILE pointers, also where there are fewer keys.
    static void lay_out_values(const Element *const *values, int count, int head_dim, int stride,
                               uint32_t *words) {
        for (int t = 0; t < count; t += 2)
            for (int d = 0; d < head_dim; d += WIDTH) {
                const Vector low = load(values[t] + d, head_dim - d);
                const Vector high = load(values[t + 1] + d, head_dim - d);
                store_words(words + t / 2 * stride + d,
                            (bits_as<Words>(low) >> 16) | bits_as<Words>(high));
            }
    }
    static const uint32_t *weights(const float *scores, int num_queries, uint32_t *words) {
        for (int query = 0; query < num_queries; query++) {
            BFloat16 *to = reinterpret_cast<BFloat16 *>(words + query * weight_stride);
            for (int t = 0; t < TILE; t += WIDTH) store(to + t, load(scores + query * TILE + t));
        }
        return words;
    }
    static constexpr int weight_stride = TILE / 2;
};
#endif

// --- attention -----------------------------------------------------------------------------------

// The working memory of one thread. It only grows.
struct Scratch {
    std::vector<uint32_t> queries, keys, values, weights;
    std::vector<float> mixed, scores, best, sum, shrink, head;

    void reserve(int num_queries, int head_dim) {
        // Products in tiles write whole tiles of rows.
        const size_t n = size_t(round_up(num_queries, TILE_ROWS));
        const size_t size = size_t(round_up(head_dim, WIDTH));
        if (mixed.size() >= n * size && best.size() >= n && keys.size() >= size * TILE) return;
        queries.resize(n * size);
        keys.resize(size * TILE);
        values.resize(size * TILE);
        weights.resize(n * TILE / 2);
        mixed.resize(n * size);
        scores.resize(n * TILE);
        best.resize(n);
        sum.resize(n);
        shrink.resize(n);
        head.resize(size);
    }
};

inline Scratch &scratch_of_thread(int num_queries, int head_dim) {
    static thread_local Scratch scratch;
    scratch.reserve(num_queries, head_dim);
    return scratch;
}

// A task for one key/value head.
struct Unit {
    const Task *task;
    int kv_head;
};

// DIM is the size of a head if it is known, else 0.
template <typename Element, typename Layout, int DIM>
class Kernel {
    // Where the keys and values of a tile lie.
    struct Tile {
        const Element *keys[TILE], *values[TILE];
    };

   public:
    Kernel(const Plan &plan, const Layer &layer)
        : p(plan),
          a(layer),
          group(plan.num_heads / plan.num_kv_heads),
          row_stride(int64_t(plan.num_heads + 2 * plan.num_kv_heads) * plan.head_dim) {}

    // Phase 1.
    void append(int row) const {
        float *key = scratch_of_thread(1, head_dim()).head.data();
        const int position = p.row_positions[row];
        const int32_t *pages = p.page_table + p.row_slots[row] * p.page_table_stride;
        for (int head = 0; head < p.num_kv_heads; head++) {
            const int64_t to = ((int64_t(pages[position / p.page_size]) * p.num_kv_heads + head) *
                                    p.page_size +
                                position % p.page_size) *
                               head_dim();
            prepare_head(row, p.num_heads + head, a.key_norm, key);
            Element *stored = static_cast<Element *>(a.key_cache) + to;
            for (int d = 0; d < head_dim(); d += WIDTH)
                store(stored + d, load(key + d), head_dim() - d);
            std::memcpy(static_cast<Element *>(a.value_cache) + to,
                        head_of(row, p.num_heads + p.num_kv_heads + head),
                        size_t(head_dim()) * sizeof(Element));
        }
    }

    // Phase 2. ``next`` is what this thread does afterwards, or null: its first tile is fetched.
    void attend(const Unit &unit, const Unit *next) const {
        const Task &task = *unit.task;
        const int num_queries = task.rows.count * group;
        Scratch &s = scratch_of_thread(num_queries, head_dim());
        const bool are_few = num_queries <= FEW_QUERIES;
        load_queries(task, unit.kv_head, are_few, s);
        Tile tiles[2];
        int current = 0;
        locate(unit, task.begin, tiles[0]);
        for (int start = task.begin; start < task.end; start += TILE, current = 1 - current) {
            const int count = std::min(TILE, task.end - start);
            const Tile &tile = tiles[current];
            Tile *ahead = &tiles[1 - current];
            if (start + TILE < task.end)
                locate(unit, start + TILE, *ahead);
            else if (next)
                locate(*next, next->task->begin, *ahead);
            else
                ahead = nullptr;
            if (are_few) {
                score_few(num_queries, tile.keys, count, s, ahead);
            } else {
                lay_out_keys(tile.keys, count, s.keys.data());
                Layout::lay_out_values(tile.values, count, head_dim(), padded_dim(),
                                       s.values.data());
                if (ahead)
                    for (int t = 0; t < TILE; t++) {
                        prefetch(ahead->keys[t]);
                        prefetch(ahead->values[t]);
                    }
                score(num_queries, count, s);
            }
            for (int query = 0; query < num_queries; query++) {
                const int visible = task.visible + query / group * task.visible_step - start;
                weigh(query, std::min(visible, count), count, s);
            }
            if (are_few)
                mix_few(num_queries, tile.values, count, s, ahead);
            else
                mix(num_queries, count, s);
        }
        finish(task, unit.kv_head, s);
    }

    // Phase 3.
    void merge(int row) const {
        const int begin = p.partial_starts[row], end = p.partial_starts[row + 1];
        for (int head = 0; head < p.num_heads; head++) {
            float best = -INFINITE, sum = 0;
            for (int i = begin; i < end; i++) best = std::max(best, best_of(i, head)[0]);
            float *first = mixed_of(begin, head);
            for (int i = begin; i < end; i++) {
                const float share = std::exp(best_of(i, head)[0] - best);
                const float *mixed = mixed_of(i, head);
                sum += share * best_of(i, head)[1];
                for (int d = 0; d < padded_dim(); d += WIDTH) {
                    const Vector part = load(mixed + d) * share;
                    store(first + d, i == begin ? part : load(first + d) + part);
                }
            }
            write(row, head, first, sum);
        }
    }

   private:
    int head_dim() const { return DIM ? DIM : p.head_dim; }
    int padded_dim() const { return round_up(head_dim(), WIDTH); }

    const Element *head_of(int row, int head) const {
        const int64_t at = row * row_stride + int64_t(head) * head_dim();
        return static_cast<const Element *>(a.heads) + at;
    }

    // Norms and rotates a query or key. The results are as exact as an Element.
    void prepare_head(int row, int head, const void *norm, float *to) const {
        const Element *from = head_of(row, head);
        const int size = head_dim(), half = size / 2;
        for (int d = 0; d < size; d += WIDTH) store(to + d, load(from + d, size - d));
        if (norm) {
            const Element *weight = static_cast<const Element *>(norm);
            Vector squares = {};
            for (int d = 0; d < size; d += WIDTH) squares += load(to + d) * load(to + d);
            const float scale = 1.0f / std::sqrt(total(squares) / float(size) + a.eps);
            for (int d = 0; d < size; d += WIDTH) {
                const Vector quotient = rounded<Element>(load(to + d) * scale);
                store(to + d, rounded<Element>(quotient * load(weight + d, size - d)));
            }
        }
        const float *cosines = a.cosines + int64_t(row) * half;
        const float *sines = a.sines + int64_t(row) * half;
        for (int d = 0; d < half; d += WIDTH) {
            const int count = half - d;
            const Vector left = load(to + d, count), right = load(to + half + d, count);
            const Vector cosine = load(cosines + d, count), sine = load(sines + d, count);
            store(to + d, rounded<Element>(left * cosine - right * sine), count);
            store(to + half + d, rounded<Element>(right * cosine + left * sine), count);
        }
    }

    void load_queries(const Task &task, int kv_head, bool are_few, Scratch &s) const {
        const int num_queries = task.rows.count * group, stride = Layout::query_words(head_dim());
        for (int query = 0; query < num_queries; query++) {
            prepare_head(task.rows.row(query / group), kv_head * group + query % group,
                         a.query_norm, s.head.data());
            if (are_few)
                std::memcpy(&s.queries[size_t(query) * padded_dim()], s.head.data(),
                            size_t(padded_dim()) * sizeof(float));
            else
                Layout::lay_out_query(s.head.data(), head_dim(),
                                      &s.queries[size_t(query) * stride]);
        }
        std::fill_n(s.mixed.begin(), size_t(num_queries) * padded_dim(), 0.0f);
        std::fill_n(s.best.begin(), num_queries, -INFINITE);
        std::fill_n(s.sum.begin(), num_queries, 0.0f);
    }

    // Finds the keys and values of a tile. Beyond the last key come copies of its pointer.
    void locate(const Unit &unit, int start, Tile &tile) const {
        const Task &task = *unit.task;
        const int32_t *pages = p.page_table + task.slot * p.page_table_stride;
        const int count = std::min(TILE, task.end - start);
        int column = start / p.page_size, within = start % p.page_size;
        for (int t = 0; t < count; column++, within = 0) {
            const int64_t from =
                ((int64_t(pages[column]) * p.num_kv_heads + unit.kv_head) * p.page_size + within) *
                head_dim();
            const Element *key = static_cast<const Element *>(a.key_cache) + from;
            const Element *value = static_cast<const Element *>(a.value_cache) + from;
            for (; within < p.page_size && t < count; within++, t++) {
                tile.keys[t] = key;
                tile.values[t] = value;
                key += head_dim();
                value += head_dim();
            }
        }
        // A task without keys has no pointer to copy, and its tile is not read.
        for (int t = std::max(count, 0); t < TILE; t++) {
            tile.keys[t] = t ? tile.keys[t - 1] : nullptr;
            tile.values[t] = t ? tile.values[t - 1] : nullptr;
        }
    }

    void prefetch(const Element *element) const {
        const char *from = reinterpret_cast<const char *>(element);
        for (int at = 0; at < head_dim() * int(sizeof(Element)); at += 64)
            __builtin_prefetch(from + at, 0, 2);
    }

    // Transposes the keys: [words of a key, TILE].
    void lay_out_keys(const Element *const *keys, int count, uint32_t *words) const {
        const int num_words = Layout::query_words(head_dim());
        for (int t = 0; t < count; t += WIDTH) {
            int word = 0;
            for (; word + WIDTH <= num_words; word += WIDTH) {
                Words rows[WIDTH];
                for (int i = 0; i < WIDTH; i++) rows[i] = Layout::key_words(keys[t + i], word);
                transpose(rows);
                for (int i = 0; i < WIDTH; i++) store_words(words + (word + i) * TILE + t, rows[i]);
            }
            for (; word < num_words; word++)
                for (int i = 0; i < WIDTH; i++)
                    words[size_t(word) * TILE + t + i] = Layout::key_word(keys[t + i], word);
        }
    }

    void score(int num_queries, int count, Scratch &s) const {
        const int depth = Layout::query_words(head_dim());
        Layout::multiply(
            {s.queries.data(), depth, s.keys.data(), TILE, s.scores.data(), TILE, nullptr, depth},
            num_queries, round_up(count, WIDTH));
    }

    // Scores, and fetches the keys of the tile ahead, if there is one, between them.
    void score_few(int num_queries, const Element *const *keys, int count, Scratch &s,
                   const Tile *ahead) const {
        const float *queries = reinterpret_cast<const float *>(s.queries.data());
        const Element *const *next = ahead ? ahead->keys : nullptr;
        for (int query = 0; query < num_queries; next = nullptr) {
            const float *some = queries + query * padded_dim();
            float *scores = &s.scores[size_t(query) * TILE];
            const int rest = num_queries - query;
            if (rest >= 4) {
                score_directly<4>(some, keys, count, scores, next);
                query += 4;
            } else if (rest == 3) {
                score_directly<3>(some, keys, count, scores, next);
                query += 3;
            } else {
                score_directly<1>(some, keys, count, scores, next);
                query++;
            }
        }
    }

    template <int N>
    void score_directly(const float *queries, const Element *const *keys, int count,
                        float *scores, const Element *const *next) const {
        for (int t = 0; t < count; t += WIDTH) {
            Vector sums[N][WIDTH];
            for (int i = 0; i < WIDTH; i++) {
                if (next) prefetch(next[t + i]);
                Vector products[N] = {};
                for (int d = 0; d < head_dim(); d += WIDTH) {
                    const Vector key = load(keys[t + i] + d, head_dim() - d);
                    for (int n = 0; n < N; n++)
                        products[n] += load(queries + n * padded_dim() + d) * key;
                }
                for (int n = 0; n < N; n++) sums[n][i] = products[n];
            }
            for (int n = 0; n < N; n++) store(scores + n * TILE + t, totals(sums[n]));
        }
        // Those that no key of this tile stood for.
        if (next)
            for (int t = round_up(count, WIDTH); t < TILE; t++) prefetch(next[t]);
    }

    // Mixes, and fetches the values of the tile ahead between them.
    void mix_few(int num_queries, const Element *const *values, int count, Scratch &s,
                 const Tile *ahead) const {
        const Element *const *next = ahead ? ahead->values : nullptr;
        for (int query = 0; query < num_queries; next = nullptr) {
            const int rest = num_queries - query;
            if (rest >= 4) {
                mix_directly<4>(query, values, count, s, next);
                query += 4;
            } else if (rest == 3) {
                mix_directly<3>(query, values, count, s, next);
                query += 3;
            } else {
                mix_directly<1>(query, values, count, s, next);
                query++;
            }
        }
    }

    template <int N>
    void mix_directly(int query, const Element *const *values, int count, Scratch &s,
                      const Element *const *next) const {
        int d = 0;
        for (; d + BLOCK_VECTORS * WIDTH <= head_dim(); d += BLOCK_VECTORS * WIDTH, next = nullptr)
            mix_vectors<N, BLOCK_VECTORS>(query, values, count, d, s, next);
        for (; d < head_dim(); d += WIDTH, next = nullptr)
            mix_vectors<N, 1>(query, values, count, d, s, next);
    }

    template <int N, int VECTORS>
    void mix_vectors(int query, const Element *const *values, int count, int d, Scratch &s,
                     const Element *const *next) const {
        Vector sums[N][VECTORS];
        float *mixed = &s.mixed[size_t(query) * padded_dim() + d];
        const float *weights = &s.scores[size_t(query) * TILE];
        for (int n = 0; n < N; n++)
            for (int v = 0; v < VECTORS; v++)
                sums[n][v] = load(mixed + n * padded_dim() + v * WIDTH) * s.shrink[query + n];
        for (int t = 0; t < count; t++) {
            if (next) prefetch(next[t]);
            Vector value[VECTORS];
            for (int v = 0; v < VECTORS; v++)
                value[v] = load(values[t] + d + v * WIDTH, head_dim() - d - v * WIDTH);
            for (int n = 0; n < N; n++)
                for (int v = 0; v < VECTORS; v++)
                    sums[n][v] += splat(weights[n * TILE + t]) * value[v];
        }
        if (next)
            for (int t = count; t < TILE; t++) prefetch(next[t]);
        for (int n = 0; n < N; n++)
            for (int v = 0; v < VECTORS; v++)
                store(mixed + n * padded_dim() + v * WIDTH, sums[n][v]);
    }

    // Turns a query's scores into weights of the online softmax. Those of invisible keys are 0.
    void weigh(int query, int visible, int count, Scratch &s) const {
        float *scores = &s.scores[size_t(query) * TILE];
        if (visible <= 0) {
            std::fill_n(scores, TILE, 0.0f);
            s.shrink[query] = 1;
            return;
        }
        const float scale = 1.0f / std::sqrt(float(head_dim()));
        const int padded = round_up(count, WIDTH);
        Vector highest = splat(-INFINITE);
        for (int t = 0; t < padded; t += WIDTH) {
            Vector some = load(scores + t) * scale;
            if (t + WIDTH > visible) some = lane_numbers() < visible - t ? some : splat(-INFINITE);
            highest = larger(highest, some);
            store(scores + t, some);
        }
        const float best = std::max(s.best[query], largest(highest));
        // In the first tile this is e^-infinity, which is 0.
        const float shrink = bounded_exponential(splat(s.best[query] - best))[0];
        Vector sums = {};
        for (int t = 0; t < padded; t += WIDTH) {
            const Vector weights = bounded_exponential(load(scores + t) - best);
            sums += weights;
            store(scores + t, weights);
        }
        s.best[query] = best;
        s.sum[query] = s.sum[query] * shrink + total(sums);
        s.shrink[query] = shrink;
    }

    void mix(int num_queries, int count, Scratch &s) const {
        const uint32_t *weights = Layout::weights(s.scores.data(), num_queries, s.weights.data());
        Layout::multiply(
            {weights, Layout::weight_stride, s.values.data(), padded_dim(), s.mixed.data(),
             padded_dim(), s.shrink.data(), Layout::weight_words(count)},
            num_queries, padded_dim());
    }

    void finish(const Task &task, int kv_head, const Scratch &s) const {
        for (int query = 0; query < task.rows.count * group; query++) {
            const int row = task.rows.row(query / group), head = kv_head * group + query % group;
            const float *mixed = &s.mixed[size_t(query) * padded_dim()];
            if (p.partial_starts[row] == p.partial_starts[row + 1]) {
                write(row, head, mixed, s.sum[query]);
                continue;
            }
            const int place = p.partial_starts[row] + task.partial;
            std::memcpy(mixed_of(place, head), mixed, size_t(padded_dim()) * sizeof(float));
            best_of(place, head)[0] = s.best[query];
            best_of(place, head)[1] = s.sum[query];
        }
    }

    void write(int row, int head, const float *mixed, float sum) const {
        Element *to = static_cast<Element *>(a.output) +
                      (int64_t(row) * p.num_heads + head) * head_dim();
        const float share = 1.0f / sum;
        for (int d = 0; d < head_dim(); d += WIDTH)
            store(to + d, load(mixed + d) * share, head_dim() - d);
    }

    // A partial result in the workspace: mixed values; then the best score and the sum.
    float *mixed_of(int place, int head) const {
        return p.workspace + (int64_t(place) * p.num_heads + head) * (padded_dim() + 2);
    }
    float *best_of(int place, int head) const { return mixed_of(place, head) + padded_dim(); }

    const Plan &p;
    const Layer &a;
    const int group;
    const int64_t row_stride;
};

// Rows whose keys are written faster than other threads start.
constexpr int ROWS_OF_ONE_THREAD = 64;

template <typename Element, typename Layout, int DIM>
void run_with_dim(const Plan &p, const Layer &layer) {
    const Kernel<Element, Layout, DIM> kernel(p, layer);
    const bool appends_alone = p.num_threads == 1 || p.num_rows <= ROWS_OF_ONE_THREAD;
    if (appends_alone)
        for (int row = 0; row < p.num_rows; row++) kernel.append(row);
    // Heads lie next to each other in a page, so one thread reads those of a task, unless they are a
    // large part of its share of the work.
    const int heads_at_once = p.heads_at_once;
    const int num_units = p.num_tasks * p.num_kv_heads;
    std::atomic<int> num_taken{0};
    const auto take = [&](int &number) {
        number++;
        if (number % heads_at_once == 0)
            number = num_taken.fetch_add(heads_at_once, std::memory_order_relaxed);
        return number < num_units;
    };
    const auto unit_of = [&](int number) {
        return Unit{p.tasks + number / p.num_kv_heads, number % p.num_kv_heads};
    };
#pragma omp parallel num_threads(p.num_threads) if (p.num_threads > 1)
    {
        if (!appends_alone) {
#pragma omp for schedule(static)
            for (int row = 0; row < p.num_rows; row++) kernel.append(row);
        }
        // A thread takes its next unit before it runs the one it has, to fetch ahead. Where units are
        // large, it leaves them to the others.
        int number = -1;
        for (bool has_unit = take(number); has_unit;) {
            const Unit unit = unit_of(number);
            if (p.takes_ahead && (has_unit = take(number))) {
                const Unit next = unit_of(number);
                kernel.attend(unit, &next);
            } else {
                kernel.attend(unit, nullptr);
                has_unit = !p.takes_ahead && take(number);
            }
        }
        if (p.num_partials) {
#pragma omp barrier
#pragma omp for schedule(static)
            for (int row = 0; row < p.num_rows; row++)
                if (p.partial_starts[row] < p.partial_starts[row + 1]) kernel.merge(row);
        }
    }
}

template <typename Element, typename Layout>
void run(const Plan &p, const Layer &layer) {
    switch (p.head_dim) {
        case 64: return run_with_dim<Element, Layout, 64>(p, layer);
        case 128: return run_with_dim<Element, Layout, 128>(p, layer);
        default: return run_with_dim<Element, Layout, 0>(p, layer);
    }
}

}  // namespace

extern "C" {

extern const int64_t tokasaurus_sizes[] = {sizeof(Layer), sizeof(Plan)};

int64_t tokasaurus_task_size() { return sizeof(Task); }

// Rows of a task, if that many read the same positions.
int32_t tokasaurus_rows_per_task(int32_t group) { return std::max(QUERIES / group, 1); }

// A sequence of no more rows than this counts as one that reads keys where they lie, if it has no
// group. Where more than FEW_QUERIES query heads share a key head, even a single row lays them out.
int32_t tokasaurus_rows_without_layout(int32_t group) { return std::max(FEW_QUERIES / group, 1); }

// The most tasks that a plan of this many rows, sequences and groups has.
int64_t tokasaurus_max_tasks(int64_t num_rows, int64_t num_sequences, int64_t num_groups,
                             int64_t num_group_rows, int32_t num_threads, int32_t group) {
    const int64_t rows_per_task = tokasaurus_rows_per_task(group);
    const int64_t blocks =
        num_sequences + num_groups + (num_rows + num_group_rows) / rows_per_task;
    return 2 * blocks + 8 * TASKS_PER_THREAD * int64_t(num_threads);
}

void tokasaurus_plan_attention(Plan *plan, int64_t, int32_t) { Planner(*plan).plan(); }

void tokasaurus_attend(const Layer *layer, int64_t, int32_t) {
    const Plan &plan = **layer->plan;
    switch (plan.element) {
        case 0: return run<float, WideLayout<float>>(plan, *layer);
#if defined(__AVX512BF16__)
        case 1: return run<BFloat16, PairsLayout>(plan, *layer);
#else
        case 1: return run<BFloat16, WideLayout<BFloat16>>(plan, *layer);
#endif
        default: return run<Float16, WideLayout<Float16>>(plan, *layer);
    }
}
}
