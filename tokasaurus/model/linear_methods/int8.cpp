// Products of activations with int8 weights, on the CPU:
//
//     y[m, n] = bias[n] + x_scale[m] * weight_scale[n] * the sum over k of x8[m, k] * weight8[n, k]
//
// Each row of the weight is quantized once, and each row of x anew in every product: the largest
// magnitude of a row becomes 127, and zero stays zero. The sum is exact in int32, for up to 133,000
// inputs. So results do not depend on the other rows of the batch, the number of threads, or the
// instruction set.
//
// The weight is cut into panels of PANEL rows, which are columns of y. A panel's numbers lie in the
// order in which the loops read them:
//
//     [panels][in / CHUNK][2][16][16][4]    chunks of k, each with two tiles of 16 columns; in a
//                                           tile, 16 times 4 k: the layout of AMX's tiles
//
// A weight has no -128, and k that a chunk has beyond the weight's are zero. Rows that a panel has
// beyond the weight's may be anything. Threads share the panels, so each reads a part of the weight
// once, and all of x.

#include <cmath>
#include <limits>
#include <vector>

#include "panels.h"

extern "C" {

// Mirrored by _Product in int8.py. Strides are in elements.
struct Arguments {
    const void *x;  // [rows, in], rows x_stride apart
    int64_t x_stride;
    const int8_t *weight;  // packed
    const float *scales;   // [out], of the weight's rows
    const int32_t *sums;   // [whole panels], of the weight's rows
    const void *bias;      // [out], or null
    void *y;               // [rows, out]
    int64_t in, out;
    const Arguments *following;  // what is multiplied next, whose weight is fetched; or null
    int32_t element;             // of x, bias and y: 0 fp32, 1 bf16
};
}

