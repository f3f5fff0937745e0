// LoRA merge: a tile of the weight is read, changed by the products of up to four LoRAs and written, with no temporary.
//
// fp32 accumulation over all LoRAs and one rounding: nearest, or for e4m3 weights stochastic from a counter. This kernel, on plain cores,
// is for small ranks, where reading and writing the weight is the cost, and for factors that tensor cores do not take; the others are in
// merge_lora_tensor_cores.cuh.
#pragma once

#include "ltxkern/typed.cuh"

namespace ltxk {

constexpr int kLoras = 4;
constexpr int kTile = 64, kRankStep = 16;
constexpr i64 kE4M3 = 4;  // beside ParamType

struct LoraFactors {
    const void* a;  // (rank, columns)
    const void* b;  // (rows, rank)
    i64 a_type, b_type, rank;
    double scale;
};

struct MergeLora {
    void* weight;
    i64 type, rows, columns, row_stride, column_stride;
    i64 column_tiles;
    LoraFactors lora[kLoras];
    i64 count;
    i64 stochastic, seed;
};

// Counter-based bits: a mix of a 32-bit word in which every input bit reaches every output bit.
LTXK_DEVICE u32 mix_bits(u32 v) {
    v ^= v >> 16;
    v *= 0x7feb352du;
    v ^= v >> 15;
    v *= 0x846ca68bu;
    return v ^ v >> 16;
}

LTXK_DEVICE u32 counter_bits(i64 seed, i64 index) {
    u64 s = static_cast<u64>(seed), i = static_cast<u64>(index);
    u32 low = mix_bits(static_cast<u32>(i) ^ mix_bits(static_cast<u32>(s)));
    return mix_bits(low ^ static_cast<u32>(i >> 32) ^ mix_bits(static_cast<u32>(s >> 32) ^ 0x9e3779b9u));
}

LTXK_DEVICE float power_of_two(int exponent) { return bits_to_float(static_cast<u32>(exponent + 127) << 23); }

// Exponent and mantissa moved to those of fp32, whose denormals take those of e4m3; then the difference of the biases.
LTXK_DEVICE float from_e4m3(u8 bits) {
    u32 magnitude = bits & 0x7fu;
    float value = bits_to_float(magnitude << 20) * power_of_two(120);
    if (magnitude == 0x7fu) value = not_a_number();
    return bits_to_float(float_to_bits(value) | (bits & 0x80u) << 24);
}

// The nearest e4m3 of a number in [0, 448], ties to even.
LTXK_DEVICE u32 nearest_e4m3(float magnitude) {
    // Below 2^-6 the codes count steps of 2^-9, and those are the steps of fp32 at 2^14.
    if (magnitude < power_of_two(-6)) return float_to_bits(magnitude + power_of_two(14)) - float_to_bits(power_of_two(14));
    u32 bits = float_to_bits(magnitude);
    return ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
}

// One of the two neighbours of a number in [0, 448]; noise: 20 random bits.
LTXK_DEVICE u32 stochastic_e4m3(float magnitude, u32 noise) {
    int exponent = static_cast<int>(float_to_bits(magnitude) >> 23) - 127;
    int step = (exponent < -6 ? -6 : exponent) - 3;
    // In units of 2^-20 of a step: an integer for normal numbers, cut off below that for the smallest.
    u32 whole = (static_cast<u32>(magnitude * power_of_two(20 - step)) + noise) >> 20;
    if (whole == 16) {
        whole = 8;
        ++step;
    }
    return whole < 8 ? whole : static_cast<u32>(step + 10) << 3 | (whole - 8);
}

// Clamped to the largest finite value, 448. noise: 20 random bits, or 1 << 20 for the nearest value, ties to even.
LTXK_DEVICE u8 to_e4m3(float v, u32 noise) {
    u32 bits = float_to_bits(v), sign = bits >> 24 & 0x80u, magnitude_bits = bits & 0x7fffffffu;
    if (magnitude_bits > 0x7f800000u) return static_cast<u8>(sign | 0x7f);
    float magnitude = bits_to_float(magnitude_bits);
    magnitude = magnitude < 448.0f ? magnitude : 448.0f;
    return static_cast<u8>(sign | (noise < 1u << 20 ? stochastic_e4m3(magnitude, noise) : nearest_e4m3(magnitude)));
}

// Two e4m3 numbers, the first in the low byte, and back; one instruction each where the device has it.
LTXK_DEVICE void from_e4m3_pair(u32 pair, float (&values)[2]) {
#if !defined(LTXK_SHIM) && __CUDA_ARCH__ >= 890
    asm("{\n.reg .b32 halves;\n.reg .b16 first, second;\ncvt.rn.f16x2.e4m3x2 halves, %2;\nmov.b32 {first, second}, halves;\n"
        "cvt.f32.f16 %0, first;\ncvt.f32.f16 %1, second;\n}"
        : "=f"(values[0]), "=f"(values[1])
        : "h"(static_cast<u16>(pair)));
#else
    values[0] = from_e4m3(static_cast<u8>(pair));
    values[1] = from_e4m3(static_cast<u8>(pair >> 8));
#endif
}

LTXK_DEVICE u32 to_e4m3_pair(const float (&values)[2]) {
#if !defined(LTXK_SHIM) && __CUDA_ARCH__ >= 890
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(values[1]), "f"(values[0]));
    return pair;
#else
    return to_e4m3(values[0], 1u << 20) | static_cast<u32>(to_e4m3(values[1], 1u << 20)) << 8;
#endif
}

