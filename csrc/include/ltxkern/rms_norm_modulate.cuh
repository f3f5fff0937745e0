// RMSNorm + modulation of rows, alone and behind a gated residual. The second look at a row comes from the L1 cache.
#pragma once

#include "ltxkern/rows.cuh"

namespace ltxk {

#include "ltxkern/rms_norm_modulate_parameters.cuh"

// x + y gate, rounded to x's dtype: what is stored is what is normalised.
template <int V>
LTXK_DEVICE void gated_sum(const RmsNormModulate& p, i64 x_row, i64 y_row, i64 gate_row, i64 column, float (&values)[V]) {
    Raw<V> raw_x = load_raw<V>(p.x.data, p.x.type, x_row + column), raw_y = load_raw<V>(p.y.data, p.y.type, y_row + column);
    Raw<V> raw_gate = load_raw<V>(p.gate.data, p.gate.type, gate_row + column);
    float y[V], gate[V];
    convert(raw_x, p.x.type, values);
    convert(raw_y, p.y.type, y);
    convert(raw_gate, p.gate.type, gate);
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = round_through(values[k] + product(y[k], gate[k]), p.x.type);
}

// Block = one row; a thread meets the same columns in both passes, so it reads back only what it wrote itself.
template <int V>
__global__ void __launch_bounds__(256) rms_norm_modulate_rows(RmsNormModulate p) {
    LTXK_SHARED(RowSum, scratch);
    i64 row = blockIdx.x, outer = row / p.inner, inner = row - outer * p.inner, dense = row * p.width;
    i64 x_row = p.x.row(outer, inner), step = static_cast<i64>(blockDim.x) * V, start = static_cast<i64>(threadIdx.x) * V;
    bool gated = p.y.data != nullptr;
    i64 y_row = gated ? p.y.row(outer, inner) : 0;
    if (!p.index.find(outer, inner)) {
        for (i64 column = start; column < p.width; column += step) {
            if (gated) store_nan<V>(p.summed, p.x.type, dense + column);
            store_nan<V>(p.out, p.x.type, dense + column);
        }
        return;
    }
    float sum = 0.0f;
    for (i64 column = start; column < p.width; column += step) {
        float values[V];
        if (gated) {
            gated_sum(p, x_row, y_row, p.gate.row(outer, inner), column, values);
            store_typed(p.summed, p.x.type, dense + column, values);
        } else {
            load_row(p.x, x_row + column, values);
        }
#pragma unroll
        for (int k = 0; k < V; ++k) sum += values[k] * values[k];
    }
    float rstd = inverse_rms(sum_row(sum, scratch), p.width, p.eps);
    i64 scale_row = p.scale.row(outer, inner), shift_row = p.shift.row(outer, inner);
    for (i64 column = start; column < p.width; column += step) {
        Raw<V> raw = gated ? load_raw<V>(p.summed, p.x.type, dense + column) : load_raw<V>(p.x.data, p.x.type, x_row + column);
        Raw<V> raw_scale = load_raw<V>(p.scale.data, p.scale.type, scale_row + column);
        Raw<V> raw_shift = load_raw<V>(p.shift.data, p.shift.type, shift_row + column);
        float values[V], scale[V], shift[V];
        convert(raw, p.x.type, values);
        convert(raw_scale, p.scale.type, scale);
        convert(raw_shift, p.shift.type, shift);
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] *= rstd;
        if (p.weight) {
            float weight[V];
            load_typed(p.weight, p.weight_type, column, weight);
#pragma unroll
            for (int k = 0; k < V; ++k) values[k] *= weight[k];
        }
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] = values[k] * (1.0f + scale[k]) + shift[k];
        store_typed(p.out, p.x.type, dense + column, values);
    }
}

}  // namespace ltxk
