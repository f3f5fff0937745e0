// Vectors of one instruction set: load and store of the three activation types as fp32, and SiLU; written once for all widths.
#pragma once

#include <type_traits>

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
    // Of the NaN of inf * 0, max returns its second operand, which leaves the estimate of 1 / inf: 0.
    Floats rest = (Floats)_mm512_max_ps((__m512)(1.0f - d * r), _mm512_set1_ps(-1.0f));
    return r + r * rest;
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

// v / (1 + exp(-v)) of N vectors, as torch computes it: NaN for -inf, -0 far below zero. One vector is a chain of some twenty
// operations that wait for each other; N chains side by side keep the core busy. exp(-v) to about 1e-7, relative.
template <int N>
inline void silu_vectors(Floats (&v)[N]) {
    constexpr float kLog2E = 1.44269504088896341f;
    Floats shifted[N], f[N], p[N];
    for (int k = 0; k < N; ++k) f[k] = clamp_lanes(v[k], -88.72284f, 87.0f);  // from 2^128, inf, down to a normal number
#if defined(__AVX512F__)
    // exp(-v) = 2^(n / 16) 2^f, n whole, |f| <= 1/32. Adding 1.5 * 2^19 rounds to a sixteenth and leaves n in the low bits, of
    // which the permutation takes four as index of 2^(0/16) .. 2^(15/16); the others are the exponent.
    constexpr float kRound = 786432.0f;
    const __m512 powers = _mm512_setr_ps(1.0f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
                                         1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f,
                                         1.91520656f);
#else
    // exp(-v) = 2^n 2^f, n whole, |f| <= 1/2. Adding 1.5 * 2^23 rounds to an integer and leaves n in the low bits.
    constexpr float kRound = 12582912.0f;
#endif
    for (int k = 0; k < N; ++k) shifted[k] = kRound - f[k] * kLog2E;
    for (int k = 0; k < N; ++k) p[k] = shifted[k] - kRound;
    for (int k = 0; k < N; ++k) f[k] = -f[k] * kLog2E - p[k];
#if defined(__AVX512F__)
    for (int k = 0; k < N; ++k) p[k] = f[k] * 5.55041087e-2f + 2.40226507e-1f;
    for (int k = 0; k < N; ++k) p[k] = p[k] * f[k] + 6.93147181e-1f;
    for (int k = 0; k < N; ++k) p[k] = p[k] * f[k] + 1.0f;
    for (int k = 0; k < N; ++k) {
        UWords power = (UWords)_mm512_permutexvar_ps((__m512i)shifted[k], powers);
        shifted[k] = (Floats)(power + (((UWords)shifted[k] << 19) & 0xff800000u));
    }
#else
    for (int k = 0; k < N; ++k) p[k] = f[k] * 1.55946782e-4f + 1.34066439e-3f;
    for (int k = 0; k < N; ++k) p[k] = p[k] * f[k] + 9.61769297e-3f;
    for (int k = 0; k < N; ++k) p[k] = p[k] * f[k] + 5.55031055e-2f;
    for (int k = 0; k < N; ++k) p[k] = p[k] * f[k] + 2.40226528e-1f;
    for (int k = 0; k < N; ++k) p[k] = p[k] * f[k] + 6.93147215e-1f;
    for (int k = 0; k < N; ++k) p[k] = p[k] * f[k] + 1.0f;
    for (int k = 0; k < N; ++k) shifted[k] = (Floats)(((UWords)shifted[k] << 23) + 0x3f800000u);
#endif
    for (int k = 0; k < N; ++k) p[k] = p[k] * shifted[k] + 1.0f;
    for (int k = 0; k < N; ++k) v[k] *= reciprocal(p[k]);
}

inline Floats silu_lanes(Floats v) {
    Floats one[1] = {v};
    silu_vectors(one);
    return one[0];
}

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

// work(i, n) for all of `count`: n is the constant kLanes for whole registers, and the number of what is left at the end.
template <class Work>
inline void over_registers(i64 count, const Work& work) {
    i64 i = 0;
    for (; i + kLanes <= count; i += kLanes) work(i, std::integral_constant<i64, kLanes>{});
    if (i < count) work(i, count - i);
}
template <class T, class N>
inline Floats load_n(const T* address, N n) {
    if constexpr (std::is_same_v<N, i64>) return load_part(address, n);
    else return load_lanes(address);
}
template <class T, class N>
inline void store_n(T* address, Floats v, N n) {
    if constexpr (std::is_same_v<N, i64>) store_part(address, v, n);
    else store_lanes(address, v);
}

