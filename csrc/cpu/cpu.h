// Shared by the CPU kernels; every file here is compiled once per instruction set, with LTXK_ISA naming it.
#pragma once

#include <cstdint>
#include <cstring>

#include "registry.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__unix__)
#include <unistd.h>
#endif

// Everything of one instruction set lives in its own namespace, so that the linker never merges two of them.
#define LTXK_CPU_BEGIN namespace ltxk { namespace LTXK_ISA {
#define LTXK_CPU_END } }

#if defined(LTXK_ISA_avx512)
#define LTXK_ISA_VALUE ltxk::Isa::kAvx512
#elif defined(LTXK_ISA_avx2)
#define LTXK_ISA_VALUE ltxk::Isa::kAvx2
#else
#define LTXK_ISA_VALUE ltxk::Isa::kBase
#endif

// Methods of the parameter structs, which the device code shares.
#define LTXK_DEVICE inline

// LTXK_CPU_KERNEL("group_norm_silu<bf16>", run<bf16>): `run` takes (const void* parameters, int threads).
#define LTXK_CPU_KERNEL(name, ...) \
    static const ltxk::RegisterCpu LTXK_JOIN(register_, __COUNTER__)( \
        name, LTXK_ISA_VALUE, [](const void* parameters, int threads) { \
            using namespace ltxk::LTXK_ISA; \
            __VA_ARGS__(parameters, threads); \
        });

LTXK_CPU_BEGIN

using i64 = std::int64_t;
using u64 = std::uint64_t;


struct bf16 {
    std::uint16_t bits;
};
struct f16 {
    std::uint16_t bits;
};

inline std::uint32_t float_bits(float v) {
    std::uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}
inline float bits_float(std::uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return bits_float(static_cast<std::uint32_t>(v.bits) << 16); }
inline float to_float(f16 v) {
#if defined(__F16C__)
    return _cvtsh_ss(v.bits);
#else
    _Float16 half;
    std::memcpy(&half, &v.bits, 2);
    return static_cast<float>(half);
#endif
}

inline void from_float(float v, float& out) { out = v; }
inline void from_float(float v, bf16& out) {
    std::uint32_t bits = float_bits(v);
    std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void from_float(float v, f16& out) {
#if defined(__F16C__)
    out.bits = _cvtss_sh(v, 0);
#else
    _Float16 half = static_cast<_Float16>(v);
    std::memcpy(&out.bits, &half, 2);
#endif
}

// Chunk of a row to fp32, and back with one rounding; loops that the compiler vectorises, except fp16, which it does not.
template <class T>
inline void widen(const T* in, float* out, i64 count) {
    for (i64 i = 0; i < count; ++i) out[i] = to_float(in[i]);
}
template <class T>
inline void narrow(const float* in, T* out, i64 count) {
    for (i64 i = 0; i < count; ++i) from_float(in[i], out[i]);
}
#if defined(__F16C__)
template <>
inline void widen<f16>(const f16* in, float* out, i64 count) {
    i64 i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
    for (; i < count; ++i) out[i] = to_float(in[i]);
}
template <>
inline void narrow<f16>(const float* in, f16* out, i64 count) {
    i64 i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
    for (; i < count; ++i) from_float(in[i], out[i]);
}
#endif

// A parameter of any float dtype: codes as in include/ltxkern/types.cuh.
inline float load_param(const void* base, i64 type, i64 index, float absent) {
    if (base == nullptr) return absent;
    if (type == 0) return static_cast<const float*>(base)[index];
    if (type == 1) return to_float(static_cast<const f16*>(base)[index]);
    return to_float(static_cast<const bf16*>(base)[index]);
}

// A sum of squares that rounding may have left below zero; NaN stays NaN.
inline double not_negative(double v) { return v > 0.0 || v != v ? v : 0.0; }

// Whether a call that moves so many bytes should write past the caches: through them each line would first be read, and evicted
// before anyone asks for it. Processors of several dies report the sum of their last-level caches, of which a core reaches 32 MB.
inline bool streams(i64 bytes) {
    static const i64 cache = [] {
        i64 most = i64{32} << 20;
#if defined(_SC_LEVEL3_CACHE_SIZE)
        i64 found = sysconf(_SC_LEVEL3_CACHE_SIZE);
        if (found > 0 && found < most) return found;
#endif
        return most;
    }();
    return bytes > cache;
}

// Before another thread reads what was streamed.
inline void end_streaming() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// The line into the first-level cache; no address is a wrong one.
inline void prefetch_line(const void* address) { __builtin_prefetch(address); }

LTXK_CPU_END