struct LoraTiles {
    // The padding keeps the transposing stores to b off one bank, and its rows on 16 bytes.
    alignas(16) float b[kRankStep][kTile + 4];  // [rank][row]
    alignas(16) float a[kRankStep][kTile];      // [rank][column]
};

LTXK_DEVICE float factor_at(const void* factor, i64 type, i64 at) {
    float value[1];
    load_typed(factor, type, at, value);
    return value[0];
}

// Whether rows of this stride from this address can be met in accesses of four elements of `bytes` bytes.
LTXK_DEVICE bool in_fours(const void* base, i64 stride, i64 bytes) {
    return stride % 4 == 0 && reinterpret_cast<u64>(base) % static_cast<u64>(4 * bytes) == 0;
}

// Elements [at, at + 4) of a factor, of which `count` exist; zero in place of the others.
LTXK_DEVICE void four_of(const void* factor, i64 type, i64 at, i64 count, bool vectors, float (&values)[4]) {
    if (vectors && count >= 4) {
        load_typed(factor, type, at, values);
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) values[k] = k < count ? factor_at(factor, type, at + k) : 0.0f;
}

// Ranks [rank, rank + kRankStep) of both factors into shared memory, zero outside the matrices: four elements of each a thread.
LTXK_DEVICE void load_tiles(const MergeLora& p, const LoraFactors& lora, i64 row, i64 column, i64 rank, LoraTiles& tiles) {
    float values[4];
    int thread = static_cast<int>(threadIdx.x), k = thread % 4 * 4, r = thread / 4;
    i64 left = row + r < p.rows ? lora.rank - rank - k : 0;
    four_of(lora.b, lora.b_type, (row + r) * lora.rank + rank + k, left, in_fours(lora.b, lora.rank, type_bytes(lora.b_type)), values);
#pragma unroll
    for (int i = 0; i < 4; ++i) tiles.b[k + i][r] = static_cast<float>(lora.scale) * values[i];
    int c = thread % 16 * 4;
    k = thread / 16;
    left = rank + k < lora.rank ? p.columns - column - c : 0;
    four_of(lora.a, lora.a_type, (rank + k) * p.columns + column + c, left, in_fours(lora.a, p.columns, type_bytes(lora.a_type)), values);
    Pack<float, 4> pack = {{values[0], values[1], values[2], values[3]}};
    store<float, 4>(&tiles.a[k][c], pack);
}