// out[i] = silu(value(i, n)) for all of `count`, as over_registers goes; whole registers four at a time, see silu_vectors.
template <class T, class Value>
inline void store_silu(T* out, i64 count, const Value& value) {
    constexpr int kChains = 4;
    constexpr i64 kStep = kChains * kLanes;
    i64 body = count / kStep * kStep;
    for (i64 i = 0; i < body; i += kStep) {
        Floats v[kChains];
        for (int k = 0; k < kChains; ++k) v[k] = value(i + k * kLanes, std::integral_constant<i64, kLanes>{});
        silu_vectors(v);
        for (int k = 0; k < kChains; ++k) store_lanes(out + i + k * kLanes, v[k]);
    }
    over_registers(count - body, [&](i64 i, auto n) { store_n(out + body + i, silu_lanes(value(body + i, n)), n); });
}

// v, rounded: the compiler may not contract the product that made it with a sum.
inline Floats rounded(Floats v) {
#if defined(__x86_64__)
    asm("" : "+x"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#else
    asm("" : "+m"(v));
#endif
    return v;
}

inline float sum_lanes(Floats v) {
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += v[i];
    return sum;
}

// Vectors of a block, which a loop of long chains works on at once.
#if defined(__AVX512F__)
constexpr int kVectors = 8;
#else
constexpr int kVectors = 4;
#endif
constexpr i64 kBlock = kVectors * kLanes;

// N vectors. Of bf16 the lanes lie as they are cheapest to unpack: the even elements of two vectors, then the odd ones; store_block
// puts them back.
template <class T, int N>
inline void load_block(const T* address, Floats (&v)[N]) {
    static_assert(N % 2 == 0, "vectors come in pairs");
#if defined(__AVX2__)
    if constexpr (std::is_same_v<T, bf16>) {
        for (int k = 0; k < N; k += 2) {
            UWords pairs = load_raw<UWords>(address + k * kLanes);
            v[k] = (Floats)(pairs << 16);
            v[k + 1] = (Floats)(pairs & 0xffff0000u);
        }
        return;
    }
#endif
    for (int k = 0; k < N; ++k) v[k] = load_lanes(address + k * kLanes);
}

#if defined(__AVX2__)
// Nearest even, in the upper halves. A NaN keeps its bits, as rounding could carry into its sign: it is a quiet one.
inline UWords round_upper(Floats v) {
    UWords bits = (UWords)v;
#if defined(__AVX512F__)
    __mmask16 odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
    __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
    __m512i half = _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
    return (UWords)_mm512_mask_add_epi32((__m512i)bits, number, (__m512i)bits, half);
#else
    UWords rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (UWords)_mm256_blendv_ps((__m256)rounded, (__m256)v, _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q));
#endif
}
#endif

// kStream: past the caches, to an address aligned to the vector.
template <bool kStream, class V>
inline void store_whole(void* address, V v) {
#if defined(__AVX512F__)
    if constexpr (kStream && sizeof(V) == 64) return _mm512_stream_ps(static_cast<float*>(address), (__m512)v);
#endif
#if defined(__AVX2__)
    if constexpr (kStream && sizeof(V) == 32) return _mm256_stream_ps(static_cast<float*>(address), (__m256)v);
    if constexpr (kStream && sizeof(V) == 16) return _mm_stream_ps(static_cast<float*>(address), (__m128)v);
#endif
    __builtin_memcpy(address, &v, sizeof(v));
}

// The lanes as load_block left them; kStream: past the caches, to an address of kStreamAlignment.
constexpr std::uintptr_t kStreamAlignment = 64;
template <bool kStream, class T, int N>
inline void store_block(T* address, Floats (&v)[N]) {
    for (int k = 0; k < N; k += 2) {
        T* at = address + k * kLanes;
        if constexpr (std::is_same_v<T, float>) {
            store_whole<kStream>(at, v[k]);
            store_whole<kStream>(at + kLanes, v[k + 1]);
#if defined(__AVX2__)
        } else if constexpr (std::is_same_v<T, bf16>) {
            store_whole<kStream>(at, (round_upper(v[k]) >> 16) | (round_upper(v[k + 1]) & 0xffff0000u));
#endif
        } else {
            alignas(64) T staged[2 * kLanes];
            store_lanes(staged, v[k]);
            store_lanes(staged + kLanes, v[k + 1]);
            store_whole<kStream>(at, load_raw<Halves>(staged));
            store_whole<kStream>(at + kLanes, load_raw<Halves>(staged + kLanes));
        }
    }
}

LTXK_CPU_END
