// Vectors of fp32, as many lanes as this CPU has, and sums of products of integers. They work lane by lane: nothing
// here mixes lanes but `sum` and `largest`, of which the order is fixed.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;  // of fp32
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline Floats load(const float* p) { return *(const Floats*)p; }
inline void store(float* p, Floats x) { *(Floats*)p = x; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats rounded(Floats x) { return (x + 12582912.f) - 12582912.f; }  // 1.5 * 2^23: to nearest, for |x| < 2^22

inline float sum(Floats x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

inline float largest(Floats x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}

// exp by 2^n * e^r with |r| <= ln(2) / 2, to 2 units in the last place; 0 below -87.
inline Floats exponential(Floats x) {
    Floats lowest = Floats{} - 87.f, highest = Floats{} + 88.f;
    Floats clamped = larger(x, lowest);
    clamped = clamped < highest ? clamped : highest;
    Floats n = rounded(clamped * 1.44269504f);
    Floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts
    Floats p = 1.f / 720 + r * (1.f / 5040);
    p = 1.f / 120 + r * p;
    p = 1.f / 24 + r * p;
    p = 1.f / 6 + r * p;
    p = 0.5f + r * p;
    p = 1 + r * (1 + r * p);
    Words exponent = (__builtin_convertvector(n, Words) + 127) << 23;
    Floats power;
    memcpy(&power, &exponent, sizeof power);
    return x < lowest ? Floats{} : p * power;
}

// Sums of 16 outputs, each of two more products of int16: acc[i] += w[2 i] x[0] + w[2 i + 1] x[1].
#if defined(__AVX512BW__)
struct Sums { __m512i all; };
struct Weights { __m512i all; };
struct Pair { __m512i all; };
inline Sums zero() { return {_mm512_setzero_si512()}; }
inline Weights widen(const int8_t* w) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w))}; }
inline Pair broadcast(const int16_t* x) { int32_t both; memcpy(&both, x, 4); return {_mm512_set1_epi32(both)}; }
inline void add_products(Sums& acc, const Weights& w, const Pair& x) {
#if defined(__AVX512VNNI__)
    acc.all = _mm512_dpwssd_epi32(acc.all, w.all, x.all);
#else
    acc.all = _mm512_add_epi32(acc.all, _mm512_madd_epi16(w.all, x.all));
#endif
}
inline void to_floats(const Sums& acc, float* out) { _mm512_storeu_ps(out, _mm512_cvtepi32_ps(acc.all)); }
constexpr int MOST_ROWS = 8;  // of x that share a load of weights
#elif defined(__AVX2__)
struct Sums { __m256i low, high; };
struct Weights { __m256i low, high; };
struct Pair { __m256i all; };
inline Sums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Weights widen(const int8_t* w) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w)),
            _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16)))};
}
inline Pair broadcast(const int16_t* x) { int32_t both; memcpy(&both, x, 4); return {_mm256_set1_epi32(both)}; }
inline void add_products(Sums& acc, const Weights& w, const Pair& x) {
    acc.low = _mm256_add_epi32(acc.low, _mm256_madd_epi16(w.low, x.all));
    acc.high = _mm256_add_epi32(acc.high, _mm256_madd_epi16(w.high, x.all));
}
inline void to_floats(const Sums& acc, float* out) {
    _mm256_storeu_ps(out, _mm256_cvtepi32_ps(acc.low));
    _mm256_storeu_ps(out + 8, _mm256_cvtepi32_ps(acc.high));
}
constexpr int MOST_ROWS = 4;
#else
struct Sums { int32_t lane[16]; };
struct Weights { int16_t lane[32]; };
struct Pair { int16_t low, high; };
inline Sums zero() { return {}; }
inline Weights widen(const int8_t* w) {
    Weights out;
    for (int i = 0; i < 32; i++) out.lane[i] = w[i];
    return out;
}
inline Pair broadcast(const int16_t* x) { return {x[0], x[1]}; }
inline void add_products(Sums& acc, const Weights& w, const Pair& x) {
    for (int i = 0; i < 16; i++) acc.lane[i] += w.lane[2 * i] * x.low + w.lane[2 * i + 1] * x.high;
}
inline void to_floats(const Sums& acc, float* out) {
    for (int i = 0; i < 16; i++) out[i] = (float)acc.lane[i];
}
constexpr int MOST_ROWS = 4;
#endif
