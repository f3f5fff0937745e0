// Gated residual and per-head attention gate on the CPU: elementwise over rows, in chunks that stay in L1.
#include <cmath>

#include "cpu/rows.h"

LTXK_CPU_BEGIN

// As in include/ltxkern/gated_residual.cuh.
struct GatedResidual {
    RowOperand x, y, gate;
    i64 gate_column;
    void* out;
    i64 rows, inner, width;
};

static void gate_chunk(const GatedResidual& p, i64 row, i64 first, i64 count) {
    alignas(64) float x_buffer[kTypedChunk], y_buffer[kTypedChunk], gate_buffer[kTypedChunk], result[kTypedChunk];
    i64 outer = row / p.inner, inner = row % p.inner, gate_at = p.gate.row(outer, inner);
    const float* x = as_compute(p.x.data, p.x.type, p.x.row(outer, inner) + first, count, x_buffer);
    float one[1];
    if (!p.y.data) {
        float factor = 2.0f / (1.0f + std::exp(-*as_compute(p.gate.data, p.gate.type, gate_at, 1, one)));
        for (i64 i = 0; i < count; ++i) result[i] = x[i] * factor;
    } else {
        const float* y = as_compute(p.y.data, p.y.type, p.y.row(outer, inner) + first, count, y_buffer);
        const float* gate = gate_buffer;
        if (p.gate_column > 1) {
            for (i64 i = 0; i < count; ++i)
                gate_buffer[i] = *as_compute(p.gate.data, p.gate.type, gate_at + (first + i) * p.gate_column, 1, gate_buffer + i);
        } else if (p.gate_column) {
            gate = as_compute(p.gate.data, p.gate.type, gate_at + first, count, gate_buffer);
        } else {
            float value = *as_compute(p.gate.data, p.gate.type, gate_at, 1, one);
            for (i64 i = 0; i < count; ++i) gate_buffer[i] = value;
        }
        // The product is exact in fp64, so that the cast alone rounds it, as in torch.
        for (i64 i = 0; i < count; ++i)
            result[i] = x[i] + static_cast<float>(static_cast<double>(y[i]) * static_cast<double>(gate[i]));
    }
    store_compute(result, p.out, p.x.type, row * p.width + first, count);
}

static void gated_residual(const void* parameters, int threads) {
    const GatedResidual& p = *static_cast<const GatedResidual*>(parameters);
    i64 pieces = (p.width + kTypedChunk - 1) / kTypedChunk;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 task = 0; task < p.rows * pieces; ++task) {
        i64 first = task % pieces * kTypedChunk;
        gate_chunk(p, task / pieces, first, p.width - first < kTypedChunk ? p.width - first : kTypedChunk);
    }
}

LTXK_CPU_END

LTXK_CPU_KERNEL("gated_residual", gated_residual)
