// Elements whose dtype is known only at launch: V of them move as raw words and are converted in registers.
//
// The branches on the dtype are the same for all threads. Loading and converting are two steps, so that a kernel with many operands
// has all its loads under way before it waits for the first.
#pragma once

#include "ltxkern/types.cuh"

namespace ltxk {

// Up to 32 bytes of V elements.
template <int V>
struct Raw {
    static_assert(V == 1 || V == 2 || V == 4 || V == 8);
    u32 word[8];
};

template <int WORDS>
struct alignas(WORDS % 4 == 0 ? 16 : 4 * WORDS) Words {
    u32 word[WORDS];
};

template <int WORDS, int V>
LTXK_DEVICE void load_words(const void* address, Raw<V>& raw) {
    constexpr int kStep = WORDS > 4 ? 4 : WORDS;
#pragma unroll
    for (int first = 0; first < WORDS; first += kStep) {
        auto words = reinterpret_cast<const Words<kStep>*>(static_cast<const u32*>(address) + first)[0];
#pragma unroll
        for (int i = 0; i < kStep; ++i) raw.word[first + i] = words.word[i];
    }
}

template <int WORDS, int V>
LTXK_DEVICE void store_words(void* address, const Raw<V>& raw) {
    constexpr int kStep = WORDS > 4 ? 4 : WORDS;
#pragma unroll
    for (int first = 0; first < WORDS; first += kStep) {
        Words<kStep> words;
#pragma unroll
        for (int i = 0; i < kStep; ++i) words.word[i] = raw.word[first + i];
        reinterpret_cast<Words<kStep>*>(static_cast<u32*>(address) + first)[0] = words;
    }
}

LTXK_DEVICE i64 type_bytes(i64 type) { return type == kF64 ? 8 : type == kF32 ? 4 : 2; }

LTXK_DEVICE const void* element_address(const void* base, i64 type, i64 index) {
    return static_cast<const char*>(base) + index * type_bytes(type);
}

// Elements [index, index + V); for V > 1 the address is a multiple of min(16, V elements).
template <int V>
LTXK_DEVICE Raw<V> load_raw(const void* base, i64 type, i64 index) {
    Raw<V> raw;
    const void* address = element_address(base, type, index);
    if (type == kF32) {
        load_words<V>(address, raw);
    } else if (type != kF64) {
        if constexpr (V == 1) raw.word[0] = *static_cast<const u16*>(address);
        else load_words<V / 2>(address, raw);
    } else if constexpr (V < 8) {
        load_words<2 * V>(address, raw);
    }
    return raw;
}

LTXK_DEVICE double words_to_double(u32 low, u32 high) {
#if defined(LTXK_SHIM)
    return shim::bit_cast<double>(static_cast<u64>(high) << 32 | low);
#else
    return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
#endif
}

LTXK_DEVICE void double_to_words(double v, u32& low, u32& high) {
#if defined(LTXK_SHIM)
    u64 bits = shim::bit_cast<u64>(v);
    low = static_cast<u32>(bits);
    high = static_cast<u32>(bits >> 32);
#else
    low = static_cast<u32>(__double2loint(v));
    high = static_cast<u32>(__double2hiint(v));
#endif
}

// Element i of the 16-bit elements in `raw`.
template <int V>
LTXK_DEVICE u16 half_word(const Raw<V>& raw, int i) {
    return static_cast<u16>(i % 2 ? raw.word[i / 2] >> 16 : raw.word[i / 2]);
}

template <class C, int V>
LTXK_DEVICE void convert(const Raw<V>& raw, i64 type, C (&values)[V]) {
    if (type == kF32) {
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] = static_cast<C>(bits_to_float(raw.word[i]));
    } else if (type == kBF16) {
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] = static_cast<C>(to_float(bf16{half_word(raw, i)}));
    } else if (type == kF16) {
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] = static_cast<C>(to_float(f16{half_word(raw, i)}));
    } else if constexpr (V < 8) {
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] = static_cast<C>(words_to_double(raw.word[2 * i], raw.word[2 * i + 1]));
    }
}

template <class C, int V>
LTXK_DEVICE void load_typed(const void* base, i64 type, i64 index, C (&values)[V]) {
    convert(load_raw<V>(base, type, index), type, values);
}

// fp64 reaches the 16-bit types through fp32, as in torch.
template <class C>
LTXK_DEVICE C round_through(C v, i64 type) {
    if (type == kF64) return v;
    float narrow = static_cast<float>(v);
    if (type == kBF16) narrow = to_float(round_bf16(narrow));
    if (type == kF16) narrow = to_float(round_f16(narrow));
    return static_cast<C>(narrow);
}

template <class C, int V>
LTXK_DEVICE void store_typed(void* base, i64 type, i64 index, const C (&values)[V]) {
    Raw<V> raw;
    void* address = static_cast<char*>(base) + index * type_bytes(type);
    if (type == kF32) {
#pragma unroll
        for (int i = 0; i < V; ++i) raw.word[i] = float_to_bits(static_cast<float>(values[i]));
        store_words<V>(address, raw);
    } else if (type != kF64) {
        u16 halves[V];
#pragma unroll
        for (int i = 0; i < V; ++i)
            halves[i] = type == kBF16 ? round_bf16(static_cast<float>(values[i])).bits : round_f16(static_cast<float>(values[i])).bits;
        if constexpr (V == 1) {
            *static_cast<u16*>(address) = halves[0];
        } else {
#pragma unroll
            for (int i = 0; i < V / 2; ++i) raw.word[i] = halves[2 * i] | static_cast<u32>(halves[2 * i + 1]) << 16;
            store_words<V / 2>(address, raw);
        }
    } else if constexpr (V < 8) {
#pragma unroll
        for (int i = 0; i < V; ++i) double_to_words(static_cast<double>(values[i]), raw.word[2 * i], raw.word[2 * i + 1]);
        store_words<2 * V>(address, raw);
    }
}

// A product that is never contracted with a following sum: torch rounds both.
LTXK_DEVICE float product(float a, float b) {
#if defined(LTXK_SHIM)
    return a * b;
#else
    return __fmul_rn(a, b);
#endif
}
LTXK_DEVICE double product(double a, double b) {
#if defined(LTXK_SHIM)
    return a * b;
#else
    return __dmul_rn(a, b);
#endif
}

LTXK_DEVICE double square_root(double v) {
#if defined(LTXK_SHIM)
    return __builtin_sqrt(v);
#else
    return __dsqrt_rn(v);
#endif
}

}  // namespace ltxk
