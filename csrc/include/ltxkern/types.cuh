// Activation types, their conversions to and from fp32, and 16-byte vector access.
#pragma once

#include "ltxkern/platform.cuh"

namespace ltxk {

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

LTXK_DEVICE float to_float(float v) { return v; }
LTXK_DEVICE float to_float(double v) { return static_cast<float>(v); }

#if defined(LTXK_SHIM)

LTXK_DEVICE float bits_to_float(u32 v) { return shim::bit_cast<float>(v); }
LTXK_DEVICE u32 float_to_bits(float v) { return shim::bit_cast<u32>(v); }
LTXK_DEVICE float to_float(f16 v) { return static_cast<float>(shim::bit_cast<_Float16>(v.bits)); }
LTXK_DEVICE f16 round_f16(float v) { return {shim::bit_cast<u16>(static_cast<_Float16>(v))}; }
LTXK_DEVICE bf16 round_bf16(float v) {
    u32 bits = float_to_bits(v);
    if (v != v) return {0x7fc0};
    return {static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
LTXK_DEVICE u32 round_two(bf16, float low, float high) {
    return round_bf16(low).bits | static_cast<u32>(round_bf16(high).bits) << 16;
}
LTXK_DEVICE u32 round_two(f16, float low, float high) { return round_f16(low).bits | static_cast<u32>(round_f16(high).bits) << 16; }
LTXK_DEVICE float flushed(float v) { return __builtin_fabsf(v) < 1.17549435e-38f ? __builtin_copysignf(0.0f, v) : v; }
LTXK_DEVICE float fast_exp2(float v) { return flushed(__builtin_exp2f(flushed(v))); }
LTXK_DEVICE float fast_reciprocal(float v) { return flushed(1.0f / flushed(v)); }
LTXK_DEVICE float fast_rsqrt(float v) { return 1.0f / sqrtf(v); }
LTXK_DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
LTXK_DEVICE u32 high_product(u32 a, u32 b) { return static_cast<u32>(static_cast<u64>(a) * b >> 32); }

#else

LTXK_DEVICE float bits_to_float(u32 v) { return __uint_as_float(v); }
LTXK_DEVICE u32 float_to_bits(float v) { return __float_as_uint(v); }
LTXK_DEVICE float to_float(f16 v) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v.bits));
    return result;
}
LTXK_DEVICE f16 round_f16(float v) {
    f16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
    return result;
}
LTXK_DEVICE bf16 round_bf16(float v) {
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
    return result;
}
// Two values side by side, `low` at the lower address.
LTXK_DEVICE u32 round_two(bf16, float low, float high) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
LTXK_DEVICE u32 round_two(f16, float low, float high) {
    u32 result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
// Below 1.2e-38 these two take and give zeros: without it each costs seven instructions.
LTXK_DEVICE float fast_exp2(float v) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
}
LTXK_DEVICE float fast_reciprocal(float v) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
}
LTXK_DEVICE float fast_rsqrt(float v) {
    float result;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
}
LTXK_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
LTXK_DEVICE u32 high_product(u32 a, u32 b) { return __umulhi(a, b); }

#endif

LTXK_DEVICE double fast_reciprocal(double v) { return 1.0 / v; }

LTXK_DEVICE float not_a_number() { return bits_to_float(0x7fc00000u); }

LTXK_DEVICE float to_float(bf16 v) { return bits_to_float(static_cast<u32>(v.bits) << 16); }

template <class T>
struct Rounded;
template <>
struct Rounded<float> {
    static LTXK_DEVICE float from(float v) { return v; }
};
template <>
struct Rounded<f16> {
    static LTXK_DEVICE f16 from(float v) { return round_f16(v); }
};
template <>
struct Rounded<bf16> {
    static LTXK_DEVICE bf16 from(float v) { return round_bf16(v); }
};
template <>
struct Rounded<double> {
    static LTXK_DEVICE double from(double v) { return v; }
};

// Nearest T, ties to even.
template <class T>
LTXK_DEVICE T round_to(float v) {
    return Rounded<T>::from(v);
}

// n / d without a division, n below 2^31; `by` is what launches make of d (divider in steps.py).
LTXK_DEVICE u32 divide(u32 n, i64 by) { return (high_product(n, static_cast<u32>(by)) + n) >> static_cast<u32>(by >> 32); }

// A result in one Newton step nearer than `quick`, or `quick` where that step is not finite.
LTXK_DEVICE float nearer(float quick, float refined) { return refined == refined ? refined : quick; }

// 1 / sqrt(v) within an ulp, for what a whole row is multiplied by.
LTXK_DEVICE float inverse_root(float v) {
    float quick = fast_rsqrt(v);
    return nearer(quick, fused(0.5f * quick, fused(-v * quick, quick, 1.0f), quick));
}

