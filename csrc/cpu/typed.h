// Chunks of elements whose dtype is known only at run time, to and from the compute dtype; loops that the compiler vectorises.
#pragma once

#include "cpu/simd.h"

LTXK_CPU_BEGIN

// Codes of ParamType in include/ltxkern/types.cuh.
enum TypeCode : i64 { kF32 = 0, kF16 = 1, kBF16 = 2, kF64 = 3 };

inline i64 type_bytes(i64 type) { return type == kF64 ? 8 : type == kF32 ? 4 : 2; }

inline const char* element_address(const void* base, i64 type, i64 index) {
    return static_cast<const char*>(base) + index * type_bytes(type);
}
inline char* element_address(void* base, i64 type, i64 index) { return static_cast<char*>(base) + index * type_bytes(type); }

constexpr i64 kTypedChunk = 1024;

template <class C>
constexpr i64 kComputeType = sizeof(C) == 8 ? kF64 : kF32;

// A register of compute values, and the fp32 values that widen to one.
template <class C>
struct WideOf;
template <>
struct WideOf<float> {
    using Type = Floats;
};
template <>
struct WideOf<double> {
    using Type = double __attribute__((vector_size(4 * kLanes)));
};
template <class C>
using Wide = typename WideOf<C>::Type;
template <class C>
constexpr i64 kWide = 4 * kLanes / static_cast<i64>(sizeof(C));
using HalfFloats = float __attribute__((vector_size(2 * kLanes)));

// work(i, kind) for all of `count`: `kind` is of type Wide<C> where it takes the kWide<C> elements from i on, C where it takes one.
template <class C, class Work>
inline void over_lanes(i64 count, const Work& work) {
    i64 i = 0;
    for (; i + kWide<C> <= count; i += kWide<C>) work(i, Wide<C>{});
    for (; i < count; ++i) work(i, C{});
}
template <class V, class C>
inline V take(const C* address) {
    return load_raw<V>(address);
}
template <class V>
inline V take_float(const float* address) {
    if constexpr (std::is_same_v<V, Wide<double>>) {
        return __builtin_convertvector(load_raw<HalfFloats>(address), V);
    } else if constexpr (std::is_same_v<V, double>) {
        return *address;
    } else {
        return load_raw<V>(address);
    }
}
// kStream: past the caches, a register to an address of kStreamAlignment.
template <bool kStream, class V, class C>
inline void put_value(C* address, V v) {
    if constexpr (sizeof(V) == 4 * kLanes) {
        store_whole<kStream>(address, v);
    } else {
        *address = v;
    }
}

// `count` <= kTypedChunk elements as C: a pointer into `base` where they already are C, else into `buffer`.
template <class C>
inline const C* as_compute(const void* base, i64 type, i64 index, i64 count, C* buffer) {
    const void* address = element_address(base, type, index);
    if (type == kComputeType<C>) return static_cast<const C*>(address);
    if (type == kF64) {
        const double* in = static_cast<const double*>(address);
        for (i64 i = 0; i < count; ++i) buffer[i] = static_cast<C>(in[i]);
    } else if (type == kF32) {
        const float* in = static_cast<const float*>(address);
        for (i64 i = 0; i < count; ++i) buffer[i] = static_cast<C>(in[i]);
    } else if (type == kBF16) {
        const bf16* in = static_cast<const bf16*>(address);
        for (i64 i = 0; i < count; ++i) buffer[i] = static_cast<C>(to_float(in[i]));
    } else if constexpr (sizeof(C) == 4) {
        widen(static_cast<const f16*>(address), buffer, count);
    } else {
        alignas(64) float wide[kTypedChunk];
        widen(static_cast<const f16*>(address), wide, count);
        for (i64 i = 0; i < count; ++i) buffer[i] = static_cast<C>(wide[i]);
    }
    return buffer;
}

// fp64 reaches the 16-bit types through fp32, as in torch.
template <class C>
inline void store_compute(const C* values, void* base, i64 type, i64 index, i64 count) {
    void* address = element_address(base, type, index);
    if (type == kF64) {
        double* out = static_cast<double*>(address);
        for (i64 i = 0; i < count; ++i) out[i] = static_cast<double>(values[i]);
    } else if (type == kF32) {
        float* out = static_cast<float*>(address);
        for (i64 i = 0; i < count; ++i) out[i] = static_cast<float>(values[i]);
    } else if (type == kBF16) {
        bf16* out = static_cast<bf16*>(address);
        for (i64 i = 0; i < count; ++i) from_float(static_cast<float>(values[i]), out[i]);
    } else {
        alignas(64) float narrow_values[kTypedChunk];
        for (i64 i = 0; i < count; ++i) narrow_values[i] = static_cast<float>(values[i]);
        narrow(narrow_values, static_cast<f16*>(address), count);
    }
}

// Rounds fp32 values to what the dtype holds, in place.
inline void round_values(float* values, i64 type, i64 count) {
    if (type == kBF16) {
        for (i64 i = 0; i < count; ++i) {
            bf16 rounded;
            from_float(values[i], rounded);
            values[i] = to_float(rounded);
        }
    } else if (type == kF16) {
        alignas(64) f16 rounded[kTypedChunk];
        narrow(values, rounded, count);
        widen(rounded, values, count);
    }
}

LTXK_CPU_END
