// Causal attention over a paged KV cache on the CPU, for mixed prefill and decode rows.
//
// A batch is planned once for all layers, and then run for each layer in three phases:
//   1. Each row's key is normed and rotated, and written to its page with its value.
//   2. Each task attends with an online softmax in fp32 (Milakov and Gimelshein 2018,
//      https://arxiv.org/abs/1805.02867). A task is a block of rows and a range of positions that
//      these rows read from the same pages, for each key/value head.
//   3. Rows of long sequences are merged from their ranges by their log-sum-exp.
//
// What a row gets does not depend on the rows beside it, on the tasks, or on the threads:
//   - Positions are cut into ranges of RANGE and tiles of TILE, the same for every row.
//   - A range is a chain of tiles: each tile changes the state (best score, sum, mixed values) that
//     the tiles before it have left. A row of several ranges merges them in their order.
//   - Within a tile, the order of each sum is the same for few queries and for many.
//
// A group's shared pages are read once for all its rows, which may be decode rows and rows of
// prompts (Juravsky et al. 2024, Hydragen, https://arxiv.org/abs/2402.05099). It ends where a tile
// ends. Each row goes on from the state that the group has left, so it gets what it would get alone::
//
//     positions   0 ......... 127 | 128 .... 191 | 192 ....
//     row 1       ┌─────────────┐ ┌────────────────────────┐    a task of the group of rows 1 to 3,
//     row 2       │  group 1-3  │→├────────────────────────┤    then one for each row
//     row 3       └─────────────┘ └────────────────────────┘
//
// The queries of a task are its rows times the query heads that share the key/value head. They meet
// a tile of TILE keys at a time. Few queries read it where it lies. For many it is first laid out
// for products of matrices: the keys transposed, both in fp32 or, with instructions for that, in
// pairs of bf16.
//
// Only keys and values of a sequence take part, because pages are not initialised.

#include <algorithm>
#include <atomic>
#include <vector>

#include "products.h"

namespace {

// Keys in a tile. Groups end at multiples of it.
constexpr int TILE = 64;

// Positions in a range: enough to merge seldom, few enough to share a long context among threads.
constexpr int RANGE = 512;

// Queries in a task, where there are that many: enough of them to use each tile often, few enough
// to spread a short prompt over the cores, and to keep a task's memory in a core's cache.
constexpr int QUERIES = 96;

// Tasks of fewer queries read keys and values where they lie.
constexpr int FEW_QUERIES = 8;

// What laying out a key costs, in queries that meet it.
constexpr int LAYOUT_COST = 8;

// Multiply-adds of one layer that justify one more thread; they take about 20 microseconds.
constexpr int64_t WORK_PER_THREAD = 500000;

// A task that takes more than a thread's part of the work divided by this is large.
constexpr int TASKS_PER_THREAD = 4;

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
    int32_t level;         // it goes on from a task of the level before
    int32_t by_range;      // within one range, whose state is kept
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
    int32_t *row_slots, *row_positions, *row_levels, *row_by_range;  // [rows]
    int32_t *state_starts;  // [rows + 1], states that are kept of the rows before
    int32_t *level_ends;    // [groups + 1], tasks up to the end of each level
    float *workspace;       // set later, of workspace_size floats
    int64_t page_table_stride, workspace_size;
    int32_t num_sequences, num_rows, num_groups, num_levels, merges;
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

// The ranges that a row at this position sees.
inline int num_ranges(int position) { return position / RANGE + 1; }

class Planner {
   public:
    explicit Planner(Plan &plan)
        : p(plan),
          group(plan.num_heads / plan.num_kv_heads),
          rows_per_task(std::max(QUERIES / group, 1)) {}

    void plan() {
        const double total = count_costs();
        if (p.num_threads > 1) large = total / (p.num_threads * TASKS_PER_THREAD);
        choose_ranges();
        place_rows();
        for (int g = 0; g < p.num_groups; g++)
            add(rows_of_group(g), p.group_begins[g], p.group_ends[g], p.group_ends[g], 0);
        for (int s = 0; s < p.num_sequences; s++)
            add(rows_of_sequence(s), own_start(s), p.kv_lengths[s],
                p.kv_lengths[s] - rows_of_sequence(s).count + 1, 1);
        sort_tasks();
    }

