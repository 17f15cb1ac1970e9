// Vectors of fp32, of 16 lanes with AVX-512BW and else 8, and sums of products of integers. All work is lane by lane:
// only `sum` and `largest` mix lanes, in a fixed order.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512BW__)
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

// The fp32 numbers with these bits.
inline Floats as_floats(Words bits) {
    Floats x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// fp16 in the low 16 bits of each word as fp32; not infinite.
inline Floats of_halves(Words x) { return as_floats((x & 0x7fff) << 13 | (x & 0x8000) << 16) * 0x1p112f; }

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

// exp by 2^n * e^r with |r| <= ln(2) / 2, to 2 units in the last place; 0 below -87, and e^88 above 88.
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
    Floats power = as_floats((__builtin_convertvector(n, Words) + 127) << 23);
    return x < lowest ? Floats{} : p * power;
}

// Sums of 16 outputs, each of two more products of int16: acc[i] += w[2 i] x[0] + w[2 i + 1] x[1]. The weights are 32
// bytes, or for `widen_nibbles` 16: w[2 i] in the low four bits of byte i and w[2 i + 1] in the high four, without signs.
// `floats_of` gives LANES of the sums from `first` on.
#if defined(__AVX512BW__)
struct Sums { __m512i all; };
struct Weights { __m512i all; };
struct Pair { __m512i all; };
inline Sums all_of(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Weights widen(const int8_t* w) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w))}; }
inline Weights widen_nibbles(const int8_t* w) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)w));
    bytes = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));  // move the high four bits to the upper int16
    return {_mm512_and_si512(bytes, _mm512_set1_epi32(0x000f000f))};
}
inline Pair broadcast(const int16_t* x) { int32_t both; memcpy(&both, x, 4); return {_mm512_set1_epi32(both)}; }
inline void add_products(Sums& acc, const Weights& w, const Pair& x) {
#if defined(__AVX512VNNI__)
    acc.all = _mm512_dpwssd_epi32(acc.all, w.all, x.all);
#else
    acc.all = _mm512_add_epi32(acc.all, _mm512_madd_epi16(w.all, x.all));
#endif
}
inline Floats floats_of(const Sums& acc, int) { return (Floats)_mm512_cvtepi32_ps(acc.all); }
constexpr int MAX_ROWS = 8;  // of x that share a load of weights
#elif defined(__AVX2__)
struct Sums { __m256i low, high; };
struct Weights { __m256i low, high; };
struct Pair { __m256i all; };
inline Sums all_of(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Weights widen(const int8_t* w) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w)),
            _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16)))};
}
inline Weights widen_nibbles(const int8_t* w) {
    __m128i bytes = _mm_loadu_si128((const __m128i*)w), fifteen = _mm_set1_epi8(15);
    __m128i low = _mm_and_si128(bytes, fifteen), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), fifteen);
    return {_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(low, high)), _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(low, high))};
}
inline Pair broadcast(const int16_t* x) { int32_t both; memcpy(&both, x, 4); return {_mm256_set1_epi32(both)}; }
inline void add_products(Sums& acc, const Weights& w, const Pair& x) {
    acc.low = _mm256_add_epi32(acc.low, _mm256_madd_epi16(w.low, x.all));
    acc.high = _mm256_add_epi32(acc.high, _mm256_madd_epi16(w.high, x.all));
}
inline Floats floats_of(const Sums& acc, int first) { return (Floats)_mm256_cvtepi32_ps(first ? acc.high : acc.low); }
constexpr int MAX_ROWS = 4;
#else
struct Sums { int32_t lane[16]; };
struct Weights { int16_t lane[32]; };
struct Pair { int16_t low, high; };
inline Sums all_of(int32_t x) {
    Sums out;
    for (int i = 0; i < 16; i++) out.lane[i] = x;
    return out;
}
inline Weights widen(const int8_t* w) {
    Weights out;
    for (int i = 0; i < 32; i++) out.lane[i] = w[i];
    return out;
}
inline Weights widen_nibbles(const int8_t* w) {
    Weights out;
    for (int i = 0; i < 32; i++) out.lane[i] = i % 2 ? (uint8_t)w[i / 2] >> 4 : w[i / 2] & 15;
    return out;
}
inline Pair broadcast(const int16_t* x) { return {x[0], x[1]}; }
inline void add_products(Sums& acc, const Weights& w, const Pair& x) {
    for (int i = 0; i < 16; i++) acc.lane[i] += w.lane[2 * i] * x.low + w.lane[2 * i + 1] * x.high;
}
inline Floats floats_of(const Sums& acc, int first) {
    Floats out;
    for (int i = 0; i < LANES; i++) out[i] = (float)acc.lane[first + i];
    return out;
}
constexpr int MAX_ROWS = 4;
#endif
