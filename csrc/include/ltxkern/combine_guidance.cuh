// Guidance on x0 predictions: moments of cond and of the combination per chunk, then rescale and combination in the second launch.
#pragma once

#include "ltxkern/shifted_sums.cuh"
#include "ltxkern/typed.cuh"

namespace ltxk {

#include "ltxkern/combine_guidance_parameters.cuh"

// What the launches add.
struct GuidanceChunks : CombineGuidance {
    GuidancePartial* partials;  // null: no rescale
    i64 chunk, chunks;
};

template <class C, int V>
LTXK_DEVICE void add_branch(const Raw<V>& raw, i64 type, double factor, const C (&cond)[V], C (&total)[V]) {
    C branch[V];
    convert(raw, type, branch);
#pragma unroll
    for (int k = 0; k < V; ++k) total[k] += static_cast<C>(factor) * (cond[k] - branch[k]);
}

template <class C, int V>
LTXK_DEVICE void combine(const CombineGuidance& b, i64 i, C (&cond)[V], C (&total)[V]) {
    Raw<V> raw = load_raw<V>(b.cond, b.type, i), first, second, third;
    if (b.uncond) first = load_raw<V>(b.uncond, b.type, i);
    if (b.perturbed) second = load_raw<V>(b.perturbed, b.type, i);
    if (b.isolated) third = load_raw<V>(b.isolated, b.type, i);
    convert(raw, b.type, cond);
#pragma unroll
    for (int k = 0; k < V; ++k) total[k] = cond[k];
    if (b.uncond) add_branch(first, b.type, b.cfg, cond, total);
    if (b.perturbed) add_branch(second, b.type, b.stg, cond, total);
    if (b.isolated) add_branch(third, b.type, b.modality, cond, total);
}

// Block = one chunk.
template <class C, int V>
__global__ void __launch_bounds__(256) guidance_measure(GuidanceChunks p) {
    LTXK_SHARED(BlockMoments<double>, scratch);
    i64 first = static_cast<i64>(blockIdx.x) * p.chunk, left = p.size - first, count = left < p.chunk ? left : p.chunk;
    C cond_pivot[1], pivot[1], cond[V], total[V];
    combine(p, first, cond_pivot, pivot);
    ShiftedSums cond_sums, sums;
    for (i64 i = static_cast<i64>(threadIdx.x) * V; i < count; i += static_cast<i64>(blockDim.x) * V) {
        combine(p, first + i, cond, total);
        cond_sums.add(cond, cond_pivot[0]);
        sums.add(total, pivot[0]);
    }
    Moments<double> of_cond = merge_block(cond_sums.moments(cond_pivot[0]), scratch);
    Moments<double> of_total = merge_block(sums.moments(pivot[0]), scratch);
    if (threadIdx.x == 0) p.partials[blockIdx.x] = {of_cond.mean, of_cond.m2, of_total.mean, of_total.m2};
}

// std(cond) / std(combination), from the partials in a fixed order.
LTXK_DEVICE double deviation_ratio(const GuidanceChunks& p, BlockMoments<double>& scratch) {
    Moments<double> cond, total;
    for (i64 i = threadIdx.x; i < p.chunks; i += blockDim.x) {
        i64 left = p.size - i * p.chunk;
        double count = static_cast<double>(left < p.chunk ? left : p.chunk);
        const GuidancePartial& partial = p.partials[i];
        cond.merge(count, partial.cond_mean, partial.cond_m2);
        total.merge(count, partial.mean, partial.m2);
    }
    double degrees = static_cast<double>(p.size - 1);
    cond = merge_block(cond, scratch);
    total = merge_block(total, scratch);
    return square_root(cond.m2 / degrees) / square_root(total.m2 / degrees);
}

template <class C, int V>
__global__ void __launch_bounds__(256) guidance_apply(GuidanceChunks p) {
    LTXK_SHARED(BlockMoments<double>, scratch);
    C factor = 1;
    if (p.partials) factor = static_cast<C>(p.rescale * deviation_ratio(p, scratch) + (1.0 - p.rescale));
    i64 first = static_cast<i64>(blockIdx.x) * p.chunk, left = p.size - first, count = left < p.chunk ? left : p.chunk;
    for (i64 i = static_cast<i64>(threadIdx.x) * V; i < count; i += static_cast<i64>(blockDim.x) * V) {
        C cond[V], total[V];
        combine(p, first + i, cond, total);
        if (p.partials) {
#pragma unroll
            for (int k = 0; k < V; ++k) total[k] *= factor;
        }
        store_typed(p.out, p.type, first + i, total);
    }
}

}  // namespace ltxk