   private:
    int own_start(int sequence) const { return p.own_starts ? p.own_starts[sequence] : 0; }

    Rows rows_of_group(int g) const {
        return {p.group_first_rows[g], p.group_num_decodes[g], p.group_first_chunk_rows[g],
                p.group_num_rows[g]};
    }

    Rows rows_of_sequence(int s) const {
        const int count = p.query_starts[s + 1] - p.query_starts[s];
        return {p.query_starts[s], count, 0, count};
    }

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

    // A thread alone would take too long for these positions, so threads share their ranges. All
    // groups of a nest do alike, since a row goes from one to the next.
    void choose_ranges() {
        std::fill_n(p.row_by_range, p.num_rows, 0);
        for (int g = 0, next; g < p.num_groups; g = next) {
            int end = p.group_ends[g];
            for (next = g + 1; next < p.num_groups && p.group_begins[next] > 0; next++)
                end = std::max(end, int(p.group_ends[next]));
            choose_ranges(rows_of_group(g), end);
        }
        for (int s = 0; s < p.num_sequences; s++)
            if (own_start(s) == 0) choose_ranges(rows_of_sequence(s), p.kv_lengths[s]);
    }

    void choose_ranges(const Rows &rows, int end) {
        if (end <= RANGE || cost(std::min(rows.count, rows_per_task), end) <= large) return;
        for (int index = 0; index < rows.count; index++) p.row_by_range[rows.row(index)] = 1;
    }

    // A row whose ranges are shared keeps a state for each. Another one keeps two if a group begins
    // it: that of the ranges that are done, and that of the range at which the group ends.
    void place_rows() {
        int place = 0;
        for (int s = 0; s < p.num_sequences; s++) {
            const int first = p.query_starts[s], end = p.query_starts[s + 1];
            for (int row = first; row < end; row++) {
                const int position = p.kv_lengths[s] - end + row;
                p.row_slots[row] = p.slots[s];
                p.row_positions[row] = position;
                p.row_levels[row] = 0;
                p.state_starts[row] = place;
                place += p.row_by_range[row] ? num_ranges(position) : own_start(s) ? 2 : 0;
                p.merges |= p.row_by_range[row] && position >= RANGE;
            }
        }
        p.state_starts[p.num_rows] = place;
        p.workspace_size = int64_t(place) * p.num_heads * (round_up(p.head_dim, WIDTH) + 2);
    }

    // Cuts rows into blocks, and positions into ranges where threads share them.
    void add(const Rows &rows, int begin, int end, int visible, int step) {
        // All these rows go on from the same task, if they do.
        const int slot = p.row_slots[rows.row(0)], by_range = p.row_by_range[rows.row(0)];
        const bool goes_on = by_range ? begin % RANGE : begin;
        const int level = goes_on ? p.row_levels[rows.row(0)] + 1 : 0;
        for (int first = 0; first < rows.count; first += rows_per_task) {
            const int count = std::min(rows_per_task, rows.count - first);
            const int block_visible = visible + first * step;
            const int block_end = std::min(end, block_visible + (count - 1) * step);
            for (int from = begin; from < block_end;) {
                const int next = by_range ? (from / RANGE + 1) * RANGE : block_end;
                const int to = std::min(next, block_end);
                p.tasks[num_tasks++] = {slot,
                                        rows.part(first, count),
                                        from,
                                        to,
                                        block_visible,
                                        step,
                                        from == begin ? level : 0,
                                        by_range,
                                        float(cost(count, to - from))};
                from = to;
            }
        }
        const bool is_one = !by_range || (end - 1) / RANGE == begin / RANGE;
        for (int index = 0; index < rows.count; index++)
            p.row_levels[rows.row(index)] = is_one ? level : 0;
    }

    // Level by level, the largest first.
    void sort_tasks() {
        std::sort(p.tasks, p.tasks + num_tasks, [](const Task &a, const Task &b) {
            return a.level != b.level ? a.level < b.level : a.cost > b.cost;
        });
        double largest = 0;
        for (int t = 0; t < num_tasks; t++) {
            largest = std::max(largest, double(p.tasks[t].cost));
            p.num_levels = p.tasks[t].level + 1;
            p.level_ends[p.tasks[t].level] = t + 1;
        }
        p.takes_ahead = largest <= large;
        p.heads_at_once = largest * p.num_kv_heads <= large ? p.num_kv_heads : 1;
    }

