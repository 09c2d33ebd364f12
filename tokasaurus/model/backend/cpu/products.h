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

namespace {

struct Wide {
    static Vector add_product(Vector sum, Words a, Words b) {
        return sum + bits_as<Vector>(a) * bits_as<Vector>(b);
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

}  // namespace
