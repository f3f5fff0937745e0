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

struct Pair {
    float high, low;
};

// a + b without a loss (Knuth).
LTXK_DEVICE Pair exact_sum(float a, float b) {
    float sum = a + b, taken = sum - a;
    return {sum, (a - (sum - taken)) + (b - taken)};
}

// Moments in fp32 whose mean is mean + low: what one float lacks of a mean far from zero.
struct alignas(16) PairMoments {
    float count = 0.0f, mean = 0.0f, low = 0.0f, m2 = 0.0f;

    // WIDE: the low part is kept. For values of 16 bits, whose means are not that far from zero, it is not needed.
    template <bool WIDE>
    LTXK_DEVICE void merge(float other_count, float other_mean, float other_low, float other_m2) {
        if (count == 0.0f) {
            count = other_count, mean = other_mean, low = other_low, m2 = other_m2;
            return;
        }
        float total = count + other_count, share = other_count * fast_reciprocal(total);
        float delta = other_mean - mean;
        if constexpr (WIDE) delta += other_low - low;
        m2 += other_m2 + delta * delta * (count * share);
        count = total;
        if constexpr (WIDE) {
            Pair sum = exact_sum(mean, fused(delta, share, low));
            mean = sum.high;
            low = sum.low;
        } else {
            mean = fused(delta, share, mean);
        }
    }

    // COUNT values held in registers, in two passes about their own mean: no value far away costs the others digits. WIDE: `shift` is
    // added to each.
    template <bool WIDE, int COUNT>
    LTXK_DEVICE void add(const float (&values)[COUNT], float shift = 0.0f) {
        float sum = 0.0f, squared = 0.0f, rest = 0.0f;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sum += values[i];
        float centre = sum * (1.0f / COUNT);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float d = values[i] - centre;
            if constexpr (WIDE) rest += d;
            squared = fused(d, d, squared);
        }
        if constexpr (WIDE) {
            squared = fused(rest * (-1.0f / COUNT), rest, squared);
            Pair shifted = exact_sum(centre, shift);
            centre = shifted.high;
            rest = fused(rest, 1.0f / COUNT, shifted.low);
        }
        merge<WIDE>(COUNT, centre, rest, squared);
    }
};

template <class F>
LTXK_DEVICE F sum_warp(F value) {
    for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

// Moments of the whole warp, in a fixed order; every lane gets the same bits. About the mean of lane 0 first, then about that of all:
// it may lie far away. Equal means merge to themselves exactly. WIDE as above.
template <bool WIDE = true>
LTXK_DEVICE PairMoments merge_warp(const PairMoments& lane) {
    PairMoments all;
    all.count = sum_warp(lane.count);
    float share = all.count > 0.0f ? lane.count * fast_reciprocal(all.count) : 0.0f, pivot = __shfl_sync(0xffffffffu, lane.mean, 0);
    float apart = lane.mean - pivot;
    if constexpr (WIDE) apart += lane.low;
    all.mean = pivot + sum_warp(apart * share);
    float offset = lane.mean - all.mean;
    if constexpr (WIDE) {
        offset += lane.low;
        all.low = sum_warp(offset * share);
    }
    all.m2 = sum_warp(fused(offset * offset, lane.count, lane.m2));
    return all;
}

LTXK_DEVICE float inverse_deviation(const PairMoments& all, float eps) {
    float variance = all.m2 * fast_reciprocal(all.count);
    return inverse_root((variance < 0.0f ? 0.0f : variance) + eps);
}

struct WarpMoments {
    PairMoments warp[32];
};

// The moments of the warp whose number is the thread's lane, by way of shared memory. WIDE: as above.
template <bool WIDE = true>
LTXK_DEVICE PairMoments of_warps(const PairMoments& value, WarpMoments& scratch) {
    PairMoments mine = merge_warp<WIDE>(value), other;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (lane == 0) scratch.warp[warp] = mine;
    __syncthreads();
    if (lane < blockDim.x / 32) other = scratch.warp[lane];
    return other;
}

// Moments of the whole block (blockDim.x a multiple of 32), in a fixed order; every thread gets them.
LTXK_DEVICE PairMoments merge_block(const PairMoments& value, WarpMoments& scratch) { return merge_warp(of_warps(value, scratch)); }

// The same, but the first warp alone gets them, and the others are spared the work.
template <bool WIDE>
LTXK_DEVICE PairMoments merge_to_first_warp(const PairMoments& value, WarpMoments& scratch) {
    PairMoments other = of_warps<WIDE>(value, scratch);
    return threadIdx.x < 32 ? merge_warp(other) : other;
}

template <class F>
struct BlockSum {
    F warp[32];
};

// Sum over the block in a fixed order; every thread gets it.
template <class F>
LTXK_DEVICE F sum_block(F value, BlockSum<F>& scratch) {
    value = sum_warp(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch.warp[threadIdx.x / 32] = value;
    __syncthreads();
    return sum_warp(threadIdx.x % 32 < blockDim.x / 32 ? scratch.warp[threadIdx.x % 32] : F(0));
}

}  // namespace ltxk
