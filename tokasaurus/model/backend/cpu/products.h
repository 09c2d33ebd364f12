// Small products of matrices of 32-bit words, C = C * shrink + A * B, in vector registers.
//
// A word is a number in fp32 (Wide) or a pair of consecutive numbers in bf16 (Pairs), for which a
// processor may have an instruction. Sums are in fp32.
//
//         depth               columns
//      ┌─────────┐        ┌───────────────┐
//  row │ A       │  depth │ B             │    B's rows are contiguous: a vector is WIDTH columns
//      └─────────┘        └───────────────┘

#pragma once

#include "vectors.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct Wide {
    static Vector add_product(Vector sum, Words a, Words b) {
        return multiply_add(bits_as<Vector>(a), bits_as<Vector>(b), sum);
    }
};

#if defined(__AVX512BF16__)
struct Pairs {
    static Vector add_product(Vector sum, Words a, Words b) {
        return bits_as<Vector>(
            _mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(a), bits_as<__m512bh>(b)));
    }
};
#endif

// Rows and vectors of C that are kept in registers, of which AVX2 has 16 and AVX-512 has 32.
constexpr int BLOCK_ROWS = 6;
#if defined(__AVX512F__)
constexpr int BLOCK_VECTORS = 4;
#else
constexpr int BLOCK_VECTORS = 2;
#endif

struct Product {
    const uint32_t *a;  // [rows, a_stride]
    int a_stride;
    const uint32_t *b;  // [depth, b_stride]
    int b_stride;
    float *c;  // [rows, c_stride]
    int c_stride;
    const float *shrink;  // [rows]; null to overwrite C
    int depth;
};

template <typename Kind, int ROWS, int VECTORS>
inline void multiply_block(const Product &p, int row, int column) {
    Vector sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++) {
        const float *c = p.c + int64_t(row + r) * p.c_stride + column;
        for (int v = 0; v < VECTORS; v++)
            sums[r][v] = p.shrink ? load(c + v * WIDTH) * p.shrink[row + r] : Vector{};
    }
    const uint32_t *a = p.a + int64_t(row) * p.a_stride, *b = p.b + column;
    for (int k = 0; k < p.depth; k++) {
        Words right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = load_words(b + v * WIDTH);
        for (int r = 0; r < ROWS; r++) {
            const Words left = splat(a[r * p.a_stride]);
            for (int v = 0; v < VECTORS; v++)
                sums[r][v] = Kind::add_product(sums[r][v], left, right[v]);
        }
        a++;
        b += p.b_stride;
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            store(p.c + int64_t(row + r) * p.c_stride + column + v * WIDTH, sums[r][v]);
}

template <typename Kind, int VECTORS>
inline void multiply_panel(const Product &p, int num_rows, int column) {
    int row = 0;
    for (; row + BLOCK_ROWS <= num_rows; row += BLOCK_ROWS)
        multiply_block<Kind, BLOCK_ROWS, VECTORS>(p, row, column);
    switch (num_rows - row) {
        case 1: return multiply_block<Kind, 1, VECTORS>(p, row, column);
        case 2: return multiply_block<Kind, 2, VECTORS>(p, row, column);
        case 3: return multiply_block<Kind, 3, VECTORS>(p, row, column);
        case 4: return multiply_block<Kind, 4, VECTORS>(p, row, column);
        case 5: return multiply_block<Kind, 5, VECTORS>(p, row, column);
    }
}

// The number of columns is a multiple of WIDTH.
template <typename Kind>
inline void multiply(const Product &p, int num_rows, int num_columns) {
    int column = 0;
    for (; column + BLOCK_VECTORS * WIDTH <= num_columns; column += BLOCK_VECTORS * WIDTH)
        multiply_panel<Kind, BLOCK_VECTORS>(p, num_rows, column);
    for (; column < num_columns; column += WIDTH) multiply_panel<Kind, 1>(p, num_rows, column);
}

// --- tiles of AMX --------------------------------------------------------------------------------

