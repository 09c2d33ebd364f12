// The element-wise work between the products of a layer; reference_operators.py defines it.
//
// Sums are in fp32. Intermediate results are rounded where the definition rounds them.

#include <algorithm>

#include "vectors.h"

namespace {

// Calls a function for all rows, by several threads if there is work for them.
template <typename Function>
void for_rows(int64_t num_rows, int num_threads, const Function &function) {
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
        squares += some * some;
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

template <typename Element>
void rms_norm(const void *x, int64_t stride, const void *weight, float eps, void *output,
              int64_t num_rows, int size, int num_threads) {
    for_rows(num_rows, num_threads, [=](int64_t row) {
        norm_row(static_cast<const Element *>(x) + row * stride,
                 static_cast<const Element *>(weight), eps, size,
                 static_cast<Element *>(output) + row * size);
    });
}

template <typename Element>
void add_rms_norm(void *stream, const void *added, int64_t stride, const void *weight, float eps,
                  void *output, int64_t num_rows, int size, int num_threads) {
    for_rows(num_rows, num_threads, [=](int64_t row) {
        Element *sum = static_cast<Element *>(stream) + row * size;
        add_row(sum, static_cast<const Element *>(added) + row * stride, size);
        norm_row<Element>(sum, static_cast<const Element *>(weight), eps, size,
                          static_cast<Element *>(output) + row * size);
    });
}

template <typename Element>
void silu_multiply(const void *gate_up, int64_t stride, void *output, int64_t num_rows, int size,
                   int num_threads) {
    for_rows(num_rows, num_threads, [=](int64_t row) {
        const Element *gate = static_cast<const Element *>(gate_up) + row * stride;
        silu_multiply_row(gate, gate + size, size, static_cast<Element *>(output) + row * size);
    });
}

}  // namespace

// Called by operators.py. Elements are 0 fp32, 1 bf16, 2 fp16. Strides are in elements.
#define TOKASAURUS_BY_ELEMENT(function, ...)               \
    switch (element) {                                     \
        case 0: return function<float>(__VA_ARGS__);       \
        case 1: return function<BFloat16>(__VA_ARGS__);    \
        default: return function<Float16>(__VA_ARGS__);    \
    }

extern "C" {

void tokasaurus_rms_norm(int element, const void *x, int64_t stride, const void *weight, float eps,
                         void *output, int64_t num_rows, int size, int num_threads) {
    TOKASAURUS_BY_ELEMENT(rms_norm, x, stride, weight, eps, output, num_rows, size, num_threads)
}

void tokasaurus_add_rms_norm(int element, void *stream, const void *added, int64_t stride,
                             const void *weight, float eps, void *output, int64_t num_rows,
                             int size, int num_threads) {
    TOKASAURUS_BY_ELEMENT(add_rms_norm, stream, added, stride, weight, eps, output, num_rows, size,
                          num_threads)
}

void tokasaurus_silu_multiply(int element, const void *gate_up, int64_t stride, void *output,
                              int64_t num_rows, int size, int num_threads) {
    TOKASAURUS_BY_ELEMENT(silu_multiply, gate_up, stride, output, num_rows, size, num_threads)
}
}