namespace {

// k of a step: what one instruction adds up.
constexpr int STEP = 4;
constexpr int CHUNK = STEP * TILE;
constexpr int64_t TILE_BYTES = TILE * CHUNK, CHUNK_BYTES = 2 * TILE_BYTES;

// Numbers of x that justify that the threads quantize together and wait for each other.
constexpr int64_t SHARED_SIZE = 1 << 13;

constexpr float LARGEST = 127;

struct Product : Arguments {
    int64_t rows, max_threads;
};

inline int64_t chunks_of(int64_t in) { return ceil_div(in, CHUNK); }

inline int64_t panel_bytes_of(int64_t in) { return chunks_of(in) * CHUNK_BYTES; }

inline float float_of(uint32_t bits) { return load<float>(&bits); }
inline uint32_t bits_of(float value) { return load<uint32_t>(&value); }

// --- quantizing ---------------------------------------------------------------------------------

// The bits of the largest magnitude. Those of inf are larger than all numbers', and NaN's larger
// still.
template <typename Element>
inline uint32_t largest_of(const Element *row, int64_t size);

template <>
inline uint32_t largest_of(const float *row, int64_t size) {
    int32_t largest = 0;
    for (int64_t k = 0; k < size; k++)
        largest = std::max(largest, int32_t(bits_of(row[k]) & 0x7fffffffu));
    return uint32_t(largest);
}

template <>
inline uint32_t largest_of(const uint16_t *row, int64_t size) {
    uint16_t largest = 0;
    for (int64_t k = 0; k < size; k++)
        largest = std::max(largest, uint16_t(row[k] & 0x7fffu));
    return uint32_t(largest) << 16;
}

// What is added to a quantized number where it is stored: some instructions take x without a sign.
template <typename To>
constexpr uint32_t OFFSET = 0;
template <>
constexpr uint32_t OFFSET<uint8_t> = 128;

// Writes a row as integers, and returns their scale. A row with inf or NaN has the scale NaN, so
// that all of its results are NaN. Numbers so small that no scale divides by them count as zero.
template <typename To, typename Element>
float quantize(const Element *__restrict row, int64_t size, To *__restrict to) {
    // Adding it rounds to an integer, ties to even, which is then in the lowest bits.
    constexpr float ROUND = 3 << 22;
    const float largest = float_of(largest_of(row, size));
    const float inverse = LARGEST / largest;
    if (!(largest < std::numeric_limits<float>::infinity()) || !(inverse < 1e38f)) {
        std::fill_n(to, size, To(OFFSET<To>));
        return largest < 1 ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    }
    for (int64_t k = 0; k < size; k++)
        to[k] = To(bits_of(widen(row[k]) * inverse + ROUND) ^ OFFSET<To>);
    return largest / LARGEST;
}

// x of a product in integers; rows have whole chunks.
template <typename X>
struct Quantized {
    X *numbers;
    float *scales;
    int64_t stride;
    const X *row(int64_t m) const { return numbers + m * stride; }
};

// Room for x, which is kept until the next product.
template <typename X>
Quantized<X> room_for(const Product &p) {
    struct alignas(64) Line {
        char bytes[64];
    };
    static thread_local std::vector<Line> numbers;
    static thread_local std::vector<float> scales;
    const int64_t stride = chunks_of(p.in) * CHUNK;
    const size_t lines = size_t(p.rows) * stride * sizeof(X) / sizeof(Line);
    if (numbers.size() < lines) numbers.resize(lines);
    if (scales.size() < size_t(p.rows)) scales.resize(p.rows);
    return {reinterpret_cast<X *>(numbers.data()), scales.data(), stride};
}

template <typename X, typename Element>
void quantize_rows(const Product &p, const Quantized<X> &to, int64_t first, int64_t end) {
    const Element *x = static_cast<const Element *>(p.x);
    for (int64_t m = first; m < end; m++) {
        X *row = to.numbers + m * to.stride;
        to.scales[m] = quantize(x + m * p.x_stride, p.in, row);
        std::fill(row + p.in, row + to.stride, X(OFFSET<X>));
    }
}

template <typename X>
void quantize_rows(const Product &p, const Quantized<X> &to, int64_t first, int64_t end) {
    if (p.element == 0) return quantize_rows<X, float>(p, to, first, end);
    quantize_rows<X, uint16_t>(p, to, first, end);
}

// --- results ------------------------------------------------------------------------------------

template <typename Element>
inline void write_columns(const Product &p, int64_t row, int64_t n, float scale,
                          const int32_t *sums, int columns) {
    Element *__restrict y = static_cast<Element *>(p.y) + row * p.out + n;
    const float *scales = p.scales + n;
    if (p.bias) {
        const Element *bias = static_cast<const Element *>(p.bias) + n;
        for (int i = 0; i < columns; i++)
            narrow(float(sums[i]) * scale * scales[i] + widen(bias[i]), y[i]);
    } else {
        for (int i = 0; i < columns; i++) narrow(float(sums[i]) * scale * scales[i], y[i]);
    }
}

// Writes the results of COUNT consecutive columns of one row, from column n on.
template <int COUNT>
inline void write(const Product &p, int64_t row, int64_t n, float scale, const int32_t *sums) {
    const int columns = int(std::min<int64_t>(COUNT, p.out - n));
    if (p.element == 0) {
        if (columns == COUNT) return write_columns<float>(p, row, n, scale, sums, COUNT);
        write_columns<float>(p, row, n, scale, sums, columns);
    } else {
        if (columns == COUNT) return write_columns<uint16_t>(p, row, n, scale, sums, COUNT);
        write_columns<uint16_t>(p, row, n, scale, sums, columns);
    }
}

// What a thread reads after each of its panels.
inline auto next_of(const Product &p, const Share &share) {
    return [&](int64_t panel) {
        return after(p, share, panel, [](const Arguments &a) { return panel_bytes_of(a.in); });
    };
}

// --- blocks of rows, in vector registers --------------------------------------------------------

// How a vector of sums takes a step of k. COLUMNS is the number of columns of a vector; MAX_ROWS
// the rows of a block, so that its sums fit into the registers.
#if defined(__AVX512VNNI__)

struct Dot {
    typedef uint8_t X;
    typedef __m512i Sum;
    typedef __m512i Column;
    static constexpr int COLUMNS = 16, MAX_ROWS = 12;
    static Sum first(const int32_t *sums) { return offset(_mm512_loadu_si512(sums)); }
    static Sum offset(__m512i sums) {
        return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, 7));
    }
    static Column weight(const char *from) { return _mm512_loadu_si512(from); }
    static void add(Sum &sum, const X *x, Column w) {
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(load<int32_t>(x)), w);
    }
    static void store(Sum sum, int32_t *to) { _mm512_storeu_si512(to, sum); }
};

