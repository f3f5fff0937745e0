// Gated residual and per-head attention gate on the CPU: elementwise over rows, in chunks that stay in L1.
#include <algorithm>
#include <cmath>

#include "cpu/rows.h"

LTXK_CPU_BEGIN

#include "ltxkern/gated_residual_parameters.cuh"

// Elements [first, first + count) of a row.
template <class T>
static void gate_chunk(const GatedResidual& p, i64 row, i64 first, i64 count) {
    i64 outer = row / p.inner, inner = row % p.inner;
    const T* x = static_cast<const T*>(p.x.data) + p.x.row(outer, inner) + first;
    const T* y = p.y.data ? static_cast<const T*>(p.y.data) + p.y.row(outer, inner) + first : nullptr;
    p.index.find(outer, inner);
    i64 gate_at = p.gate.row(outer, inner);
    T* out = static_cast<T*>(p.out) + row * p.width + first;
    alignas(64) float buffer[kTypedChunk];
    if (!y) {
        float factor = 2.0f / (1.0f + std::exp(-*as_compute(p.gate.data, p.gate.type, gate_at, 1, buffer)));
        over_registers(count, [&](i64 i, auto n) { store_n(out + i, load_n(x + i, n) * factor, n); });
        return;
    }
    const float* gate = buffer;
    if (p.gate_column == 1) {
        gate = as_compute(p.gate.data, p.gate.type, gate_at + first, count, buffer);
    } else {
        float one[1];
        for (i64 i = 0; i < (p.gate_column ? count : 1); ++i)
            buffer[i] = *as_compute(p.gate.data, p.gate.type, gate_at + (first + i) * p.gate_column, 1, one);
        if (!p.gate_column) std::fill_n(buffer + 1, count - 1, buffer[0]);
    }
    over_registers(count, [&](i64 i, auto n) {
        store_n(out + i, load_n(x + i, n) + rounded(load_n(y + i, n) * load_n(gate + i, n)), n);
    });
}

static void gated_residual_rows(const void* parameters, int threads) {
    const GatedResidual& p = *static_cast<const GatedResidual*>(parameters);
    i64 pieces = (p.width + kTypedChunk - 1) / kTypedChunk;
    with_activation(p.x.type, [&](auto kind) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (i64 task = 0; task < p.rows * pieces; ++task) {
            i64 first = task % pieces * kTypedChunk;
            gate_chunk<decltype(kind)>(p, task / pieces, first, p.width - first < kTypedChunk ? p.width - first : kTypedChunk);
        }
    });
}

LTXK_CPU_END

LTXK_CPU_KERNEL("gated_residual_rows", gated_residual_rows)
