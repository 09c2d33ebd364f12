// Products of activations with packed weights, on the CPU:
//
//     y[m, n] = bias[n] + the sum over k of x[m, k] * weight[n, k]
//
// The weight is cut into panels of PANEL rows, which are columns of y. A panel's numbers lie in the
// order in which the loops read them:
//
//     fp32   [panels][in][PANEL]                  one k after the other
//     bf16   [panels][in / CHUNK][2][16][16][2]   chunks of k, each with two tiles of 16 columns; in
//                                                 a tile, 16 pairs of k: the layout of AMX's tiles
//
// Rows and k that a panel or chunk has beyond the weight's are zero. Threads share the panels, so
// each reads a part of the weight once, and all of x.
//
// Each number of y is one sum, in ascending order of k and without regard to the number of rows. So
// a row's results do not depend on the other rows of the batch.

#include <vector>

#include "panels.h"

extern "C" {

// Mirrored by _Product in packed.py. Strides are in elements.
struct Arguments {
    const void *x;  // [rows, in], rows x_stride apart
    int64_t x_stride;
    const void *weight;  // packed
    const void *bias;    // [out], or null
    void *y;             // [rows, out]
    int64_t in, out;
    const Arguments *following;  // what is multiplied next, whose weight is fetched; or null
    int32_t element;             // 0 fp32, 1 bf16
};
}

namespace {

constexpr int CHUNK = 2 * TILE;
constexpr int CHUNK_SIZE = CHUNK * PANEL;

// Numbers in a vector register; rows of a block, so that its sums fit into the registers.
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
constexpr int MAX_ROWS = 12;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
constexpr int MAX_ROWS = 6;
#else
constexpr int WIDTH = 4;
constexpr int MAX_ROWS = 4;
#endif

struct Product : Arguments {
    int64_t rows, max_threads;
};

typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(WIDTH * sizeof(uint32_t))));

// a * b + c, rounded once where the processor can: in every loop alike, so the compiler must not
// choose.
inline Vector multiply_add(float a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Vector)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    for (int i = 0; i < WIDTH; i++) c[i] = __builtin_fmaf(a, b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

// Writes sums of consecutive columns of one row, from column n on.
inline void write(const Product &p, int64_t row, int64_t n, const float *sums, int count) {
    const int columns = int(std::min<int64_t>(count, p.out - n));
    if (p.element == 0) {
        float *y = static_cast<float *>(p.y) + row * p.out + n;
        const float *bias = static_cast<const float *>(p.bias);
        for (int i = 0; i < columns; i++) y[i] = bias ? sums[i] + bias[n + i] : sums[i];
    } else {
        uint16_t *y = static_cast<uint16_t *>(p.y) + row * p.out + n;
        const uint16_t *bias = static_cast<const uint16_t *>(p.bias);
        for (int i = 0; i < columns; i++)
            narrow(bias ? sums[i] + widen(bias[n + i]) : sums[i], y[i]);
    }
}

// --- blocks of rows, in vector registers --------------------------------------------------------

// The two kinds of numbers. ``step`` is the number of k that one step of the loop takes; a step
// reads STRIDE bytes of each panel.
struct F32 {
    typedef float X;
    typedef Vector Column;
    static constexpr int64_t step = 1, STRIDE = PANEL * sizeof(float);

    static int64_t steps(int64_t in) { return in; }
    static int64_t offset(int column, int64_t) { return column * sizeof(float); }
    static int64_t advance(int64_t k) { return k * STRIDE; }
    static void add(Vector &sum, const X *x, Column w) { sum = multiply_add(*x, w, sum); }
};

struct BF16 {
#if defined(__AVX512BF16__)
    typedef uint16_t X;
    typedef __m512bh Column;
    static void add(Vector &sum, const X *x, Column w) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(load<int32_t>(x));
        sum = (Vector)_mm512_dpbf16_ps((__m512)sum, both, w);
    }
#else
    typedef float X;
    typedef Bits Column;
    static void add(Vector &sum, const X *x, Column w) {
        const Bits even = w << 16, odd = w & 0xffff0000u;
        sum = multiply_add(x[0], load<Vector>(&even), sum);
        sum = multiply_add(x[1], load<Vector>(&odd), sum);
    }
#endif
    static constexpr int64_t step = 2, STRIDE = 2 * PANEL * sizeof(uint16_t);

    static int64_t steps(int64_t in) { return ceil_div(in, CHUNK) * TILE; }
    static int64_t offset(int column, int64_t) {
        return (column / TILE * TILE * TILE + column % TILE) * 2 * sizeof(uint16_t);
    }
    // Chunks of 16 steps; a step's columns of one tile lie next to each other.
    static int64_t advance(int64_t k) {
        return (k / TILE * CHUNK_SIZE + k % TILE * CHUNK) * sizeof(uint16_t);
    }
};

