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

}  // namespace ltxk