LTXK_DEVICE u8 merged_e4m3(const MergeLora& p, i64 row, i64 column, float sum) {
    return to_e4m3(sum, p.stochastic ? counter_bits(p.seed, row * p.columns + column) >> 12 : 1u << 20);
}

// Four e4m3 weights from a column on, the first in the lowest byte, changed.
LTXK_DEVICE u32 merged_four_e4m3(const MergeLora& p, i64 row, i64 column, u32 weights, const float (&delta)[4]) {
    u32 merged = 0;
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
        float sums[2];
        from_e4m3_pair(weights >> 8 * k, sums);
        sums[0] += delta[k];
        sums[1] += delta[k + 1];
        u32 pair;
        if (p.stochastic) {
            pair = merged_e4m3(p, row, column + k, sums[0]);
            pair |= static_cast<u32>(merged_e4m3(p, row, column + k + 1, sums[1])) << 8;
        } else {
            pair = to_e4m3_pair(sums);
        }
        merged |= pair << 8 * k;
    }
    return merged;
}

LTXK_DEVICE void merge_one(const MergeLora& p, i64 row, i64 column, float delta) {
    i64 at = row * p.row_stride + column * p.column_stride;
    if (p.type == kE4M3) {
        u8* address = static_cast<u8*>(p.weight) + at;
        *address = merged_e4m3(p, row, column, from_e4m3(*address) + delta);
    } else {
        float value[1] = {factor_at(p.weight, p.type, at) + delta};
        store_typed(p.weight, p.type, at, value);
    }
}

// Adds to the weights [column, column + 4) of a row, of which `count` exist.
LTXK_DEVICE void merge_four(const MergeLora& p, i64 row, i64 column, i64 count, bool vectors, const float (&delta)[4]) {
    if (vectors && count >= 4) {
        i64 at = row * p.row_stride + column * p.column_stride;
        if (p.type == kE4M3) {
            u32* address = reinterpret_cast<u32*>(static_cast<u8*>(p.weight) + at);
            *address = merged_four_e4m3(p, row, column, *address, delta);
            return;
        }
        float values[4];
        load_typed(p.weight, p.type, at, values);
#pragma unroll
        for (int k = 0; k < 4; ++k) values[k] += delta[k];
        store_typed(p.weight, p.type, at, values);
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
        if (k < count) merge_one(p, row, column + k, delta[k]);
}

// Block = 256 threads on one tile of 64 x 64; a thread owns 4 x 4 neighbouring elements, so that it reads four from either factor at once.
__global__ void __launch_bounds__(256, 3) merge_lora(MergeLora p) {
    LTXK_SHARED(LoraTiles, tiles);
    i64 row = static_cast<i64>(blockIdx.x) / p.column_tiles * kTile, column = static_cast<i64>(blockIdx.x) % p.column_tiles * kTile;
    int x = static_cast<int>(threadIdx.x) % 16 * 4, y = static_cast<int>(threadIdx.x) / 16 * 4;
    float total[4][4] = {};
    for (i64 index = 0; index < p.count; ++index) {
        const LoraFactors& lora = p.lora[index];
        for (i64 rank = 0; rank < lora.rank; rank += kRankStep) {
            __syncthreads();
            load_tiles(p, lora, row, column, rank, tiles);
            __syncthreads();
#pragma unroll 2
            for (int k = 0; k < kRankStep; ++k) {
                Pack<float, 4> b = load<float, 4>(&tiles.b[k][y]), a = load<float, 4>(&tiles.a[k][x]);
#pragma unroll
                for (int i = 0; i < 16; ++i) total[i / 4][i % 4] += b.value[i / 4] * a.value[i % 4];
            }
        }
    }
    i64 bytes = p.type == kE4M3 ? 1 : type_bytes(p.type);
    bool vectors = p.column_stride == 1 && in_fours(p.weight, p.row_stride, bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (row + y + i < p.rows) merge_four(p, row + y + i, column + x, p.columns - column - x, vectors, total[i]);
}

}  // namespace ltxk