// x of a product, as the blocks read it.
template <typename X>
struct Rows {
    const X *x;
    int64_t stride;
    const X *row(int64_t m) const { return x + m * stride; }
};

inline int64_t panel_bytes_of(const Arguments &a) {
    return PANEL * (a.element ? ceil_div(a.in, CHUNK) * CHUNK * int64_t(sizeof(uint16_t))
                              : a.in * int64_t(sizeof(float)));
}

// What a thread reads after each of its panels.
inline auto next_of(const Product &p, const Share &share) {
    return [&](int64_t panel) { return after(p, share, panel, panel_bytes_of); };
}

// The sums of ROWS rows and VECTORS vectors of columns, which may span panels.
template <typename Kind, int ROWS, int VECTORS>
inline void block(const Product &p, const Rows<typename Kind::X> &rows, int64_t row, int64_t panel,
                  int column, Ahead ahead) {
    const int64_t steps = Kind::steps(p.in), panel_bytes = steps * Kind::STRIDE;
    const char *weight[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        const int c = column + v * WIDTH;
        weight[v] = static_cast<const char *>(p.weight) + (panel + c / PANEL) * panel_bytes +
                    Kind::offset(c % PANEL, p.in);
    }
    const typename Kind::X *x = rows.row(row);
    Vector sums[ROWS][VECTORS] = {};
    const bool is_much = ahead.size > steps * 64;
    for (int64_t k = 0; k < steps; k++) {
        if (ahead.size > 0) ahead.fetch_line();
        if (is_much && ahead.size > 0) ahead.fetch_line();
        typename Kind::Column w[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) {
            const char *from = weight[v] + Kind::advance(k);
            // Few rows wait for memory: each line is read once.
            if (VECTORS > 2) __builtin_prefetch(from + STREAM_AHEAD);
            w[v] = load<typename Kind::Column>(from);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++)
                Kind::add(sums[r][v], x + r * rows.stride + k * Kind::step, w[v]);
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) {
            const int64_t n = panel * PANEL + column + v * WIDTH;
            if (n < p.out)
                write(p, row + r, n, reinterpret_cast<const float *>(&sums[r][v]), WIDTH);
        }
}

// ROWS rows times the panels from ``first`` to ``end``. Few rows take many columns at a time, so
// that there are enough sums in flight to hide the latency of an addition.
template <typename Kind, int ROWS>
inline void panels_of(const Product &p, const Rows<typename Kind::X> &rows, int64_t row,
                      int64_t first, int64_t end, Ahead ahead) {
    constexpr int VECTORS = ROWS * 8 <= 2 * MAX_ROWS ? 8 : ROWS * 4 <= 2 * MAX_ROWS ? 4 : 2;
    constexpr int COLUMNS = VECTORS * WIDTH;
    int64_t panel = first;
    if constexpr (COLUMNS > PANEL)
        for (; panel + COLUMNS / PANEL <= end; panel += COLUMNS / PANEL)
            block<Kind, ROWS, VECTORS>(p, rows, row, panel, 0, {});
    constexpr int WITHIN = std::min(COLUMNS, PANEL);
    for (; panel < end; panel++)
        for (int column = 0; column < PANEL; column += WITHIN)
            block<Kind, ROWS, WITHIN / WIDTH>(p, rows, row, panel, column, column ? Ahead{} : ahead);
}

template <typename Kind, int ROWS = MAX_ROWS>
inline void any_rows(int64_t count, const Product &p, const Rows<typename Kind::X> &rows,
                     int64_t row, int64_t first, int64_t end, Ahead ahead) {
    if (count == ROWS) return panels_of<Kind, ROWS>(p, rows, row, first, end, ahead);
    if constexpr (ROWS > 1) any_rows<Kind, ROWS - 1>(count, p, rows, row, first, end, ahead);
}

// The panels of one thread.
template <typename Kind>
inline void multiply(const Product &p, const Rows<typename Kind::X> &rows, const Share &share) {
    for_row_blocks<MAX_ROWS>(
        p.rows, p.in * int64_t(sizeof(typename Kind::X)), share, next_of(p, share),
        [&](int64_t row, int64_t count, int64_t first, int64_t end, Ahead ahead) {
            any_rows<Kind>(count, p, rows, row, first, end, ahead);
        });
}