#elif defined(__AVXVNNI__)

struct Dot {
    typedef uint8_t X;
    typedef __m256i Sum;
    typedef __m256i Column;
    static constexpr int COLUMNS = 8, MAX_ROWS = 6;
    static Sum first(const int32_t *sums) {
        const __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(sums));
        return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(sum, 7));
    }
    static Column weight(const char *from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    }
    static void add(Sum &sum, const X *x, Column w) {
        sum = _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi32(load<int32_t>(x)), w);
    }
    static void store(Sum sum, int32_t *to) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), sum);
    }
};

// Without an instruction for bytes, numbers are widened to 16 bits: an addition of products of
// bytes with and without a sign would saturate. Two lanes of a sum belong to each column.
#elif defined(__AVX512BW__)

struct Dot {
    typedef int16_t X;
    typedef __m512i Sum;
    typedef __m512i Column;
    static constexpr int COLUMNS = 8, MAX_ROWS = 12;
    static Sum first(const int32_t *) { return _mm512_setzero_si512(); }
    static Column weight(const char *from) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
    }
    static void add(Sum &sum, const X *x, Column w) {
        const __m512i both = _mm512_set1_epi64(load<int64_t>(x));
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(both, w));
    }
    static void store(Sum sum, int32_t *to) {
        const __m512i other = _mm512_shuffle_epi32(sum, _MM_PERM_ENUM(0xb1));
        const __m256i both = _mm512_cvtepi64_epi32(_mm512_add_epi32(sum, other));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), both);
    }
};

#elif defined(__AVX2__)

struct Dot {
    typedef int16_t X;
    typedef __m256i Sum;
    typedef __m256i Column;
    static constexpr int COLUMNS = 4, MAX_ROWS = 6;
    static Sum first(const int32_t *) { return _mm256_setzero_si256(); }
    static Column weight(const char *from) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    }
    static void add(Sum &sum, const X *x, Column w) {
        const __m256i both = _mm256_set1_epi64x(load<int64_t>(x));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(both, w));
    }
    static void store(Sum sum, int32_t *to) {
        const __m128i low = _mm256_castsi256_si128(sum), high = _mm256_extracti128_si256(sum, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm_hadd_epi32(low, high));
    }
};

#elif defined(__SSE2__)

struct Dot {
    typedef int16_t X;
    typedef __m128i Sum;
    typedef __m128i Column;
    static constexpr int COLUMNS = 2, MAX_ROWS = 5;
    static Sum first(const int32_t *) { return _mm_setzero_si128(); }
    static Column weight(const char *from) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from));
        return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
    }
    static void add(Sum &sum, const X *x, Column w) {
        const __m128i both = _mm_set1_epi64x(load<int64_t>(x));
        sum = _mm_add_epi32(sum, _mm_madd_epi16(both, w));
    }
    static void store(Sum sum, int32_t *to) {
        const __m128i both = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
        _mm_storel_epi64(reinterpret_cast<__m128i *>(to), _mm_shuffle_epi32(both, 0xd8));
    }
};

#else

struct Dot {
    typedef int16_t X;
    struct Sum {
        int32_t columns[4];
    };
    struct Column {
        int8_t numbers[4][STEP];
    };
    static constexpr int COLUMNS = 4, MAX_ROWS = 4;
    static Sum first(const int32_t *) { return {}; }
    static Column weight(const char *from) { return load<Column>(from); }
    static void add(Sum &sum, const X *x, const Column &w) {
        for (int c = 0; c < COLUMNS; c++)
            for (int i = 0; i < STEP; i++) sum.columns[c] += x[i] * w.numbers[c][i];
    }
    static void store(const Sum &sum, int32_t *to) { std::memcpy(to, &sum, sizeof sum); }
};

