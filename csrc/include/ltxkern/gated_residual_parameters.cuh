// Parameters of the gated residual and the head gate, on every device. Included within a namespace that has i64 and u64.
#pragma once

#include "ltxkern/rows_parameters.cuh"

struct GatedResidual {
    RowOperand x, y, gate;  // y null: the gate is the row's logit, and the result x * 2 sigmoid(logit)
    RowIndex index;         // of the gate's row
    i64 gate_column;        // stride of the gate along a row, 1 for V > 1; 0: one value for the row
    void* out;
    i64 rows, inner, width;
};
