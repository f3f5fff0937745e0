// LoRA merge: a tile of the weight is read, changed by the products of up to four LoRAs and written, with no temporary.
//
// fp32 accumulation over all LoRAs and one rounding: nearest, or for e4m3 weights stochastic from a counter. Tensor cores win for
// large ranks; this kernel is for the small ones, where reading and writing the weight is the cost.
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

LTXK_DEVICE float from_e4m3(u8 bits) {
    u32 exponent = bits >> 3 & 15u, mantissa = bits & 7u;
    float magnitude = exponent == 0 ? static_cast<float>(mantissa) * power_of_two(-9)
                                    : static_cast<float>(8 + mantissa) * power_of_two(static_cast<int>(exponent) - 10);
    if ((bits & 0x7f) == 0x7f) magnitude = bits_to_float(0x7fc00000u);
    return bits & 0x80 ? -magnitude : magnitude;
}

// Clamped to the largest finite value, 448. noise: 20 random bits, or 1 << 20 for the nearest value, ties to even.
LTXK_DEVICE u8 to_e4m3(float v, u32 noise) {
    u32 bits = float_to_bits(v), sign = bits >> 24 & 0x80u, magnitude_bits = bits & 0x7fffffffu;
    if (magnitude_bits > 0x7f800000u) return static_cast<u8>(sign | 0x7f);
    float magnitude = bits_to_float(magnitude_bits);
    magnitude = magnitude < 448.0f ? magnitude : 448.0f;
    int exponent = static_cast<int>(float_to_bits(magnitude) >> 23) - 127;
    int step = (exponent < -6 ? -6 : exponent) - 3;
    // In units of 2^-20 of a step: an integer for normal numbers, cut off below that for the smallest.
    u32 units = static_cast<u32>(magnitude * power_of_two(20 - step)), whole;
    if (noise < 1u << 20) {
        whole = (units + noise) >> 20;
    } else {
        float scaled = magnitude * power_of_two(-step);
        whole = static_cast<u32>(scaled);
        float rest = scaled - static_cast<float>(whole);
        if (rest > 0.5f || (rest == 0.5f && (whole & 1u))) ++whole;
    }
    if (whole == 16) {
        whole = 8;
        ++step;
    }
    u32 code = whole < 8 ? whole : static_cast<u32>(step + 10) << 3 | (whole - 8);
    return static_cast<u8>(sign | code);
}

struct LoraTiles {
    float b[kRankStep][kTile + 1];  // [rank][row]; the odd stride keeps the transposing stores off one bank
    float a[kRankStep][kTile];      // [rank][column]
};

LTXK_DEVICE float factor_at(const void* factor, i64 type, i64 at) {
    float value[1];
    load_typed(factor, type, at, value);
    return value[0];
}

// Ranks [rank, rank + kRankStep) of both factors into shared memory, zero outside the matrices.
LTXK_DEVICE void load_tiles(const MergeLora& p, const LoraFactors& lora, i64 row, i64 column, i64 rank, LoraTiles& tiles) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kRankStep; i += static_cast<int>(blockDim.x)) {
        int k = i % kRankStep, r = i / kRankStep;
        bool inside = row + r < p.rows && rank + k < lora.rank;
        tiles.b[k][r] = inside ? factor_at(lora.b, lora.b_type, (row + r) * lora.rank + rank + k) : 0.0f;
        int c = i % kTile;
        k = i / kTile;
        inside = column + c < p.columns && rank + k < lora.rank;
        tiles.a[k][c] = inside ? factor_at(lora.a, lora.a_type, (rank + k) * p.columns + column + c) : 0.0f;
    }
}

LTXK_DEVICE void merge_element(const MergeLora& p, i64 row, i64 column, float delta) {
    if (row >= p.rows || column >= p.columns) return;
    i64 at = row * p.row_stride + column * p.column_stride;
    if (p.type == kE4M3) {
        u8* weight = static_cast<u8*>(p.weight) + at;
        u32 noise = p.stochastic ? counter_bits(p.seed, row * p.columns + column) >> 12 : 1u << 20;
        *weight = to_e4m3(from_e4m3(*weight) + delta, noise);
        return;
    }
    float value[1] = {factor_at(p.weight, p.type, at) + delta};
    store_typed(p.weight, p.type, at, value);
}

// Block = 256 threads on one tile of 64 x 64; a thread owns 4 x 4 elements, 16 apart, so that neighbours write neighbours.
__global__ void __launch_bounds__(256) merge_lora(MergeLora p) {
    LTXK_SHARED(LoraTiles, tiles);
    i64 row = static_cast<i64>(blockIdx.x) / p.column_tiles * kTile, column = static_cast<i64>(blockIdx.x) % p.column_tiles * kTile;
    int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
    float total[4][4] = {};
    for (i64 index = 0; index < p.count; ++index) {
        const LoraFactors& lora = p.lora[index];
        float sums[4][4] = {};
        for (i64 rank = 0; rank < lora.rank; rank += kRankStep) {
            __syncthreads();
            load_tiles(p, lora, row, column, rank, tiles);
            __syncthreads();
#pragma unroll
            for (int k = 0; k < kRankStep; ++k) {
                float b[4], a[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    b[i] = tiles.b[k][y + 16 * i];
                    a[i] = tiles.a[k][x + 16 * i];
                }
#pragma unroll
                for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] += b[i / 4] * a[i % 4];
            }
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) total[i / 4][i % 4] += static_cast<float>(lora.scale) * sums[i / 4][i % 4];
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) merge_element(p, row + y + 16 * (i / 4), column + x + 16 * (i % 4), total[i / 4][i % 4]);
}

}  // namespace ltxk
