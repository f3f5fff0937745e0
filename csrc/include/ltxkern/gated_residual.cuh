// Gated residual and per-head attention gate: elementwise over rows.
#pragma once

#include "ltxkern/rows.cuh"

namespace ltxk {

#include "ltxkern/gated_residual_parameters.cuh"

// What a launch adds: how blocks share the rows.
struct GatedResidualTiles : GatedResidual {
    i64 row_threads;  // threads that share a row
    i64 tiles;        // blocks side by side along a row
};

template <int V>
__global__ void __launch_bounds__(256) gated_residual_rows(GatedResidualTiles p) {
    u32 row_threads = static_cast<u32>(p.row_threads);
    i64 group = blockIdx.x / p.tiles, tile = blockIdx.x - group * p.tiles;
    i64 row = group * (blockDim.x / row_threads) + threadIdx.x / row_threads;
    i64 column = (tile * row_threads + threadIdx.x % row_threads) * V;
    if (row >= p.rows || column >= p.width) return;
    i64 outer = row / p.inner, inner = row - outer * p.inner;
    Raw<V> raw_x = load_raw<V>(p.x.data, p.x.type, p.x.row(outer, inner) + column), raw_y, raw_gate;
    if (p.y.data) raw_y = load_raw<V>(p.y.data, p.y.type, p.y.row(outer, inner) + column);
    if (!p.index.find(outer, inner)) return store_nan<V>(p.out, p.x.type, row * p.width + column);
    i64 gate_at = p.gate.row(outer, inner);
    float x[V], y[V], gate[V];
    if (p.gate_column) {
        raw_gate = load_raw<V>(p.gate.data, p.gate.type, gate_at + column * p.gate_column);
        convert(raw_gate, p.gate.type, gate);
    } else {
        float one[1];
        load_typed(p.gate.data, p.gate.type, gate_at, one);
#pragma unroll
        for (int k = 0; k < V; ++k) gate[k] = one[0];
    }
    convert(raw_x, p.x.type, x);
    if (p.y.data) {
        convert(raw_y, p.y.type, y);
#pragma unroll
        for (int k = 0; k < V; ++k) x[k] += product(y[k], gate[k]);
    } else {
        float factor = 2.0f / (1.0f + expf(-gate[0]));
#pragma unroll
        for (int k = 0; k < V; ++k) x[k] *= factor;
    }
    store_typed(p.out, p.x.type, row * p.width + column, x);
}

}  // namespace ltxk
