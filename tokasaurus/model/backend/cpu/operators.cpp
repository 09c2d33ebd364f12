// The element-wise work between the products of a layer; reference_operators.py defines it.
//
// Sums are in fp32. Intermediate results are rounded where the definition rounds them.

#include <algorithm>

#include "vectors.h"

namespace {

// Elements of a result that justify another thread: to start it takes as long as one thread needs
// for this many.
constexpr int64_t ELEMENTS_PER_THREAD = 32768;

// What an element of silu takes, in elements of a norm.
constexpr int64_t SILU_COST = 4;

// Calls a function for all rows, by several threads if there is work for them.
template <typename Function>
void for_rows(int64_t num_rows, int64_t elements_per_row, int64_t max_threads,
              const Function &function) {
    const int num_threads =
        int(std::min(max_threads, num_rows * elements_per_row / ELEMENTS_PER_THREAD));
    if (num_threads <= 1) {
        for (int64_t row = 0; row < num_rows; row++) function(row);
        return;
    }
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t row = 0; row < num_rows; row++) function(row);
}

template <typename Element>
void norm_row(const Element *x, const Element *weight, float eps, int size, Element *output) {
    Vector squares = {};
    for (int i = 0; i < size; i += WIDTH) {
        const Vector some = load(x + i, size - i);
        squares = multiply_add(some, some, squares);
    }
    const float scale = 1.0f / std::sqrt(total(squares) / float(size) + eps);
    for (int i = 0; i < size; i += WIDTH) {
        const Vector quotient = rounded<Element>(load(x + i, size - i) * scale);
        store(output + i, quotient * load(weight + i, size - i), size - i);
    }
}

template <typename Element>
void add_row(Element *stream, const Element *added, int size) {
    for (int i = 0; i < size; i += WIDTH)
        store(stream + i, load(stream + i, size - i) + load(added + i, size - i), size - i);
}

template <typename Element>
void silu_multiply_row(const Element *gate, const Element *up, int size, Element *output) {
    for (int i = 0; i < size; i += WIDTH) {
        const Vector x = load(gate + i, size - i);
        const Vector gated = rounded<Element>(x * reciprocal(1.0f + exponential(-x)));
        store(output + i, gated * load(up + i, size - i), size - i);
    }
}

}  // namespace

extern "C" {

// Mirrored in operators.py. Strides are in elements; elements are 0 fp32, 1 bf16, 2 fp16.
struct Norm {
    const void *x;  // [rows, size], rows stride apart
    int64_t stride;
    const void *weight;  // [size]
    void *output;        // [rows, size]
    float eps;
    int32_t size, element;
};

struct AddNorm {
    void *stream;       // [rows, size]
    const void *added;  // [rows, size], rows stride apart
    int64_t stride;
    const void *weight;  // [size]
    void *output;        // [rows, size]
    float eps;
    int32_t size, element;
};

struct SiluMultiply {
    const void *gate_up;  // [rows, 2 * size], rows stride apart
    int64_t stride;
    void *output;  // [rows, size]
    int32_t size, element;
};
}

namespace {

template <typename Element>
void run(const Norm &a, int64_t num_rows, int num_threads) {
    for_rows(num_rows, a.size, num_threads, [&](int64_t row) {
        norm_row(static_cast<const Element *>(a.x) + row * a.stride,
                 static_cast<const Element *>(a.weight), a.eps, a.size,
                 static_cast<Element *>(a.output) + row * a.size);
    });
}

template <typename Element>
void run(const AddNorm &a, int64_t num_rows, int num_threads) {
    for_rows(num_rows, a.size, num_threads, [&](int64_t row) {
        Element *sum = static_cast<Element *>(a.stream) + row * a.size;
        add_row(sum, static_cast<const Element *>(a.added) + row * a.stride, a.size);
        norm_row<Element>(sum, static_cast<const Element *>(a.weight), a.eps, a.size,
                          static_cast<Element *>(a.output) + row * a.size);
    });
}

template <typename Element>
void run(const SiluMultiply &a, int64_t num_rows, int num_threads) {
    for_rows(num_rows, SILU_COST * a.size, num_threads, [&](int64_t row) {
        const Element *gate = static_cast<const Element *>(a.gate_up) + row * a.stride;
        silu_multiply_row(gate, gate + a.size, a.size,
                          static_cast<Element *>(a.output) + row * a.size);
    });
}

template <typename Arguments>
void run_kernel(const Arguments *arguments, int64_t num_rows, int num_threads) {
    switch (arguments->element) {
        case 0: return run<float>(*arguments, num_rows, num_threads);
        case 1: return run<BFloat16>(*arguments, num_rows, num_threads);
        default: return run<Float16>(*arguments, num_rows, num_threads);
    }
}

}  // namespace

extern "C" {

extern const int64_t tokasaurus_sizes[] = {sizeof(Norm), sizeof(AddNorm), sizeof(SiluMultiply)};

void tokasaurus_rms_norm(const Norm *arguments, int64_t num_rows, int32_t num_threads) {
    run_kernel(arguments, num_rows, num_threads);
}

void tokasaurus_add_rms_norm(const AddNorm *arguments, int64_t num_rows, int32_t num_threads) {
    run_kernel(arguments, num_rows, num_threads);
}

void tokasaurus_silu_multiply(const SiluMultiply *arguments, int64_t num_rows,
                              int32_t num_threads) {
    run_kernel(arguments, num_rows, num_threads);
}
}
