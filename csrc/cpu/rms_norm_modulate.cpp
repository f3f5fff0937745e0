// RMSNorm + modulation of rows on the CPU, alone and behind a gated residual; a row stays in cache between its two passes.
#include <vector>

#include "cpu/rows.h"

LTXK_CPU_BEGIN

// As in include/ltxkern/rms_norm_modulate.cuh, with the number of rows.
struct RmsNormModulate {
    RowOperand x, scale, shift;
    RowOperand y, gate;
    const void* weight;
    i64 weight_type;
    void* summed;
    void* out;
    i64 inner, width;
    double eps;
    i64 rows;
};

// x + y gate rounded to x's dtype, stored and kept in `sum`. The product is exact in fp64, so that the cast alone rounds it.
static void gated_sum(const RmsNormModulate& p, const float* x, const float* y, const float* gate, i64 row, float* sum) {
    for (i64 i = 0; i < p.width; ++i)
        sum[i] = x[i] + static_cast<float>(static_cast<double>(y[i]) * static_cast<double>(gate[i]));
    round_row(sum, p.x.type, p.width);
    store_row(sum, p.summed, p.x.type, row * p.width, p.width);
}

static void rms_norm_modulate(const void* parameters, int threads) {
    const RmsNormModulate& p = *static_cast<const RmsNormModulate*>(parameters);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> memory(static_cast<std::size_t>(7 * p.width));
        float* buffers[7];
        for (i64 k = 0; k < 7; ++k) buffers[k] = memory.data() + k * p.width;
        OperandRows scales(p.scale, p.width, buffers[1]), shifts(p.shift, p.width, buffers[2]), gates(p.gate, p.width, buffers[3]);
        std::vector<float> weights(static_cast<std::size_t>(p.weight ? p.width : 0));
        const float* weight = p.weight ? row_values(p.weight, p.weight_type, 0, p.width, weights.data()) : nullptr;
#pragma omp for schedule(static)
        for (i64 row = 0; row < p.rows; ++row) {
            i64 outer = row / p.inner, inner = row % p.inner;
            const float* x = row_values(p.x.data, p.x.type, p.x.row(outer, inner), p.width, buffers[0]);
            if (p.y.data) {
                const float* y = row_values(p.y.data, p.y.type, p.y.row(outer, inner), p.width, buffers[4]);
                gated_sum(p, x, y, gates.at(outer, inner), row, buffers[5]);
                x = buffers[5];
            }
            float rstd = inverse_rms(x, p.width, p.eps);
            const float* scale = scales.at(outer, inner);
            const float* shift = shifts.at(outer, inner);
            float* result = buffers[6];
            if (weight) {
                for (i64 i = 0; i < p.width; ++i) result[i] = x[i] * rstd * weight[i] * (1.0f + scale[i]) + shift[i];
            } else {
                for (i64 i = 0; i < p.width; ++i) result[i] = x[i] * rstd * (1.0f + scale[i]) + shift[i];
            }
            store_row(result, p.out, p.x.type, row * p.width, p.width);
        }
    }
}

LTXK_CPU_END

LTXK_CPU_KERNEL("rms_norm_modulate", rms_norm_modulate)
