// Packs whose dtypes the compiler knows: V elements as words, counted in packs by 32-bit numbers, which reach 64 GiB.
//
// A warp has kPacks x 32 neighbouring packs, lane by lane, so that those of a thread lie at fixed distances from its first. Only rows
// that such warps fill come here: no access has a condition.
#pragma once

#include "ltxkern/typed.cuh"

namespace ltxk {

constexpr int kPacks = 4;
constexpr u32 kWarpPacks = 32 * kPacks;

// Where a thread's first pack of T lies: `at` packs of V elements behind a base.
template <class T, int V>
LTXK_DEVICE const char* pack_address(const void* base, u32 at) {
    return static_cast<const char*>(base) + static_cast<u64>(at) * (sizeof(T) * V);
}
template <class T, int V>
LTXK_DEVICE char* pack_address(void* base, u32 at) {
    return static_cast<char*>(base) + static_cast<u64>(at) * (sizeof(T) * V);
}

// A thread's j-th pack.
template <class T, int V>
LTXK_DEVICE Raw<V> load_pack(const char* first, int j) {
    Raw<V> raw;
    load_words<sizeof(T) * V / 4>(first + j * static_cast<int>(32 * sizeof(T) * V), raw);
    return raw;
}
// The i-th 16 bytes of a pack that has more of them.
template <int V>
LTXK_DEVICE Raw<V> load_part(const char* pack, int i) {
    Raw<V> raw;
    load_words<4>(pack + 16 * i, raw);
    return raw;
}
template <class T, int V>
LTXK_DEVICE void store_pack(char* first, int j, const Raw<V>& raw) {
    store_words<sizeof(T) * V / 4>(first + j * static_cast<int>(32 * sizeof(T) * V), raw);
}

LTXK_DEVICE float low_half(bf16, u32 word) { return bits_to_float(word << 16); }
LTXK_DEVICE float high_half(bf16, u32 word) { return bits_to_float(word & 0xffff0000u); }
LTXK_DEVICE float low_half(f16, u32 word) { return to_float(f16{static_cast<u16>(word)}); }
LTXK_DEVICE float high_half(f16, u32 word) { return to_float(f16{static_cast<u16>(word >> 16)}); }

// Element k of a pack.
template <class T, int V>
LTXK_DEVICE float element(const Raw<V>& raw, int k) {
    if constexpr (sizeof(T) == 4) return bits_to_float(raw.word[k]);
    else return k % 2 ? high_half(T{}, raw.word[k / 2]) : low_half(T{}, raw.word[k / 2]);
}

// Nearest T of each value.
template <class T, int V>
LTXK_DEVICE Raw<V> rounded_pack(const float (&values)[V]) {
    Raw<V> raw;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int k = 0; k < V; ++k) raw.word[k] = float_to_bits(values[k]);
    } else {
#pragma unroll
        for (int k = 0; k < V / 2; ++k) raw.word[k] = round_two(T{}, values[2 * k], values[2 * k + 1]);
    }
    return raw;
}

// A parameter that is the 32 bits of an fp32.
LTXK_DEVICE float float_of(i64 bits) { return bits_to_float(static_cast<u32>(bits)); }

// What a row without modulation holds, as store_nan.
template <class T, int V>
LTXK_DEVICE Raw<V> nan_pack() {
    float values[V];
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = not_a_number();
    return rounded_pack<T>(values);
}

}  // namespace ltxk
