// RMSNorm of queries and keys over all heads together, then rotation by position: q and k in one launch.
#pragma once

#include "ltxkern/rows.cuh"

namespace ltxk {

#include "ltxkern/qk_norm_rope_parameters.cuh"

// Block = one token of q (even) or k (odd): neighbours share the table's lines. V pairs a thread; split layout only for V > 1.
template <int V>
__global__ void __launch_bounds__(256) qk_norm_rope(QkNormRope p) {
    LTXK_SHARED(RowSum, scratch);
    const QkTensor& t = p.tensor[blockIdx.x % 2];
    i64 row = blockIdx.x / 2, batch = row / p.tokens, token = row - batch * p.tokens, width = 2 * p.heads * p.pairs;
    i64 x_row = batch * t.batch_stride + token * t.token_stride;
    float sum = 0.0f;
    for (i64 i = static_cast<i64>(threadIdx.x) * V; i < width; i += static_cast<i64>(blockDim.x) * V) {
        float values[V];
        load_typed(t.x, p.type, x_row + i, values);
#pragma unroll
        for (int k = 0; k < V; ++k) sum += values[k] * values[k];
    }
    float rstd = inverse_rms(sum_row(sum, scratch), width, p.eps);
    i64 table_row = batch * p.table_batch + token * p.table_token;
    for (i64 i = static_cast<i64>(threadIdx.x) * V; i < p.heads * p.pairs; i += static_cast<i64>(blockDim.x) * V) {
        i64 head = i / p.pairs, pair = i - head * p.pairs;
        i64 left = head * 2 * p.pairs + (p.interleaved ? 2 * pair : pair), right = left + (p.interleaved ? 1 : p.pairs);
        i64 table = table_row + head * p.table_head + pair * p.table_pair;
        float first[V], second[V], weight[V], cosine[V], sine[V];
        load_typed(t.x, p.type, x_row + left, first);
        load_typed(t.x, p.type, x_row + right, second);
        load_typed(p.cos, p.table_type, table, cosine);
        load_typed(p.sin, p.table_type, table, sine);
        load_typed(t.weight, t.weight_type, left, weight);
#pragma unroll
        for (int k = 0; k < V; ++k) first[k] *= rstd * weight[k];
        load_typed(t.weight, t.weight_type, right, weight);
#pragma unroll
        for (int k = 0; k < V; ++k) {
            second[k] *= rstd * weight[k];
            float rotated = first[k] * cosine[k] - second[k] * sine[k];
            second[k] = second[k] * cosine[k] + first[k] * sine[k];
            first[k] = rotated;
        }
        store_typed(t.out, p.type, row * width + left, first);
        store_typed(t.out, p.type, row * width + right, second);
    }
}

// What a launch of whole packs adds: strides are counted in packs, `pairs` in packs of half a head, a power of two of at most 32.
struct QkNormRopePacks : QkNormRope {
    i64 by_tokens;         // divides a row by `tokens`
    i64 pairs_log2;
    double inverse_width;  // 1 / elements of a token
};

// The kernel above for split pairs, a token whole in its block's registers: x is read once. Activations and weights are T, tables M.
template <class T, class M>
__global__ void __launch_bounds__(256, 4) qk_norm_rope_packs(QkNormRopePacks p) {
    constexpr int V = kVector<T>, kPairs = kPacks / 2, kPart = kVector<M>;
    LTXK_SHARED(RowSum, scratch);
    const QkTensor& t = p.tensor[blockIdx.x % 2];
    u32 row = blockIdx.x / 2, batch = divide(row, p.by_tokens), token = row - batch * static_cast<u32>(p.tokens);
    u32 half = static_cast<u32>(p.pairs), pack = threadIdx.x / 32 * (32 * kPairs) + threadIdx.x % 32;
    u32 head = pack >> static_cast<u32>(p.pairs_log2), left = pack + head * half, width = blockDim.x * kPacks;
    u32 x_row = batch * static_cast<u32>(t.batch_stride) + token * static_cast<u32>(t.token_stride) + left;
    // 32 packs of pairs on, a thread is at the same place of a later head.
    const char *x_left = pack_address<T, V>(t.x, x_row), *x_right = pack_address<T, V>(t.x, x_row + half);
    Raw<V> first[kPairs], second[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
        first[j] = load_pack<T, V>(x_left, 2 * j);
        second[j] = load_pack<T, V>(x_right, 2 * j);
    }
    u32 table = batch * static_cast<u32>(p.table_batch) + token * static_cast<u32>(p.table_token) +
                head * static_cast<u32>(p.table_head) + (pack & (half - 1));
    u32 table_step = static_cast<u32>(p.table_head) << (5 - static_cast<u32>(p.pairs_log2));
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
            sum += element<T>(first[j], k) * element<T>(first[j], k);
            sum += element<T>(second[j], k) * element<T>(second[j], k);
        }
    }
    sum = sum_short_row(sum, scratch);
    float rstd = inverse_root(sum * static_cast<float>(p.inverse_width) + static_cast<float>(p.eps));
    u32 out = row * width + left;
    char *out_left = pack_address<T, V>(t.out, out), *out_right = pack_address<T, V>(t.out, out + half);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
        const char *cos_at = pack_address<M, V>(p.cos, table + j * table_step), *sin_at = pack_address<M, V>(p.sin, table + j * table_step);
        Raw<V> first_weight = load_pack<T, V>(pack_address<T, V>(t.weight, left), 2 * j);
        Raw<V> second_weight = load_pack<T, V>(pack_address<T, V>(t.weight, left + half), 2 * j);
        float lefts[V], rights[V];
        Raw<V> cosine, sine;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            if (k % kPart == 0) {
                cosine = load_part<V>(cos_at, k / kPart);
                sine = load_part<V>(sin_at, k / kPart);
            }
            float a = element<T>(first[j], k) * (rstd * element<T>(first_weight, k));
            float b = element<T>(second[j], k) * (rstd * element<T>(second_weight, k));
            float c = element<M>(cosine, k % kPart), s = element<M>(sine, k % kPart);
            lefts[k] = a * c - b * s;
            rights[k] = b * c + a * s;
        }
        store_pack<T>(out_left, 2 * j, rounded_pack<T>(lefts));
        store_pack<T>(out_right, 2 * j, rounded_pack<T>(rights));
    }
}

}  // namespace ltxk
