// RMSNorm + modulation of rows on the CPU, alone and behind a gated residual, once or twice; a row stays in L1 between its passes.
#include <vector>

#include "cpu/rows.h"

LTXK_CPU_BEGIN

#include "ltxkern/rms_norm_modulate_parameters.cuh"

template <class T>
static void modulate_rows(const RmsNormModulate& p, int threads) {
    const T* x = static_cast<const T*>(p.x.data);
    const T* y = static_cast<const T*>(p.y.data);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> memory(static_cast<std::size_t>(6 * p.width));
        float* buffers[6];
        for (i64 k = 0; k < 6; ++k) buffers[k] = memory.data() + k * p.width;
        OperandRows scales(p.scale, p.width, buffers[0]), shifts(p.shift, p.width, buffers[1]), gates(p.gate, p.width, buffers[2]);
        OperandRows scales2(p.scale2, p.width, buffers[4]), shifts2(p.shift2, p.width, buffers[5]);
        const float* weight = p.weight ? row_values(p.weight, p.weight_type, 0, p.width, buffers[3]) : nullptr;
#pragma omp for schedule(static)
        for (i64 row = 0; row < p.rows; ++row) {
            i64 outer = row / p.inner, inner = row % p.inner;
            const T* values = x + p.x.row(outer, inner);
            const T* branch = y ? y + p.y.row(outer, inner) : nullptr;
            p.index.find(outer, inner);
            float rstd;
            if (branch) {
                // x + y gate, rounded to T: what the norm then sees.
                const float* gate = gates.at(outer, inner);
                T* summed = static_cast<T*>(p.summed) + row * p.width;
                rstd = inverse_rms(p.width, p.eps, [&](i64 i, auto n) {
                    store_n(summed + i, load_n(values + i, n) + rounded(load_n(branch + i, n) * load_n(gate + i, n)), n);
                    return load_n(summed + i, n);
                });
                values = summed;
            } else {
                rstd = inverse_rms(p.width, p.eps, [&](i64 i, auto n) { return load_n(values + i, n); });
            }
            auto modulate = [&](const float* scale, const float* shift, void* target) {
                T* out = static_cast<T*>(target) + row * p.width;
                over_registers(p.width, [&](i64 i, auto n) {
                    Floats v = load_n(values + i, n) * rstd;
                    if (weight) v *= load_n(weight + i, n);
                    store_n(out + i, v * (1.0f + load_n(scale + i, n)) + load_n(shift + i, n), n);
                });
            };
            modulate(scales.at(outer, inner), shifts.at(outer, inner), p.out);
            if (p.out2) modulate(scales2.at(outer, inner), shifts2.at(outer, inner), p.out2);
        }
    }
}

static void rms_norm_modulate_rows(const void* parameters, int threads) {
    const RmsNormModulate& p = *static_cast<const RmsNormModulate*>(parameters);
    with_activation(p.x.type, [&](auto kind) { modulate_rows<decltype(kind)>(p, threads); });
}

LTXK_CPU_END

LTXK_CPU_KERNEL("rms_norm_modulate_rows", rms_norm_modulate_rows)