#endif

// The sums of ROWS rows and VECTORS vectors of columns, which may span panels.
template <int ROWS, int VECTORS>
inline void block(const Product &p, const Quantized<Dot::X> &rows, int64_t row, int64_t panel,
                  int column, Ahead ahead) {
    constexpr int COLUMNS = Dot::COLUMNS;
    const int64_t chunks = chunks_of(p.in), panel_bytes = panel_bytes_of(p.in);
    const char *weight[VECTORS];
    Dot::Sum sums[ROWS][VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        const int c = column + v * COLUMNS;
        weight[v] = reinterpret_cast<const char *>(p.weight) + (panel + c / PANEL) * panel_bytes +
                    c % PANEL / TILE * TILE_BYTES + c % TILE * STEP;
        const Dot::Sum first = Dot::first(p.sums + panel * PANEL + c);
        for (int r = 0; r < ROWS; r++) sums[r][v] = first;
    }
    const Dot::X *x = rows.row(row);
    const bool is_much = ahead.size > chunks * CHUNK_BYTES / 2;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        for (int step = 0; step < TILE; step++) {
            if (ahead.size > 0) ahead.fetch_line();
            if (is_much && ahead.size > 0) ahead.fetch_line();
            Dot::Column w[VECTORS];
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) {
                const char *from = weight[v] + step * TILE * STEP;
                // Few rows wait for memory: each line is read once.
                if (VECTORS > 2) __builtin_prefetch(from + STREAM_AHEAD);
                w[v] = Dot::weight(from);
            }
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
                for (int v = 0; v < VECTORS; v++)
                    Dot::add(sums[r][v], x + r * rows.stride + step * STEP, w[v]);
        }
        x += CHUNK;
        for (int v = 0; v < VECTORS; v++) weight[v] += CHUNK_BYTES;
    }
    constexpr int ALL = VECTORS * COLUMNS, PART = std::min(ALL, PANEL);
    for (int r = 0; r < ROWS; r++) {
        alignas(64) int32_t stored[ALL];
        for (int v = 0; v < VECTORS; v++) Dot::store(sums[r][v], stored + v * COLUMNS);
        const float scale = rows.scales[row + r];
        for (int c = 0; c < ALL; c += PART) {
            const int64_t n = panel * PANEL + column + c;
            if (n < p.out) write<PART>(p, row + r, n, scale, stored + c);
        }
    }
}

// ROWS rows times the panels from ``first`` to ``end``. Few rows take many columns at a time, so
// that there are enough sums in flight to hide the latency of an addition.
template <int ROWS>
inline void panels_of(const Product &p, const Quantized<Dot::X> &rows, int64_t row, int64_t first,
                      int64_t end, Ahead ahead) {
    constexpr int MAX_ROWS = Dot::MAX_ROWS;
    constexpr int VECTORS = ROWS * 8 <= 2 * MAX_ROWS ? 8 : ROWS * 4 <= 2 * MAX_ROWS ? 4 : 2;
    constexpr int COLUMNS = VECTORS * Dot::COLUMNS;
    int64_t panel = first;
    if constexpr (COLUMNS > PANEL)
        for (; panel + COLUMNS / PANEL <= end; panel += COLUMNS / PANEL)
            block<ROWS, VECTORS>(p, rows, row, panel, 0, {});
    constexpr int WITHIN = std::min(COLUMNS, PANEL);
    for (; panel < end; panel++)
        for (int column = 0; column < PANEL; column += WITHIN)
            block<ROWS, WITHIN / Dot::COLUMNS>(p, rows, row, panel, column,
                                               ahead.part(column / WITHIN, PANEL / WITHIN));
}

template <int ROWS = Dot::MAX_ROWS>
inline void any_rows(int64_t count, const Product &p, const Quantized<Dot::X> &rows, int64_t row,
                     int64_t first, int64_t end, Ahead ahead) {
    if (count == ROWS) return panels_of<ROWS>(p, rows, row, first, end, ahead);
    if constexpr (ROWS > 1) any_rows<ROWS - 1>(count, p, rows, row, first, end, ahead);
}

