// Rows of the transformer: how operands that broadcast to x lie, which row of a table a row of x takes, and sums over a row.
#pragma once

#include "ltxkern/packed.cuh"

namespace ltxk {

#include "ltxkern/rows_parameters.cuh"

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
    for (int k = 0; k < V; ++k) values[k] = not_a_number();
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

// The same for blocks of at most 8 warps that have no other sum.
LTXK_DEVICE float sum_short_row(float value, RowSum& scratch) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
    // All lanes have the same: a condition, here and where they read, costs more than it saves.
    scratch.warp[threadIdx.x / 32] = value;
    __syncthreads();
    u32 warp = threadIdx.x % 8;
    float found = scratch.warp[warp], sum = warp < blockDim.x / 32 ? found : 0.0f;
#pragma unroll
    for (int step = 4; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
}

// Where a row of an operand begins whose strides are counted in packs.
LTXK_DEVICE u32 packed_row(const RowOperand& operand, u32 outer, u32 inner) {
    return outer * static_cast<u32>(operand.outer_stride) + inner * static_cast<u32>(operand.inner_stride);
}

// Packs of a modulation in M under way together beside activations in T: as many bytes for every pair of dtypes.
template <class T, class M>
constexpr int kAtOnce = kPacks * sizeof(T) / sizeof(M);

// x + y gate of a thread's packs, rounded to T, one after another; `use` may put a sum in the place of its x.
template <class T, class M, int V, class Use>
LTXK_DEVICE void each_gated(const Raw<V> (&x)[kPacks], const Raw<V> (&y)[kPacks], const char* gate_at, Use use) {
    Raw<V> gate[kPacks];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
        if (j % kAtOnce<T, M> == 0) {
#pragma unroll
            for (int next = j; next < j + kAtOnce<T, M>; ++next) gate[next] = load_pack<M, V>(gate_at, next);
        }
        float values[V];
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] = element<T>(x[j], k) + product(element<T>(y[j], k), element<M>(gate[j], k));
        use(j, rounded_pack<T>(values));
    }
}

// Whether there is an index. Two numbers say so: asked for its bytes, nvcc spills on sm_100; for its address, it needs more elsewhere.
LTXK_DEVICE bool indexed(const RowIndex& index) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 10
    return index.data != nullptr;
#else
    return static_cast<u32>(index.bytes) != 0;
#endif
}

// RowIndex::find in 32-bit numbers.
LTXK_DEVICE bool find_row(const RowIndex& index, u32& outer, u32& inner) {
    if (!indexed(index)) return true;
    u32 at = outer * static_cast<u32>(index.outer_stride) + inner * static_cast<u32>(index.inner_stride);
    i64 row = static_cast<u32>(index.bytes) == 8 ? static_cast<const i64*>(index.data)[at] : static_cast<const int*>(index.data)[at];
    outer = 0;
    inner = static_cast<u32>(row);
    return static_cast<u64>(row) < static_cast<u64>(index.count);
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