// What goes into silu: the value times this factor, so that kernels fold it into a scale and an offset of their own.
template <class T>
constexpr float kSiluFactor = sizeof(T) == 2 ? -1.4426950408889634f : 1.0f;

// value / (1 + exp(-value)) of a result in T: correctly rounded but for the exponential in fp32, within two ulp of fp32 where it is
// rounded to 16 bits.
template <class T>
LTXK_DEVICE float silu(float scaled) {
    constexpr float kLog2 = -1.4426950408889634f;
    if constexpr (sizeof(T) == 2) {
        return scaled * fast_reciprocal(fused(fast_exp2(scaled), kLog2, kLog2));
    } else {
        float below = 1.0f + fast_exp2(scaled * kLog2), inverse = fast_reciprocal(below), quick = scaled * inverse;
        return nearer(quick, fused(fused(-below, quick, scaled), inverse, quick));
    }
}

// Codes of parameter dtypes that are looked at once per channel, where a template would only multiply the binary.
enum ParamType : i64 { kF32 = 0, kF16 = 1, kBF16 = 2, kF64 = 3 };

LTXK_DEVICE float load_param(const void* base, i64 type, i64 index, float absent) {
    if (base == nullptr) return absent;
    if (type == kF32) return static_cast<const float*>(base)[index];
    if (type == kF16) return to_float(static_cast<const f16*>(base)[index]);
    return to_float(static_cast<const bf16*>(base)[index]);
}

// V elements that move together; 16 bytes where V is kVector<T>.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
    T value[V];
};

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T, int V>
LTXK_DEVICE Pack<T, V> load(const T* address) {
    return *reinterpret_cast<const Pack<T, V>*>(address);
}

template <class T, int V>
LTXK_DEVICE void store(T* address, const Pack<T, V>& pack) {
    *reinterpret_cast<Pack<T, V>*>(address) = pack;
}

// A pack as its elements and as words of 32 bits.
template <class T, int V>
union PackWords {
    Pack<T, V> pack;
    u32 word[sizeof(T) * V > 4 ? sizeof(T) * V / 4 : 1];
};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <class T, int V>
LTXK_DEVICE void unpack(const Pack<T, V>& pack, float (&values)[V]) {
    if constexpr (kSame<T, bf16> && V % 2 == 0) {
        PackWords<T, V> both = {pack};
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] = bits_to_float(k % 2 ? both.word[k / 2] & 0xffff0000u : both.word[k / 2] << 16);
    } else {
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] = to_float(pack.value[k]);
    }
}

// Nearest T of each value, in pairs where there are pairs.
template <class T, int V>
LTXK_DEVICE Pack<T, V> rounded(const float (&values)[V]) {
    PackWords<T, V> both;
    if constexpr (sizeof(T) == 2 && V % 2 == 0) {
#pragma unroll
        for (int k = 0; k < V / 2; ++k) both.word[k] = round_two(T{}, values[2 * k], values[2 * k + 1]);
    } else {
#pragma unroll
        for (int k = 0; k < V; ++k) both.pack.value[k] = round_to<T>(values[k]);
    }
    return both.pack;
}

// Parameters [index, index + V) of a type known at launch; for V > 1 the address is a multiple of min(16, V elements).
template <int V>
LTXK_DEVICE void load_params(const void* base, i64 type, i64 index, float (&values)[V]) {
    if (type == kF32) {
        constexpr int kPart = V < 4 ? V : 4;
#pragma unroll
        for (int k = 0; k < V; k += kPart) {
            Pack<float, kPart> part = load<float, kPart>(static_cast<const float*>(base) + index + k);
#pragma unroll
            for (int i = 0; i < kPart; ++i) values[k + i] = part.value[i];
        }
    } else if (type == kF16) {
        unpack(load<f16, V>(static_cast<const f16*>(base) + index), values);
    } else {
        unpack(load<bf16, V>(static_cast<const bf16*>(base) + index), values);
    }
}

// Load or store of data that is not used again soon: it leaves the L2 cache first.
template <class T, int V>
LTXK_DEVICE Pack<T, V> load_streaming(const T* address) {
#if !defined(LTXK_SHIM)
    if constexpr (sizeof(T) * V == 16) {
        union {
            uint4 raw;
            Pack<T, V> pack;
        } both = {__ldcs(reinterpret_cast<const uint4*>(address))};
        return both.pack;
    }
#endif
    return load<T, V>(address);
}

template <class T, int V>
LTXK_DEVICE void store_streaming(T* address, const Pack<T, V>& pack) {
#if !defined(LTXK_SHIM)
    if constexpr (sizeof(T) * V == 16) {
        __stcs(reinterpret_cast<uint4*>(address), *reinterpret_cast<const uint4*>(&pack));
        return;
    }
#endif
    store<T, V>(address, pack);
}

}  // namespace ltxk
