// Vectors of one instruction set: load and store of the three activation types as fp32, and SiLU; written once for all widths.
#pragma once

#include "cpu/cpu.h"

LTXK_CPU_BEGIN

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = std::int32_t __attribute__((vector_size(4 * kLanes)));
using UWords = std::uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = std::uint16_t __attribute__((vector_size(2 * kLanes)));

inline Floats broadcast(float v) { return v - Floats{}; }

template <class V, class P>
inline V load_raw(const P* address) {
    V v;
    __builtin_memcpy(&v, address, sizeof(v));
    return v;
}

inline Floats load_lanes(const float* address) { return load_raw<Floats>(address); }
inline Floats load_lanes(const bf16* address) {
#if defined(__AVX512F__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_raw<__m256i>(address)), 16);
#elif defined(__AVX2__)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_raw<__m128i>(address)), 16);
#else
    return (Floats)(__builtin_convertvector(load_raw<Halves>(address), UWords) << 16);
#endif
}
inline Floats load_lanes(const f16* address) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)load_raw<Halves>(address));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps((__m128i)load_raw<Halves>(address));
#else
    Floats v;
    for (int i = 0; i < kLanes; ++i) v[i] = to_float(address[i]);
    return v;
#endif
}

inline void store_lanes(float* address, Floats v) { __builtin_memcpy(address, &v, sizeof(v)); }
// Nearest even by integer arithmetic; NaN becomes the quiet one.
inline void store_lanes(bf16* address, Floats v) {
    UWords bits = (UWords)v;
    UWords rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#if defined(__AVX512F__)
    __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    __m256i packed = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32((__m512i)rounded, nan, _mm512_set1_epi32(0x7fc0)));
#elif defined(__AVX2__)
    __m256 nan = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
    __m256i result = _mm256_blendv_epi8((__m256i)rounded, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
    __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
#else
    UWords nan = (UWords)((Words)(bits & 0x7fffffffu) > 0x7f800000);
    Halves packed = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Halves);
#endif
    __builtin_memcpy(address, &packed, sizeof(packed));
}
inline void store_lanes(f16* address, Floats v) {
#if defined(__AVX512F__)
    Halves packed = (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(address, &packed, sizeof(packed));
#elif defined(__F16C__)
    Halves packed = (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(address, &packed, sizeof(packed));
#else
    for (int i = 0; i < kLanes; ++i) from_float(v[i], address[i]);
#endif
}

// 1 / d for 1 <= d, inf included. A 512-bit division costs more than an estimate and a Newton step; a narrower one does not.
inline Floats reciprocal(Floats d) {
#if defined(__AVX512F__)
    Floats r = (Floats)_mm512_rcp14_ps((__m512)d);
    Floats refined = r + r * (1.0f - d * r);
    // The step makes NaN of 0 * inf; the estimate of 1 / inf is exact.
    return (Floats)_mm512_mask_mov_ps((__m512)refined, _mm512_cmp_ps_mask((__m512)r, _mm512_setzero_ps(), _CMP_EQ_OQ), (__m512)r);
#else
    return 1.0f / d;
#endif
}

// v within [low, high]; NaN stays NaN, as the hardware's min and max return their second operand for it.
inline Floats clamp_lanes(Floats v, float low, float high) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps(_mm512_set1_ps(low), _mm512_min_ps(_mm512_set1_ps(high), (__m512)v));
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps(_mm256_set1_ps(low), _mm256_min_ps(_mm256_set1_ps(high), (__m256)v));
#else
    v = v > high ? broadcast(high) : v;
    return v < low ? broadcast(low) : v;
#endif
}

// exp(v) for -87 <= v <= 88, smaller ones as -87, inf from about 88.4 on; relative error about 1e-7; NaN stays NaN.
inline Floats exp_lanes(Floats v) {
    v = clamp_lanes(v, -87.0f, 89.0f);
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    Floats shifted = v * 1.44269504088896341f + 12582912.0f;
    Floats n = shifted - 12582912.0f;
    Floats r = v - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    // Estrin's order: a shorter chain of dependent operations than Horner's.
    Floats square = r * r;
    Floats low = r * 1.6666665459e-1f + 5.0000001201e-1f, middle = r * 8.3334519073e-3f + 4.1665795894e-2f;
    Floats high = r * 1.9875691500e-4f + 1.3981999507e-3f;
    Floats p = (high * square + middle) * square + low;
    p = p * square + (r + 1.0f);
    return p * (Floats)(((Words)shifted << 23) + 0x3f800000);
}

// v / (1 + exp(-v)), as torch computes it: NaN for -inf, -0 far below zero.
inline Floats silu_lanes(Floats v) { return v * reciprocal(1.0f + exp_lanes(-v)); }

// Ends of a row: the same arithmetic on a part of a vector.
template <class T>
inline Floats load_part(const T* address, i64 count) {
    T padded[kLanes] = {};
    std::memcpy(padded, address, static_cast<std::size_t>(count) * sizeof(T));
    return load_lanes(padded);
}
template <class T>
inline void store_part(T* address, Floats v, i64 count) {
    T padded[kLanes];
    store_lanes(padded, v);
    std::memcpy(address, padded, static_cast<std::size_t>(count) * sizeof(T));
}

inline float sum_lanes(Floats v) {
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += v[i];
    return sum;
}

LTXK_CPU_END
