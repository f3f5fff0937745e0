// Parameters of rms_norm_modulate and its gated form, on every device. Included within a namespace that has i64 and u64.
#pragma once

#include "ltxkern/rows_parameters.cuh"

struct RmsNormModulate {
    RowOperand x, y;                // y null: no residual
    RowOperand scale, shift, gate;  // gate null with y
    RowOperand scale2, shift2;      // of the second modulation, with out2
    RowIndex index;                 // of the row of scale, shift and gate
    const void* weight;             // null: parameter-free
    i64 weight_type;
    void* summed;
    void* out;
    void* out2;  // null: one modulation
    i64 rows, inner, width;
    double eps;
};
