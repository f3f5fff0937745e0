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

// What a launch of whole packs adds: strides of rows and the width are counted in packs.
struct GatedResidualPacks : GatedResidual {
    i64 by_inner, by_share;  // divide a row by `inner`, and a warp by those that share a row
};

// A warp has its share of one row. Activations are T, the gate of stride 1 along a row is M.
template <class T, class M>
__global__ void __launch_bounds__(256, 4) gated_residual_packs(GatedResidualPacks p) {
    constexpr int V = kVector<T>;
    u32 width = static_cast<u32>(p.width), warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    u32 row = divide(warp, p.by_share), column = warp * kWarpPacks - row * width + threadIdx.x % 32;
    if (row >= static_cast<u32>(p.rows)) return;
    u32 outer = divide(row, p.by_inner), inner = row - outer * static_cast<u32>(p.inner);
    const char* x_at = pack_address<T, V>(p.x.data, packed_row(p.x, outer, inner) + column);
    const char* y_at = pack_address<T, V>(p.y.data, packed_row(p.y, outer, inner) + column);
    char* out = pack_address<T, V>(p.out, row * width + column);
    Raw<V> x[kPacks], y[kPacks];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
        x[j] = load_pack<T, V>(x_at, j);
        y[j] = load_pack<T, V>(y_at, j);
    }
    if (!find_row(p.index, outer, inner)) {
#pragma unroll
        for (int j = 0; j < kPacks; ++j) store_pack<T>(out, j, nan_pack<T, V>());
        return;
    }
    const char* gate_at = pack_address<M, V>(p.gate.data, packed_row(p.gate, outer, inner) + column);
    each_gated<T, M>(x, y, gate_at, [&](int j, const Raw<V>& sum) { store_pack<T>(out, j, sum); });
}

// 2 sigmoid(logit) for a result in T: 16 bits do not see what the quick functions lose. They would flush what logits below -87 leave,
// which an x of 1e36 or infinity shows; of its root they have all digits.
template <class T>
LTXK_DEVICE float doubled_sigmoid(float logit) {
    if constexpr (sizeof(T) == 4) return 2.0f / (1.0f + expf(-logit));
    float root = fast_exp2(fabsf(logit) * -0.7213475204444817f), factor = 2.0f * fast_reciprocal(fused(root, root, 1.0f));
    return logit < 0.0f ? root * (root * factor) : factor;
}

// A warp has neighbouring packs of heads that lie row behind row in the result. Activations are T, logits are M.
template <class T, class M>
__global__ void __launch_bounds__(256, 4) head_gate_packs(GatedResidualPacks p) {
    constexpr int V = kVector<T>;
    u32 width = static_cast<u32>(p.width), warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    u32 first = warp * kWarpPacks + threadIdx.x % 32;
    if (first >= static_cast<u32>(p.rows) * width) return;
    char* out = pack_address<T, V>(p.out, first);
    Raw<V> x[kPacks];
    float logit[kPacks];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
        u32 at = first + 32 * j, row = divide(at, p.by_share), outer = divide(row, p.by_inner), inner = row - outer * static_cast<u32>(p.inner);
        x[j] = load_pack<T, V>(pack_address<T, V>(p.x.data, packed_row(p.x, outer, inner) + at - row * width), 0);
        logit[j] = to_float(static_cast<const M*>(p.gate.data)[packed_row(p.gate, outer, inner)]);
    }
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
        float factor = doubled_sigmoid<T>(logit[j]), values[V];
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] = element<T>(x[j], k) * factor;
        store_pack<T>(out, j, rounded_pack<T>(values));
    }
}

}  // namespace ltxk