    Plan &p;
    const int group, rows_per_task;
    double large = 1e18;  // the cost of a large task
    int num_tasks = 0;
};

// --- layouts of a tile ---------------------------------------------------------------------------

struct NoTiles {
    explicit NoTiles(int) {}
};

// Words in fp32, from elements of any kind.
template <typename Element_>
struct WideLayout {
    using Element = Element_;
    using Kind = Wide;
    using Session = NoTiles;
    static constexpr bool HAS_TILES = false;

    static void multiply(const Product &product, int num_rows, int num_columns) {
        ::multiply<Wide>(product, num_rows, num_columns);
    }
    static int query_words(int head_dim) { return head_dim; }
    static int weight_words(int num_keys) { return num_keys; }

    static Words key_words(const Element *key, int word, int num_words) {
        return bits_as<Words>(load(key + word, num_words - word));
    }
    static void lay_out_query(const float *query, int head_dim, uint32_t *words) {
        std::memcpy(words, query, size_t(head_dim) * sizeof(float));
    }
    // The words of weight number ``word`` from d on.
    template <int VECTORS>
    static void value_words(const Element *const *values, int word, int d, int head_dim,
                            Words *to) {
        for (int v = 0; v < VECTORS; v++, d += WIDTH)
            to[v] = bits_as<Words>(load(values[word] + d, head_dim - d));
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
    using Kind = Pairs;
    using Session = NoTiles;
    static constexpr bool HAS_TILES = false;

    static void multiply(const Product &product, int num_rows, int num_columns) {
        ::multiply<Pairs>(product, num_rows, num_columns);
    }
    static int query_words(int head_dim) { return head_dim / 2; }
    static int weight_words(int num_keys) { return (num_keys + 1) / 2; }

    static Words key_words(const Element *key, int word, int num_words) {
        if (num_words - word >= WIDTH) return load_words(key + 2 * word);
        Words words = {};
        std::memcpy(&words, key + 2 * word, size_t(num_words - word) * sizeof(uint32_t));
        return words;
    }
    static void lay_out_query(const float *query, int head_dim, uint32_t *words) {
        BFloat16 *to = reinterpret_cast<BFloat16 *>(words);
        for (int d = 0; d < head_dim; d += WIDTH)
            store(to + d, load(query + d, head_dim - d), head_dim - d);
    }
    // Pairs the values of two keys. There are TILE pointers, also where there are fewer keys.
    template <int VECTORS>
    static void value_words(const Element *const *values, int word, int d, int head_dim,
                            Words *to) {
        const Element *first = values[2 * word], *second = values[2 * word + 1];
        if constexpr (VECTORS % 2 == 0) {
            for (int v = 0; v < VECTORS; v += 2, d += 2 * WIDTH)
                interleave_halves(load_words(first + d), load_words(second + d), to[v], to[v + 1]);
        } else {
            for (int v = 0; v < VECTORS; v++, d += WIDTH) {
                const Vector low = load(first + d, head_dim - d);
                const Vector high = load(second + d, head_dim - d);
                to[v] = (bits_as<Words>(low) >> 16) | bits_as<Words>(high);
            }
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

#if defined(__AMX_BF16__)
// Pairs that are multiplied in AMX's tiles, which takes whole tiles of pairs.
struct TilesLayout : PairsLayout {
    using Session = Tiles;
    static constexpr bool HAS_TILES = true;

    static void multiply(const Product &product, int num_rows, int num_columns) {
        multiply_tiles(product, num_rows, num_columns);
    }
    static int weight_words(int num_keys) { return round_up((num_keys + 1) / 2, TILE_ROWS); }

    static bool can_run(int head_dim) {
        return query_words(head_dim) % TILE_ROWS == 0 && may_use_tiles();
    }
};
#endif

// --- attention -----------------------------------------------------------------------------------

// The working memory of one thread. It only grows.
struct Scratch {
    std::vector<uint32_t> queries, turned_queries, keys, values, weights;
    std::vector<float> mixed, scores, best, sum, shrink, head;
    std::vector<float> whole_mixed, whole_best, whole_sum;  // of the ranges that are done

    void reserve(int num_queries, int head_dim) {
        // Products in tiles write whole tiles of rows.
        const size_t n = size_t(round_up(num_queries, TILE_ROWS));
        const size_t size = size_t(round_up(head_dim, WIDTH));
        if (mixed.size() >= n * size && best.size() >= n && keys.size() >= size * TILE) return;
        queries.resize(n * size);
        turned_queries.resize(size * WIDTH);
        keys.resize(size * TILE);
        values.resize(size * TILE);
        weights.resize(n * TILE / 2);
        mixed.resize(n * size);
        scores.resize(n * TILE);
        best.resize(n);
        sum.resize(n);
        shrink.resize(n);
        whole_mixed.resize(n * size);
        whole_best.resize(n);
        whole_sum.resize(n);
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
    static constexpr int KEYS_PER_WORD = TILE / Layout::weight_stride;

    // Where the keys and values of a tile lie.
    struct Tile {
        const Element *keys[TILE], *values[TILE];
    };

    // Fetches a tile into the second-level cache, bit by bit between the work on another one: a
    // core has few requests to memory at a time.
    struct Fetcher {
        const Kernel &kernel;
        const Tile *tile;  // or null
        int done = 0;

        // Keys and values until this share of the work, in parts of 128, is done.
        void until(int end) {
            if (!tile) return;
            for (; done < end; done++)
                kernel.prefetch(done < TILE ? tile->keys[done] : tile->values[done - TILE]);
        }
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
        const bool has_ranges = has_several_ranges(task);
        load_queries(unit, are_few, s);
        load_states(unit, s);
        [[maybe_unused]] const typename Layout::Session session(std::min(num_queries, TILE_ROWS));
        Tile tiles[2];
        int current = 0;
        locate(unit, task.begin, tiles[0]);
        for (int start = task.begin; start < task.end; start += TILE, current = 1 - current) {
            if (has_ranges && start % RANGE == 0 && start > 0) {
                add_to_whole(num_queries, s);
                begin_range(num_queries, s);
            }
            const int count = std::min(TILE, task.end - start);
            const Tile &tile = tiles[current];
            Tile *ahead = &tiles[1 - current];
            if (start + TILE < task.end)
                locate(unit, start + TILE, *ahead);
            else if (next)
                locate(*next, next->task->begin, *ahead);
            else
                ahead = nullptr;
            Fetcher fetcher{*this, ahead};
            if (are_few) {
                score_few(num_queries, tile.keys, count, s, fetcher);
            } else {
                lay_out_keys(tile.keys, count, s.keys.data());
                fetcher.until(20);
                score(num_queries, count, s);
            }
            fetcher.until(48);
            for (int query = 0; query < num_queries; query++) {
                const int visible = task.visible + query / group * task.visible_step - start;
                weigh(query, std::min(visible, count), count, s);
            }
            fetcher.until(64);
            if (are_few && !Layout::HAS_TILES) {
                mix_few(num_queries, tile.values, count, s, fetcher);
            } else {
                lay_out_values(tile.values, count, s.values.data(), fetcher);
                fetcher.until(108);
                mix(num_queries, count, s);
            }
            fetcher.until(2 * TILE);
        }
        finish(unit, s);
    }

    // Phase 3, for rows of several ranges whose states are kept.
    bool merges(int row) const { return p.row_by_range[row] && p.row_positions[row] >= RANGE; }

    void merge(int row) const {
        Scratch &s = scratch_of_thread(1, head_dim());
        for (int head = 0; head < p.num_heads; head++) {
            std::fill_n(s.whole_mixed.begin(), padded_dim(), 0.0f);
            s.whole_best[0] = -INFINITE;
            s.whole_sum[0] = 0;
            for (int place = p.state_starts[row]; place < p.state_starts[row + 1]; place++)
                add_state(mixed_of(place, head), best_of(place, head)[0], best_of(place, head)[1],
                          s.whole_mixed.data(), s.whole_best[0], s.whole_sum[0]);
            write(row, head, s.whole_mixed.data(), s.whole_sum[0]);
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

    void load_queries(const Unit &unit, bool are_few, Scratch &s) const {
        const Task &task = *unit.task;
        const int num_queries = task.rows.count * group, stride = Layout::query_words(head_dim());
        for (int query = 0; query < num_queries; query++) {
            prepare_head(task.rows.row(query / group), unit.kv_head * group + query % group,
                         a.query_norm, s.head.data());
            Layout::lay_out_query(s.head.data(), head_dim(), &s.queries[size_t(query) * stride]);
        }
        if (!are_few || !Layout::HAS_TILES) return;
        std::fill(s.turned_queries.begin(), s.turned_queries.end(), 0);
        for (int query = 0; query < num_queries; query++)
            for (int word = 0; word < stride; word++)
                s.turned_queries[size_t(word) * WIDTH + query] =
                    s.queries[size_t(query) * stride + word];
    }

    // Whether a task has ranges that are done before its last one.
    bool has_several_ranges(const Task &task) const {
        return !task.by_range && task.end > RANGE;
    }

    // The place of the state of the range that a task ends or begins in, among those of a row.
    int place_of_range(const Task &task, int row) const {
        return p.state_starts[row] + (task.by_range ? task.begin / RANGE : 1);
    }

    // Begins with nothing, or with the states that the task before has left.
    void load_states(const Unit &unit, Scratch &s) const {
        const Task &task = *unit.task;
        const int num_queries = task.rows.count * group;
        const bool goes_on = task.by_range ? task.begin % RANGE : task.begin;
        const bool has_whole = !task.by_range && task.begin > RANGE;
        if (!goes_on) begin_range(num_queries, s);
        if (has_several_ranges(task) && !has_whole) {
            std::fill_n(s.whole_mixed.begin(), size_t(num_queries) * padded_dim(), 0.0f);
            std::fill_n(s.whole_best.begin(), num_queries, -INFINITE);
            std::fill_n(s.whole_sum.begin(), num_queries, 0.0f);
        }
        for (int query = 0; goes_on && query < num_queries; query++) {
            const int row = task.rows.row(query / group);
            const int head = unit.kv_head * group + query % group;
            const size_t at = size_t(query) * padded_dim();
            load_state(place_of_range(task, row), head, &s.mixed[at], s.best[query], s.sum[query]);
            if (has_whole)
                load_state(p.state_starts[row], head, &s.whole_mixed[at], s.whole_best[query],
                           s.whole_sum[query]);
        }
    }

    void load_state(int place, int head, float *mixed, float &best, float &sum) const {
        std::memcpy(mixed, mixed_of(place, head), size_t(padded_dim()) * sizeof(float));
        best = best_of(place, head)[0];
        sum = best_of(place, head)[1];
    }

    void store_state(int place, int head, const float *mixed, float best, float sum) const {
        std::memcpy(mixed_of(place, head), mixed, size_t(padded_dim()) * sizeof(float));
        best_of(place, head)[0] = best;
        best_of(place, head)[1] = sum;
    }

    void begin_range(int num_queries, Scratch &s) const {
        std::fill_n(s.mixed.begin(), size_t(num_queries) * padded_dim(), 0.0f);
        std::fill_n(s.best.begin(), num_queries, -INFINITE);
        std::fill_n(s.sum.begin(), num_queries, 0.0f);
    }

    void add_to_whole(int num_queries, Scratch &s) const {
        for (int query = 0; query < num_queries; query++)
            add_state(&s.mixed[size_t(query) * padded_dim()], s.best[query], s.sum[query],
                      &s.whole_mixed[size_t(query) * padded_dim()], s.whole_best[query],
                      s.whole_sum[query]);
    }

    // Adds the state of a range to that of the ranges before it. Most rows see a range, and the
    // first one meets -infinity, whose share is 0.
    void add_state(const float *mixed, float best, float sum, float *whole_mixed,
                   float &whole_best, float &whole_sum) const {
        if (best == -INFINITE) return;
        const float highest = std::max(best, whole_best);
        const float share = bounded_exponential(splat(best - highest))[0];
        const float whole_share = bounded_exponential(splat(whole_best - highest))[0];
        whole_best = highest;
        whole_sum = whole_sum * whole_share + sum * share;
        for (int d = 0; d < padded_dim(); d += WIDTH)
            store(whole_mixed + d, multiply_add(load(mixed + d), splat(share),
                                                load(whole_mixed + d) * whole_share));
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
        for (int t = 0; t < count; t += WIDTH)
            for (int word = 0; word < num_words; word += WIDTH) {
                Words rows[WIDTH];
                load_transposed(keys + t, word, rows);
                const int some = std::min(WIDTH, num_words - word);
                for (int i = 0; i < some; i++) store_words(words + (word + i) * TILE + t, rows[i]);
            }
    }

    // A word of WIDTH keys in each vector.
    void load_transposed(const Element *const *keys, int word, Words (&rows)[WIDTH]) const {
        for (int i = 0; i < WIDTH; i++)
            rows[i] = Layout::key_words(keys[i], word, Layout::query_words(head_dim()));
        transpose(rows);
    }

    // Lays values out as words that belong to a word of weights: [words of weights, padded_dim].
    void lay_out_values(const Element *const *values, int count, uint32_t *words,
                        Fetcher &fetcher) const {
        const int size = padded_dim(), num_words = Layout::weight_words(count);
        const int num_filled = std::min(num_words, (count + KEYS_PER_WORD - 1) / KEYS_PER_WORD);
        for (int word = 0; word < num_filled; word++, words += size) {
            if (word % 4 == 0) fetcher.until(64 + word * 40 / (TILE / KEYS_PER_WORD));
            int d = 0;
            for (; d + 2 * WIDTH <= head_dim(); d += 2 * WIDTH) {
                Words some[2];
                Layout::template value_words<2>(values, word, d, head_dim(), some);
                store_words(words + d, some[0]);
                store_words(words + d + WIDTH, some[1]);
            }
            for (; d < head_dim(); d += WIDTH) {
                Words some[1];
                Layout::template value_words<1>(values, word, d, head_dim(), some);
                store_words(words + d, some[0]);
            }
        }
        // Weights of 0 meet zeros: what lay here before may not be finite.
        std::fill_n(words, size_t(num_words - num_filled) * size, 0u);
    }

    void score(int num_queries, int count, Scratch &s) const {
        const int depth = Layout::query_words(head_dim());
        Layout::multiply(
            {s.queries.data(), depth, s.keys.data(), TILE, s.scores.data(), TILE, nullptr, depth},
            num_queries, round_up(count, WIDTH));
    }

    // Scores keys where they lie.
    void score_few(int num_queries, const Element *const *keys, int count, Scratch &s,
                   Fetcher &fetcher) const {
#if defined(__AMX_BF16__)
        if constexpr (Layout::HAS_TILES) return score_in_tiles(num_queries, keys, count, s, fetcher);
#endif
        for (int query = 0; query < num_queries;) {
            const int rest = num_queries - query;
            if (rest >= 4) {
                score_directly<4>(query, keys, count, s, fetcher);
                query += 4;
            } else if (rest == 3) {
                score_directly<3>(query, keys, count, s, fetcher);
                query += 3;
            } else {
                score_directly<1>(query, keys, count, s, fetcher);
                query++;
            }
        }
    }

    template <int N>
    void score_directly(int query, const Element *const *keys, int count, Scratch &s,
                        Fetcher &fetcher) const {
        const int num_words = Layout::query_words(head_dim());
        const uint32_t *queries = &s.queries[size_t(query) * num_words];
        for (int t = 0; t < count; t += WIDTH) {
            fetcher.until(t * 48 / TILE);
            Vector sums[N] = {};
            for (int word = 0; word < num_words; word += WIDTH) {
                Words rows[WIDTH];
                load_transposed(keys + t, word, rows);
                const int some = DIM ? WIDTH : std::min(WIDTH, num_words - word);
                for (int i = 0; i < some; i++)
                    for (int n = 0; n < N; n++)
                        sums[n] = Layout::Kind::add_product(
                            sums[n], splat(queries[n * num_words + word + i]), rows[i]);
            }
            for (int n = 0; n < N; n++) store(&s.scores[size_t(query + n) * TILE + t], sums[n]);
        }
    }

#if defined(__AMX_BF16__)
    // Multiplies tiles of keys, as they lie, by the queries: [keys, queries], which are turned.
    void score_in_tiles(int num_queries, const Element *const *keys, int count, Scratch &s,
                        Fetcher &fetcher) const {
        const int num_words = Layout::query_words(head_dim());
        const size_t key_bytes = size_t(head_dim()) * sizeof(Element);
        finish_writes();
        for (int t = 0; t < count; t += TILE_ROWS) {
            const void *some = keys[t];
            if (p.page_size % TILE_ROWS) {
                char *copy = reinterpret_cast<char *>(s.keys.data());
                for (int i = 0; i < TILE_ROWS; i++)
                    std::memcpy(copy + i * key_bytes, keys[t + i], key_bytes);
                some = copy;
                finish_writes();
            }
            _tile_zero(2);
            for (int word = 0; word < num_words; word += TILE_ROWS) {
                _tile_loadd(3, static_cast<const uint32_t *>(some) + word, key_bytes);
                _tile_loadd(5, &s.turned_queries[size_t(word) * WIDTH], WIDTH * sizeof(uint32_t));
                _tile_dpbf16ps(2, 3, 5);
            }
            fetcher.until((t + TILE_ROWS) * 40 / TILE);
            alignas(64) Words rows[WIDTH];
            _tile_stored(2, rows, sizeof(Words));
            transpose(rows);
            for (int query = 0; query < num_queries; query++)
                store_words(&s.scores[size_t(query) * TILE + t], rows[query]);
        }
    }
#endif

    // Mixes values where they lie.
    void mix_few(int num_queries, const Element *const *values, int count, Scratch &s,
                 Fetcher &fetcher) const {
        const uint32_t *weights = Layout::weights(s.scores.data(), num_queries, s.weights.data());
        for (int query = 0; query < num_queries;) {
            const int rest = num_queries - query;
            if (rest >= 4) {
                mix_directly<4>(query, weights, values, count, s, fetcher);
                query += 4;
            } else if (rest == 3) {
                mix_directly<3>(query, weights, values, count, s, fetcher);
                query += 3;
            } else {
                mix_directly<1>(query, weights, values, count, s, fetcher);
                query++;
            }
        }
    }

    template <int N>
    void mix_directly(int query, const uint32_t *weights, const Element *const *values, int count,
                      Scratch &s, Fetcher &fetcher) const {
        int d = 0;
        for (; d + BLOCK_VECTORS * WIDTH <= head_dim(); d += BLOCK_VECTORS * WIDTH)
            mix_vectors<N, BLOCK_VECTORS>(query, weights, values, count, d, s, fetcher);
        for (; d < head_dim(); d += WIDTH)
            mix_vectors<N, 1>(query, weights, values, count, d, s, fetcher);
    }

    template <int N, int VECTORS>
    void mix_vectors(int query, const uint32_t *weights, const Element *const *values, int count,
                     int d, Scratch &s, Fetcher &fetcher) const {
        Vector sums[N][VECTORS];
        float *mixed = &s.mixed[size_t(query) * padded_dim() + d];
        weights += query * Layout::weight_stride;
        for (int n = 0; n < N; n++)
            for (int v = 0; v < VECTORS; v++)
                sums[n][v] = load(mixed + n * padded_dim() + v * WIDTH) * s.shrink[query + n];
        const int num_words = Layout::weight_words(count);
        for (int word = 0; word < num_words; word++) {
            if (word % 4 == 0) fetcher.until(64 + word * KEYS_PER_WORD);
            Words value[VECTORS];
            Layout::template value_words<VECTORS>(values, word, d, head_dim(), value);
            for (int n = 0; n < N; n++)
                for (int v = 0; v < VECTORS; v++)
                    sums[n][v] = Layout::Kind::add_product(
                        sums[n][v], splat(weights[n * Layout::weight_stride + word]), value[v]);
        }
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
        for (int t = padded; t < TILE; t += WIDTH) store(scores + t, Vector{});
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

    // Writes the results of rows that have seen all of their positions, and keeps the states of the
    // others.
    void finish(const Unit &unit, Scratch &s) const {
        const Task &task = *unit.task;
        const bool has_ranges = has_several_ranges(task);
        // A task of a group comes before all rows' own positions.
        const bool is_last = task.visible_step && !task.by_range;
        if (is_last && has_ranges) add_to_whole(task.rows.count * group, s);
        for (int query = 0; query < task.rows.count * group; query++) {
            const int row = task.rows.row(query / group), position = p.row_positions[row];
            if (position < task.begin) continue;
            const int head = unit.kv_head * group + query % group;
            const size_t at = size_t(query) * padded_dim();
            if (is_last || position < std::min(RANGE, int(task.end))) {
                if (has_ranges)
                    write(row, head, &s.whole_mixed[at], s.whole_sum[query]);
                else
                    write(row, head, &s.mixed[at], s.sum[query]);
                continue;
            }
            store_state(place_of_range(task, row), head, &s.mixed[at], s.best[query],
                        s.sum[query]);
            if (has_ranges)
                store_state(p.state_starts[row], head, &s.whole_mixed[at], s.whole_best[query],
                            s.whole_sum[query]);
        }
    }

    void write(int row, int head, const float *mixed, float sum) const {
        Element *to = static_cast<Element *>(a.output) +
                      (int64_t(row) * p.num_heads + head) * head_dim();
        const float share = 1.0f / sum;
        for (int d = 0; d < head_dim(); d += WIDTH)
            store(to + d, load(mixed + d) * share, head_dim() - d);
    }

    // A state in the workspace: mixed values; then the best score and the sum.
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
    std::atomic<int> num_taken{0};
#pragma omp parallel num_threads(p.num_threads) if (p.num_threads > 1)
    {
        if (!appends_alone) {
#pragma omp for schedule(static)
            for (int row = 0; row < p.num_rows; row++) kernel.append(row);
        }
        for (int level = 0; level < p.num_levels; level++) {
            const int first = level ? p.level_ends[level - 1] : 0;
            const int num_units = (p.level_ends[level] - first) * p.num_kv_heads;
            if (level) {
#pragma omp barrier
#pragma omp single
                num_taken = 0;
            }
            const auto take = [&](int &number) {
                number++;
                if (number % heads_at_once == 0)
                    number = num_taken.fetch_add(heads_at_once, std::memory_order_relaxed);
                return number < num_units;
            };
            const auto unit_of = [&](int number) {
                return Unit{p.tasks + first + number / p.num_kv_heads, number % p.num_kv_heads};
            };
            // A thread takes its next unit before it runs the one it has, to fetch ahead. Where
            // units are large, it leaves them to the others.
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
        }
        if (p.merges) {
#pragma omp barrier
#pragma omp for schedule(static)
            for (int row = 0; row < p.num_rows; row++)
                if (kernel.merges(row)) kernel.merge(row);
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

// Groups end at a multiple of this number of positions.
int32_t tokasaurus_group_step() { return TILE; }

// The most tasks that a plan has whose other arrays are there.
int64_t tokasaurus_max_tasks(const Plan *plan) {
    const int64_t rows_per_task = tokasaurus_rows_per_task(plan->num_heads / plan->num_kv_heads);
    int64_t count = 0;
    const auto add = [&](int64_t num_rows, int64_t end) {
        count += (num_rows / rows_per_task + 1) * (end / RANGE + 1);
    };
    for (int g = 0; g < plan->num_groups; g++) add(plan->group_num_rows[g], plan->group_ends[g]);
    for (int s = 0; s < plan->num_sequences; s++)
        add(plan->query_starts[s + 1] - plan->query_starts[s], plan->kv_lengths[s]);
    return count;
}

void tokasaurus_plan_attention(Plan *plan, int64_t, int32_t) { Planner(*plan).plan(); }

void tokasaurus_attend(const Layer *layer, int64_t, int32_t) {
    const Plan &plan = **layer->plan;
    switch (plan.element) {
        case 0: return run<float, WideLayout<float>>(plan, *layer);
        case 1:
#if defined(__AMX_BF16__)
            if (TilesLayout::can_run(plan.head_dim))
                return run<BFloat16, TilesLayout>(plan, *layer);
#endif
#if defined(__AVX512BF16__)
            return run<BFloat16, PairsLayout>(plan, *layer);
#else
            return run<BFloat16, WideLayout<BFloat16>>(plan, *layer);
#endif
        default: return run<Float16, WideLayout<Float16>>(plan, *layer);
    }
}
}