// The panels of one thread.
void multiply(const Product &p, const Quantized<Dot::X> &rows, const Share &share) {
    for_row_blocks<Dot::MAX_ROWS>(
        p.rows, rows.stride * int64_t(sizeof(Dot::X)), share, next_of(p, share),
        [&](int64_t row, int64_t count, int64_t first, int64_t end, Ahead ahead) {
            any_rows(count, p, rows, row, first, end, ahead);
        });
}

// --- blocks of rows, in AMX's tiles -------------------------------------------------------------

#if defined(__AMX_INT8__)

// For instructions that classify numbers. Those that round to bf16 write such numbers as zero.
constexpr int DENORMAL = 0x20;

// Writes a whole panel's columns of one row.
inline void write_panel(const Product &p, int64_t row, int64_t n, float scale,
                        const int32_t *sums) {
#if defined(__AVX512BF16__)
    if (p.element == 1 && !p.bias && n + PANEL <= p.out) {
        __m512 y[2];
        bool has_tiny = false;
        for (int half = 0; half < 2; half++) {
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + half * TILE));
            y[half] = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(scale)),
                                    _mm512_loadu_ps(p.scales + n + half * TILE));
            has_tiny |= _mm512_fpclass_ps_mask(y[half], DENORMAL) != 0;
        }
        if (!has_tiny) {
            const __m512bh line = _mm512_cvtne2ps_pbh(y[1], y[0]);
            std::memcpy(static_cast<uint16_t *>(p.y) + row * p.out + n, &line, sizeof line);
            return;
        }
    }
#endif
    write<PANEL>(p, row, n, scale, sums);
}