// --- blocks of rows, in AMX's tiles -------------------------------------------------------------

#if defined(__AMX_BF16__)

template <bool HAS_LOWER>
inline void tile_block(const Product &p, const Rows<uint16_t> &rows, int64_t row, int count,
                       int64_t panel, Ahead ahead) {
    const int64_t chunks = ceil_div(p.in, CHUNK), stride = rows.stride * sizeof(uint16_t);
    const uint16_t *upper = rows.row(row), *lower = rows.row(row + TILE);
    const uint16_t *weight = static_cast<const uint16_t *>(p.weight) + panel * chunks * CHUNK_SIZE;
    const int lines = int(ceil_div(ahead.size / 64, chunks));
    _tile_zero(0);
    _tile_zero(1);
    if (HAS_LOWER) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        for (int line = 0; line < lines && ahead.size > 0; line++) ahead.fetch_line();
        _tile_loadd(4, upper + chunk * CHUNK, stride);
        _tile_loadd(6, weight + chunk * CHUNK_SIZE, 64);
        _tile_loadd(7, weight + chunk * CHUNK_SIZE + TILE * CHUNK, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (HAS_LOWER) {
            _tile_loadd(5, lower + chunk * CHUNK, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    alignas(64) float sums[2 * TILE][PANEL];
    _tile_stored(0, sums[0], sizeof sums[0]);
    _tile_stored(1, sums[0] + TILE, sizeof sums[0]);
    if (HAS_LOWER) {
        _tile_stored(2, sums[TILE], sizeof sums[0]);
        _tile_stored(3, sums[TILE] + TILE, sizeof sums[0]);
    }
    const int64_t n = panel * PANEL;
    for (int r = 0; r < count; r++) {
        if (p.bias || n + PANEL > p.out) {
            write(p, row + r, n, sums[r], PANEL);
            continue;
        }
        const __m512bh line =
            _mm512_cvtne2ps_pbh(_mm512_load_ps(sums[r] + TILE), _mm512_load_ps(sums[r]));
        std::memcpy(static_cast<uint16_t *>(p.y) + (row + r) * p.out + n, &line, sizeof line);
    }
}

// The panels of one thread.
void multiply_in_tiles(const Product &p, const Rows<uint16_t> &rows, const Share &share) {
    for_tile_blocks(p.rows, p.in * int64_t(sizeof(uint16_t)), share, next_of(p, share),
                    [&](int64_t row, int count, int64_t panel, Ahead ahead) {
                        if (count > TILE) return tile_block<true>(p, rows, row, count, panel, ahead);
                        tile_block<false>(p, rows, row, count, panel, ahead);
                    });
}
#endif

// --- x as the blocks read it --------------------------------------------------------------------

// A copy of x with whole chunks of k, in numbers of type To. It is kept until the next product.
template <typename To, typename Convert>
Rows<To> copy_of_x(const Product &p, Convert convert) {
    static thread_local std::vector<To> copy;
    const int64_t stride = ceil_div(p.in, CHUNK) * CHUNK;
    copy.assign(size_t(p.rows) * stride, To(0));
    for (int64_t m = 0; m < p.rows; m++) {
        const uint16_t *x = static_cast<const uint16_t *>(p.x) + m * p.x_stride;
        for (int64_t k = 0; k < p.in; k++) copy[m * stride + k] = convert(x[k]);
    }
    return {copy.data(), stride};
}

Rows<BF16::X> rows_of_bf16(const Product &p) {
#if defined(__AVX512BF16__)
    if (p.in % CHUNK == 0) return {static_cast<const uint16_t *>(p.x), p.x_stride};
    return copy_of_x<uint16_t>(p, [](uint16_t x) { return x; });
#else
    return copy_of_x<float>(p, [](uint16_t x) { return widen(x); });
#endif
}

// --- packing ------------------------------------------------------------------------------------

// The rows of one panel from ``from`` to ``to``, of a weight [out, in]. A block of columns of all
// rows goes to its place before the next, so that what is written stays in the first-level cache.
void pack_panel(const float *weight, int64_t from, int64_t to, int64_t in, float *packed) {
    float *panel = packed + from / PANEL * in * PANEL;
    for (int64_t start = 0; start < in; start += TILE)
        for (int64_t n = from; n < to; n++)
            for (int64_t k = start; k < std::min(start + TILE, in); k++)
                panel[k * PANEL + n % PANEL] = weight[n * in + k];
}

// A chunk of a row of bf16 is TILE pairs, which lie TILE pairs apart.
typedef uint32_t Pair;

inline int64_t first_pair(int64_t in, int64_t n, int64_t k) {
    const int64_t chunk = n / PANEL * ceil_div(in, CHUNK) + k / CHUNK;
    return (chunk * 2 + n % PANEL / TILE) * TILE * TILE + n % TILE;
}

void pack_panel(const uint16_t *weight, int64_t from, int64_t to, int64_t in, uint16_t *packed) {
    for (int64_t start = 0; start < in; start += CHUNK)
        for (int64_t n = from; n < to; n++) {
            Pair pairs[TILE] = {};
            std::memcpy(pairs, weight + n * in + start,
                        std::min<int64_t>(CHUNK, in - start) * sizeof(uint16_t));
            uint16_t *place = packed + 2 * first_pair(in, n, start);
            for (int i = 0; i < TILE; i++)
                std::memcpy(place + 2 * i * TILE, pairs + i, sizeof(Pair));
        }
}

void unpack_row(const float *packed, int64_t n, int64_t in, float *row) {
    const float *panel = packed + n / PANEL * in * PANEL + n % PANEL;
    for (int64_t k = 0; k < in; k++) row[k] = panel[k * PANEL];
}

void unpack_row(const uint16_t *packed, int64_t n, int64_t in, uint16_t *row) {
    for (int64_t start = 0; start < in; start += CHUNK) {
        const uint16_t *place = packed + 2 * first_pair(in, n, start);
        Pair pairs[TILE];
        for (int i = 0; i < TILE; i++) std::memcpy(pairs + i, place + 2 * i * TILE, sizeof(Pair));
        std::memcpy(row + start, pairs, std::min<int64_t>(CHUNK, in - start) * sizeof(uint16_t));
    }
}

// Calls ``work`` in each thread with its share of the panels.
template <typename Work>
void share_panels(const Product &p, Work work) {
    const int64_t num_threads = threads_of(p, p.max_threads);
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t thread = 0; thread < num_threads; thread++)
        work(share_of(thread, num_threads, p.out));
}

}  // namespace

extern "C" {

extern const int64_t tokasaurus_sizes[] = {sizeof(Arguments)};

// Numbers in a packed weight.
int64_t tokasaurus_packed_size(int64_t out, int64_t in, int32_t element) {
    return ceil_div(out, PANEL) * PANEL * (element ? ceil_div(in, CHUNK) * CHUNK : in);
}

// Packs the rows of a part of the weight, [rows, in], which begins at row ``first`` of the whole.
void tokasaurus_pack(const void *part, int64_t rows, int64_t in, int64_t first, int32_t element,
                     void *packed) {
    const int64_t end = first + rows;
#pragma omp parallel for
    for (int64_t panel = first / PANEL; panel < ceil_div(end, PANEL); panel++) {
        const int64_t from = std::max(first, panel * PANEL);
        const int64_t to = std::min(end, (panel + 1) * PANEL);
        if (element == 0)
            pack_panel(static_cast<const float *>(part) - first * in, from, to, in,
                       static_cast<float *>(packed));
        else
            pack_panel(static_cast<const uint16_t *>(part) - first * in, from, to, in,
                       static_cast<uint16_t *>(packed));
    }
}

// Writes chosen rows of a packed weight to ``to``, [count, in].
void tokasaurus_unpack(const void *packed, const int64_t *rows, int64_t count, int64_t in,
                       int32_t element, void *to) {
#pragma omp parallel for if (count > 8)
    for (int64_t i = 0; i < count; i++)
        if (element == 0)
            unpack_row(static_cast<const float *>(packed), rows[i], in,
                       static_cast<float *>(to) + i * in);
        else
            unpack_row(static_cast<const uint16_t *>(packed), rows[i], in,
                       static_cast<uint16_t *>(to) + i * in);
}

void tokasaurus_multiply(const Arguments *arguments, int64_t num_rows, int32_t num_threads) {
    const Product p{*arguments, num_rows, num_threads};
    if (p.element == 0) {
        const Rows<float> rows = {static_cast<const float *>(p.x), p.x_stride};
        share_panels(p, [&](const Share &share) { multiply<F32>(p, rows, share); });
        return;
    }
    const Rows<BF16::X> rows = rows_of_bf16(p);
    share_panels(p, [&](const Share &share) {
#if defined(__AMX_BF16__)
        if (may_use_tiles()) return multiply_in_tiles(p, rows, share);
#endif
        multiply<BF16>(p, rows, share);
    });
}
}