// Rows of a tile; it has as many words. More than these rows of A and C need room for a multiple.
constexpr int TILE_ROWS = 16;

#if defined(__AMX_BF16__)

// Linux lends the tiles to a process that asks for them.
inline bool may_use_tiles() {
    constexpr int request_permission = 0x1023, tile_data = 18;
    static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return granted;
}

// The compiler does not know what memory the instructions of tiles read: everything that was written
// before this is there.
inline void finish_writes() { asm volatile("" ::: "memory"); }

// Configures the tiles, as long as it lives: 0, 1 and 4 have this number of rows, the others have
// TILE_ROWS. All have that many words in a row.
class Tiles {
   public:
    explicit Tiles(int num_rows) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; tile++) {
            config.row_bytes[tile] = 64;
            config.rows[tile] = TILE_ROWS;
        }
        for (int tile : {0, 1, 4}) config.rows[tile] = uint8_t(num_rows);
        finish_writes();
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

// C = C + A * B, or C = A * B, for one or two tiles of rows and of columns.
template <int ROWS, int COLUMNS>
inline void multiply_in_tiles(const Product &p, int row, int column) {
    float *c = p.c + int64_t(row) * p.c_stride + column;
    float *lower_c = c + int64_t(TILE_ROWS) * p.c_stride;
    const size_t a_bytes = size_t(p.a_stride) * 4, b_bytes = size_t(p.b_stride) * 4;
    const size_t c_bytes = size_t(p.c_stride) * 4;
    if (p.shrink) {
        _tile_loadd(0, c, c_bytes);
        if constexpr (COLUMNS == 2) _tile_loadd(1, c + TILE_ROWS, c_bytes);
        if constexpr (ROWS == 2) _tile_loadd(2, lower_c, c_bytes);
        if constexpr (ROWS == 2 && COLUMNS == 2) _tile_loadd(3, lower_c + TILE_ROWS, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < p.depth; k += TILE_ROWS) {
        const uint32_t *a = p.a + int64_t(row) * p.a_stride + k;
        const uint32_t *b = p.b + int64_t(k) * p.b_stride + column;
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(6, b, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (COLUMNS == 2) {
            _tile_loadd(7, b + TILE_ROWS, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (ROWS == 2) {
            _tile_loadd(5, a + int64_t(TILE_ROWS) * p.a_stride, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (COLUMNS == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (COLUMNS == 2) _tile_stored(1, c + TILE_ROWS, c_bytes);
    if constexpr (ROWS == 2) _tile_stored(2, lower_c, c_bytes);
    if constexpr (ROWS == 2 && COLUMNS == 2) _tile_stored(3, lower_c + TILE_ROWS, c_bytes);
}

// As `multiply`, for pairs, while there are Tiles: of num_rows rows, if these are fewer than
// TILE_ROWS. The depth is a multiple of TILE_ROWS. Sums have another order than those of `multiply`.
inline void multiply_tiles(const Product &p, int num_rows, int num_columns) {
    if (p.shrink)
        for (int row = 0; row < num_rows; row++)
            for (int column = 0; column < num_columns; column += WIDTH) {
                float *c = p.c + int64_t(row) * p.c_stride + column;
                store(c, load(c) * p.shrink[row]);
            }
    finish_writes();
    for (int row = 0; row < num_rows; row += 2 * TILE_ROWS)
        for (int column = 0; column < num_columns; column += 2 * TILE_ROWS) {
            const bool two_rows = row + TILE_ROWS < num_rows;
            const bool two_columns = column + TILE_ROWS < num_columns;
            if (two_rows && two_columns)
                multiply_in_tiles<2, 2>(p, row, column);
            else if (two_rows)
                multiply_in_tiles<2, 1>(p, row, column);
            else if (two_columns)
                multiply_in_tiles<1, 2>(p, row, column);
            else
                multiply_in_tiles<1, 1>(p, row, column);
        }
}

#endif

}  // namespace