template <bool HAS_LOWER>
inline void tile_block(const Product &p, const Quantized<int8_t> &rows, int64_t row, int count,
                       int64_t panel, Ahead ahead) {
    const int64_t chunks = chunks_of(p.in);
    const int8_t *upper = rows.row(row), *lower = rows.row(row + TILE);
    const int8_t *weight = p.weight + panel * chunks * CHUNK_BYTES;
    const int lines = int(ceil_div(ahead.size / 64, chunks));
    _tile_zero(0);
    _tile_zero(1);
    if (HAS_LOWER) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        for (int line = 0; line < lines && ahead.size > 0; line++) ahead.fetch_line();
        _tile_loadd(4, upper + chunk * CHUNK, rows.stride);
        _tile_loadd(6, weight + chunk * CHUNK_BYTES, 64);
        _tile_loadd(7, weight + chunk * CHUNK_BYTES + TILE_BYTES, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if (HAS_LOWER) {
            _tile_loadd(5, lower + chunk * CHUNK, rows.stride);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
    alignas(64) int32_t sums[2 * TILE][PANEL];
    _tile_stored(0, sums[0], sizeof sums[0]);
    _tile_stored(1, sums[0] + TILE, sizeof sums[0]);
    if (HAS_LOWER) {
        _tile_stored(2, sums[TILE], sizeof sums[0]);
        _tile_stored(3, sums[TILE] + TILE, sizeof sums[0]);
    }
    for (int r = 0; r < count; r++)
        write_panel(p, row + r, panel * PANEL, rows.scales[row + r], sums[r]);
}

// The panels of one thread.
void multiply_in_tiles(const Product &p, const Quantized<int8_t> &rows, const Share &share) {
    for_tile_blocks(p.rows, rows.stride, share, next_of(p, share),
                    [&](int64_t row, int count, int64_t panel, Ahead ahead) {
                        if (count > TILE) return tile_block<true>(p, rows, row, count, panel, ahead);
                        tile_block<false>(p, rows, row, count, panel, ahead);
                    });
}
#endif

// Quantizes x, and calls ``work`` in each thread with its share of the panels.
template <typename X, typename Work>
void share_panels(const Product &p, Work work) {
    const int64_t num_threads = threads_of(p, p.max_threads);
    const Quantized<X> x = room_for<X>(p);
    const bool is_shared = num_threads > 1 && p.rows * p.in >= SHARED_SIZE;
    if (!is_shared) quantize_rows(p, x, 0, p.rows);
#pragma omp parallel num_threads(num_threads)
    {
        if (is_shared) {
            // All wait for the last.
#pragma omp for schedule(static)
            for (int64_t thread = 0; thread < num_threads; thread++)
                quantize_rows(p, x, p.rows * thread / num_threads,
                              p.rows * (thread + 1) / num_threads);
        }
#pragma omp for schedule(static) nowait
        for (int64_t thread = 0; thread < num_threads; thread++)
            work(p, x, share_of(thread, num_threads, p.out));
    }
}

// --- packing ------------------------------------------------------------------------------------

// The first step of a row of the weight in a chunk; the next steps are TILE * STEP bytes apart.
inline int64_t place_of(int64_t in, int64_t n, int64_t chunk) {
    return (n / PANEL * chunks_of(in) + chunk) * CHUNK_BYTES + n % PANEL / TILE * TILE_BYTES +
           n % TILE * STEP;
}

template <typename Element>
void unpack_row(const int8_t *packed, float scale, int64_t n, int64_t in, Element *row) {
    for (int64_t chunk = 0; chunk < chunks_of(in); chunk++) {
        const int8_t *place = packed + place_of(in, n, chunk);
        const int64_t end = std::min<int64_t>(CHUNK, in - chunk * CHUNK);
        for (int64_t k = 0; k < end; k++)
            narrow(float(place[k / STEP * TILE * STEP + k % STEP]) * scale, row[chunk * CHUNK + k]);
    }
}

}  // namespace

extern "C" {

extern const int64_t tokasaurus_sizes[] = {sizeof(Arguments)};

// Bytes of a packed weight.
int64_t tokasaurus_packed_size(int64_t out, int64_t in) {
    return ceil_div(out, PANEL) * panel_bytes_of(in);
}

// Quantizes and packs the rows of a part of the weight, fp32 [rows, in], which begins at row
// ``first`` of the whole. Also writes the scales and sums of these rows.
void tokasaurus_pack(const float *part, int64_t rows, int64_t in, int64_t first, int8_t *packed,
                     float *scales, int32_t *sums) {
    const int64_t end = first + rows;
#pragma omp parallel for
    for (int64_t panel = first / PANEL; panel < ceil_div(end, PANEL); panel++) {
        std::vector<int8_t> row(chunks_of(in) * CHUNK);
        for (int64_t n = std::max(first, panel * PANEL); n < std::min(end, (panel + 1) * PANEL);
             n++) {
            scales[n] = quantize(part + (n - first) * in, in, row.data());
            sums[n] = 0;
            for (int8_t number : row) sums[n] += number;
            for (int64_t chunk = 0; chunk < chunks_of(in); chunk++) {
                int8_t *place = packed + place_of(in, n, chunk);
                for (int step = 0; step < TILE; step++)
                    std::memcpy(place + step * TILE * STEP,
                                row.data() + chunk * CHUNK + step * STEP, STEP);
            }
        }
    }
}

// Writes chosen rows of a packed weight to ``to``, [count, in].
void tokasaurus_unpack(const int8_t *packed, const float *scales, const int64_t *rows,
                       int64_t count, int64_t in, int32_t element, void *to) {
#pragma omp parallel for if (count > 8)
    for (int64_t i = 0; i < count; i++)
        if (element == 0)
            unpack_row(packed, scales[rows[i]], rows[i], in, static_cast<float *>(to) + i * in);
        else
            unpack_row(packed, scales[rows[i]], rows[i], in, static_cast<uint16_t *>(to) + i * in);
}

void tokasaurus_multiply(const Arguments *arguments, int64_t num_rows, int32_t num_threads) {
    const Product p{*arguments, num_rows, num_threads};
#if defined(__AMX_INT8__)
    if (may_use_tiles()) return share_panels<int8_t>(p, multiply_in_tiles);
#endif
    share_panels<Dot::X>(p, multiply);
}
}
