// Vectors of 32-bit numbers, and the kinds of elements that tensors consist of.
//
// The vectors are those of GCC and Clang; the compiler maps them to the processor's own. Where it
// lacks an instruction, an intrinsic stands under the macro of its instruction set.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Integers __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t HalfWords __attribute__((vector_size(WIDTH * 2)));

constexpr float INFINITE = std::numeric_limits<float>::infinity();

template <typename To, typename From>
inline To bits_as(const From &from) {
    static_assert(sizeof(To) == sizeof(From), "bits of another number");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline Vector splat(float value) { return bits_as<Vector>(Words{} + bits_as<uint32_t>(value)); }

inline Words splat(uint32_t value) { return Words{} + value; }

// --- reading: every element is exact in fp32 -----------------------------------------------------

inline Words load_words(const void *from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    return words;
}

inline Words load_half_words(const void *from) {
#if defined(__AVX512F__)
    return bits_as<Words>(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)));
#elif defined(__AVX2__)
    return bits_as<Words>(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)));
#else
    HalfWords halves;
    std::memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, Words);
#endif
}

// The lower halves of words, which are not negative numbers.
inline HalfWords lower_halves(Words words) {
#if defined(__AVX512F__)
    return bits_as<HalfWords>(_mm512_cvtepi32_epi16(bits_as<__m512i>(words)));
#elif defined(__AVX2__)
    const __m256i all = bits_as<__m256i>(words);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(all, all), 0x08);
    return bits_as<HalfWords>(_mm256_castsi256_si128(packed));
#else
    return __builtin_convertvector(words, HalfWords);
#endif
}

inline Vector load(const float *from) { return bits_as<Vector>(load_words(from)); }

inline Vector load(const BFloat16 *from) { return bits_as<Vector>(load_half_words(from) << 16); }

inline Vector load(const Float16 *from) {
#if defined(__AVX512F__)
    return bits_as<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)));
#elif defined(__F16C__)
    return bits_as<Vector>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)));
#else
    // The exponent and fraction move to fp32's place. The product corrects the exponent's bias, for
    // denormal numbers too. Infinity and NaN get fp32's exponent.
    const Words half = load_half_words(from);
    const Words magnitude = half & 0x7fffu;
    const Words finite = bits_as<Words>(bits_as<Vector>(magnitude << 13) * 0x1p112f);
    const Words other = (magnitude << 13) | 0x7f800000u;
    const Words is_finite = bits_as<Words>(magnitude < 0x7c00u);
    return bits_as<Vector>((finite & is_finite) | (other & ~is_finite) | ((half & 0x8000u) << 16));
#endif
}

// The first `count` elements, then zeros.
template <typename Element>
inline Vector load(const Element *from, int count) {
    if (count >= WIDTH) return load(from);
    Element some[WIDTH] = {};
    std::memcpy(some, from, size_t(count) * sizeof(Element));
    return load(some);
}

// --- writing: rounds to the nearest element, ties to even ----------------------------------------

inline void store(float *to, Vector vector) { std::memcpy(to, &vector, sizeof vector); }

inline void store_words(void *to, Words words) { std::memcpy(to, &words, sizeof words); }

inline HalfWords bfloat16_bits(Vector vector) {
#if defined(__AVX512BF16__)
    return bits_as<HalfWords>(_mm512_cvtneps_pbh(bits_as<__m512>(vector)));
#else
    const Words bits = bits_as<Words>(vector);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words is_number = bits_as<Words>(vector == vector);
    return lower_halves((rounded & is_number) | (0x7fc0u & ~is_number));
#endif
}

inline void store(BFloat16 *to, Vector vector) {
    const HalfWords halves = bfloat16_bits(vector);
    std::memcpy(to, &halves, sizeof halves);
}

