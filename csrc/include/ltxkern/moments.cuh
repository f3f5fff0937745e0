// Count, mean and sum of squared deviations, merged by Chan's rule: stable where E[x^2] - E[x]^2 is not.
#pragma once

#include "ltxkern/types.cuh"

namespace ltxk {

template <class F>
struct Moments {
    F count = 0, mean = 0, m2 = 0;

    // Chan, Golub, LeVeque 1979; an empty side changes nothing.
    LTXK_DEVICE void merge(F other_count, F other_mean, F other_m2) {
        if (other_count == F(0)) return;
        F total = count + other_count;
        F delta = other_mean - mean;
        F share = other_count * fast_reciprocal(total);
        mean += delta * share;
        m2 += other_m2 + delta * delta * count * share;
        count = total;
    }
    LTXK_DEVICE void merge(const Moments& other) { merge(other.count, other.mean, other.m2); }
};

template <class F>
LTXK_DEVICE Moments<F> shuffle_xor(const Moments<F>& value, int lane_mask) {
    Moments<F> other;
    other.count = __shfl_xor_sync(0xffffffffu, value.count, lane_mask);
    other.mean = __shfl_xor_sync(0xffffffffu, value.mean, lane_mask);
    other.m2 = __shfl_xor_sync(0xffffffffu, value.m2, lane_mask);
    return other;
}

// Moments of the whole warp, in a fixed order; every lane gets them.
template <class F>
LTXK_DEVICE void merge_warp(Moments<F>& value) {
    for (int step = 16; step > 0; step >>= 1) {
        Moments<F> other = shuffle_xor(value, step);
        // The lower lane merges the upper into itself on both sides, so that both hold the same bits.
        bool upper = (threadIdx.x & step) != 0;
        Moments<F> low = upper ? other : value;
        low.merge(upper ? value : other);
        value = low;
    }
}

template <class F>
struct BlockMoments {
    Moments<F> warp[32];
};

// Moments of the whole block (blockDim.x a multiple of 32), in a fixed order; every thread gets them.
template <class F>
LTXK_DEVICE Moments<F> merge_block(Moments<F> value, BlockMoments<F>& scratch) {
    merge_warp(value);
    int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (lane == 0) scratch.warp[warp] = value;
    __syncthreads();
    Moments<F> mine;
    if (lane < warps) mine = scratch.warp[lane];
    merge_warp(mine);
    return mine;
}

template <class F>
struct BlockSum {
    F warp[32];
};

// Sum over the block in a fixed order; every thread gets it.
template <class F>
LTXK_DEVICE F sum_block(F value, BlockSum<F>& scratch) {
    for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch.warp[threadIdx.x / 32] = value;
    __syncthreads();
    F sum = threadIdx.x % 32 < blockDim.x / 32 ? scratch.warp[threadIdx.x % 32] : F(0);
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
}

}  // namespace ltxk
