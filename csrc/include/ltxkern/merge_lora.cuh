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

LTXK_DEVICE u8 merged_e4m3(const MergeLora& p, i64 row, i64 column, u8 weight, float delta) {
    u32 noise = p.stochastic ? counter_bits(p.seed, row * p.columns + column) >> 12 : 1u << 20;
    return to_e4m3(from_e4m3(weight) + delta, noise);
}

// Adds to the weights [column, column + 4) of a row, of which `count` exist.
LTXK_DEVICE void merge_four(const MergeLora& p, i64 row, i64 column, i64 count, bool vectors, const float (&delta)[4]) {
    i64 at = row * p.row_stride + column * p.column_stride;
    if (vectors && count >= 4) {
        if (p.type == kE4M3) {
            u8* address = static_cast<u8*>(p.weight) + at;
            Pack<u8, 4> pack = load<u8, 4>(address);
#pragma unroll
            for (int k = 0; k < 4; ++k) pack.value[k] = merged_e4m3(p, row, column + k, pack.value[k], delta[k]);
            store<u8, 4>(address, pack);
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
    for (int k = 0; k < 4; ++k) {
        if (k >= count) continue;
        i64 here = at + k * p.column_stride;
        if (p.type == kE4M3) {
            u8* address = static_cast<u8*>(p.weight) + here;
            *address = merged_e4m3(p, row, column + k, *address, delta[k]);
        } else {
            float value[1] = {factor_at(p.weight, p.type, here) + delta[k]};
            store_typed(p.weight, p.type, here, value);
        }
    }
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