#if !defined(__F16C__)
inline uint16_t float16_bits(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
    if (magnitude < 0x38800000u) {
        // A denormal number: the sum rounds at the place of its last bit.
        const float sum = bits_as<float>(magnitude) + 0.5f;
        return uint16_t(sign | (bits_as<uint32_t>(sum) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
    return uint16_t(sign | (rounded >> 13));
}
#endif

inline void store(Float16 *to, Vector vector) {
#if defined(__AVX512F__)
    const __m256i halves = _mm512_cvtps_ph(bits_as<__m512>(vector), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256((__m256i *)to, halves);
#elif defined(__F16C__)
    const __m128i halves = _mm256_cvtps_ph(bits_as<__m256>(vector), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128((__m128i *)to, halves);
#else
    for (int i = 0; i < WIDTH; i++) to[i].bits = float16_bits(vector[i]);
#endif
}

// The first `count` elements.
template <typename Element>
inline void store(Element *to, Vector vector, int count) {
    if (count >= WIDTH) return store(to, vector);
    Element some[WIDTH];
    store(some, vector);
    std::memcpy(to, some, size_t(count) * sizeof(Element));
}

// Rounded to the precision of an element.
template <typename Element>
inline Vector rounded(Vector vector) {
    if constexpr (sizeof(Element) == sizeof(float)) return vector;
    Element elements[WIDTH];
    store(elements, vector);
    return load(elements);
}

template <>
inline Vector rounded<BFloat16>(Vector vector) {
    const HalfWords bits = bfloat16_bits(vector);
    return bits_as<Vector>(load_half_words(&bits) << 16);
}

// --- arithmetic ----------------------------------------------------------------------------------

// a * b + c, rounded once where the processor can. The compiler must not choose by itself: it may
// fuse an expression in one loop and not in another, and the results would differ.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return bits_as<Vector>(
        _mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
#elif defined(__FMA__)
    return bits_as<Vector>(
        _mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
#elif defined(__FP_FAST_FMAF)
    for (int i = 0; i < WIDTH; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

inline Vector multiply_add(Vector a, float b, Vector c) { return multiply_add(a, splat(b), c); }

inline Vector multiply_add(Vector a, Vector b, float c) { return multiply_add(a, b, splat(c)); }

inline Vector multiply_add(Vector a, float b, float c) {
    return multiply_add(a, splat(b), splat(c));
}

// b where a number is compared with something that is not one.
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
    return bits_as<Vector>(_mm512_max_ps(bits_as<__m512>(a), bits_as<__m512>(b)));
#elif defined(__AVX2__)
    return bits_as<Vector>(_mm256_max_ps(bits_as<__m256>(a), bits_as<__m256>(b)));
#else
    return a > b ? a : b;
#endif
}

// Adds the lanes, or finds the largest: half of the lanes with the other half, again and again.
template <int LANES>
struct Lanes {
    typedef float Type __attribute__((vector_size(LANES * 4)));

    template <typename Combine>
    static float reduce(Type vector, const Combine &combine) {
        typename Lanes<LANES / 2>::Type halves[2];
        std::memcpy(halves, &vector, sizeof vector);
        return Lanes<LANES / 2>::reduce(combine(halves[0], halves[1]), combine);
    }
};

template <>
struct Lanes<2> {
    typedef float Type __attribute__((vector_size(8)));

    template <typename Combine>
    static float reduce(Type vector, const Combine &combine) {
        return combine(vector[0], vector[1]);
    }
};

inline float total(Vector vector) {
    return Lanes<WIDTH>::reduce(vector, [](auto a, auto b) { return a + b; });
}

inline float largest(Vector vector) {
    return Lanes<WIDTH>::reduce(vector, [](auto a, auto b) { return a > b ? a : b; });
}

inline Integers lane_numbers() {
    Integers numbers;
    for (int i = 0; i < WIDTH; i++) numbers[i] = i;
    return numbers;
}

// 1 / x within 2 units of the last place, for x from 1 to infinity exclusive; 0 above 2^126.
inline Vector reciprocal(Vector x) {
#if defined(__AVX512F__)
    // An estimate of 14 bits, and a step of Newton's method. It takes a third of a division.
    const Vector estimate = bits_as<Vector>(_mm512_rcp14_ps(bits_as<__m512>(x)));
    return estimate * multiply_add(-x, estimate, 2.0f);
#else
    return 1.0f / x;
#endif
}

// e^x within 2 units of the last place, for x up to 88; 0 below -87.
inline Vector bounded_exponential(Vector x) {
    // The addition rounds.
    const Vector shifted = multiply_add(x, 1.44269504088896341f, 0x1.8p23f);
    const Vector n = shifted - 0x1.8p23f;
    Vector r = multiply_add(n, -0x1.62e4p-1f, x);
    r = multiply_add(n, -0x1.7f7d1cp-20f, r);
    Vector p = multiply_add(r, 1.0f / 720, 1.0f / 120);
    p = multiply_add(p, r, 1.0f / 24);
    p = multiply_add(p, r, 1.0f / 6);
    p = multiply_add(p, r, 0.5f);
    p = multiply_add(p, r, 1.0f);
    p = multiply_add(p, r, 1.0f);
    // The low bits of `shifted` are n.
    const Vector result = p * bits_as<Vector>((bits_as<Words>(shifted) + 127u) << 23);
    return x < -87.0f ? Vector{} : result;
}

// The same for every x: e^88 above 88.
inline Vector exponential(Vector x) { return bounded_exponential(x > 88.0f ? splat(88.0f) : x); }

// Turns rows into columns: log2(WIDTH) rounds of interleaving rows i and i + WIDTH / 2.
#if defined(__clang__) || __GNUC__ >= 12
#define TOKASAURUS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TOKASAURUS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

inline void interleave(Words a, Words b, Words &low, Words &high) {
#if defined(__AVX512F__)
    low = TOKASAURUS_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = TOKASAURUS_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
    low = TOKASAURUS_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = TOKASAURUS_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
}

// The sums of WIDTH vectors, one in each lane. `vectors` is overwritten.
inline Vector totals(Vector (&vectors)[WIDTH]) {
    // Interleaving i and i + half puts equal lanes side by side, as in a transposition, and the sum
    // of both results halves the number of vectors.
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) {
            Words low, high;
            interleave(bits_as<Words>(vectors[i]), bits_as<Words>(vectors[i + half]), low, high);
            vectors[i] = bits_as<Vector>(low) + bits_as<Vector>(high);
        }
    return vectors[0];
}

#if defined(__AVX512BW__)
// Pairs of halves: the first half of a with the first half of b, and so on.
inline void interleave_halves(Words a, Words b, Words &low, Words &high) {
    const __m512i first = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
        35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    low = bits_as<Words>(
        _mm512_permutex2var_epi16(bits_as<__m512i>(a), first, bits_as<__m512i>(b)));
    high = bits_as<Words>(
        _mm512_permutex2var_epi16(bits_as<__m512i>(a), second, bits_as<__m512i>(b)));
}
#endif

inline void transpose(Words (&rows)[WIDTH]) {
    for (int round = 1; round < WIDTH; round *= 2) {
        Words next[WIDTH];
        for (int i = 0; i < WIDTH / 2; i++)
            interleave(rows[i], rows[i + WIDTH / 2], next[2 * i], next[2 * i + 1]);
        for (int i = 0; i < WIDTH; i++) rows[i] = next[i];
    }
}

}  // namespace
