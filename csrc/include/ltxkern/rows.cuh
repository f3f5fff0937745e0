// Rows of the transformer: how operands that broadcast to x lie, which row of a table a row of x takes, and sums over a row.
#pragma once

#include "ltxkern/typed.cuh"

namespace ltxk {

// An operand over the rows of x, which collapse to (outer, inner): strides in elements, 0 where it is broadcast.
struct RowOperand {
    const void* data;
    i64 type, outer_stride, inner_stride;

    LTXK_DEVICE i64 row(i64 outer, i64 inner) const { return outer * outer_stride + inner * inner_stride; }
};

// One index per row of x into tables of `count` rows, whose operands have that row as `inner`; data null: the operands are no tables.
struct RowIndex {
    const void* data;
    i64 bytes, count;  // of an index, 4 or 8; of the tables' rows
    i64 outer_stride, inner_stride;

    // Turns the place of a row of x into that of its row in the tables; false where they have no such row.
    LTXK_DEVICE bool find(i64& outer, i64& inner) const {
        if (!data) return true;
        i64 at = outer * outer_stride + inner * inner_stride;
        outer = 0;
        inner = bytes == 8 ? static_cast<const i64*>(data)[at] : static_cast<const int*>(data)[at];
        return static_cast<u64>(inner) < static_cast<u64>(count);
    }
};

// V elements of an operand from a row's start; an operand of column stride 0 gives its one value.
template <int V>
LTXK_DEVICE void load_row(const RowOperand& operand, i64 at, float (&values)[V]) {
    load_typed(operand.data, operand.type, at, values);
}

// What a row without modulation holds: NaN. Nothing outside the tables is read for it, and nobody takes it for a result.
template <int V>
LTXK_DEVICE void store_nan(void* out, i64 type, i64 at) {
    float values[V];
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = bits_to_float(0x7fc00000u);
    store_typed(out, type, at, values);
}

struct RowSum {
    float warp[32];
};

// Sum over the block in a fixed order; every thread gets it.
LTXK_DEVICE float sum_row(float value, RowSum& scratch) {
    for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
    if (blockDim.x == 32) return value;
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch.warp[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = threadIdx.x % 32 < blockDim.x / 32 ? scratch.warp[threadIdx.x % 32] : 0.0f;
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
}

// 1 / sqrt(mean square + eps), with correctly rounded operations.
LTXK_DEVICE float inverse_rms(float sum, i64 width, double eps) {
    float mean = sum / static_cast<float>(width) + static_cast<float>(eps);
#if defined(LTXK_SHIM)
    return 1.0f / sqrtf(mean);
#else
    return __frcp_rn(__fsqrt_rn(mean));
#endif
}

}  // namespace ltxk
