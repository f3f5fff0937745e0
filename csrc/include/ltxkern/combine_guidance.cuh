// Guidance on x0 predictions: moments of cond and of the combination per chunk, then rescale and combination in the second launch.
#pragma once

#include "ltxkern/packed.cuh"
#include "ltxkern/shifted_sums.cuh"

namespace ltxk {

#include "ltxkern/combine_guidance_parameters.cuh"

// What the launches add.
struct GuidanceChunks : CombineGuidance {
    GuidancePartial* partials;  // null: no rescale
    i64 chunk, chunks;
    i64 cfg_bits, stg_bits, modality_bits;  // the factors as floats
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

// Four sums over the block; one number of each warp and sum.
struct FourSums {
    double warp[4][8];
    double factor;
};

// In a fixed order; the first warp gets them.
LTXK_DEVICE void sum_four(double (&sums)[4], FourSums& scratch) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] = sum_warp(sums[k]);
    if (lane == 0) {
#pragma unroll
        for (int k = 0; k < 4; ++k) scratch.warp[k][warp] = sums[k];
    }
    __syncthreads();
    if (warp != 0) return;
    double part = lane % 8 < blockDim.x / 32 ? scratch.warp[lane / 8][lane % 8] : 0.0;
    for (int step = 4; step > 0; step >>= 1) part += __shfl_xor_sync(0xffffffffu, part, step);
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] = __shfl_sync(0xffffffffu, part, 8 * k);
}

// Sum of squared deviations from sums about a pivot.
LTXK_DEVICE double squared_deviations(double sum, double squares, double count) {
    double m2 = squares - sum * (sum / count);
    return m2 < 0.0 ? 0.0 : m2;
}

// What the block's first thread makes of sums about the pivots: cond, its squares, the combination, its squares.
LTXK_DEVICE void store_partial(const GuidanceChunks& p, double (&sums)[4], double cond_pivot, double pivot, FourSums& scratch) {
    sum_four(sums, scratch);
    if (threadIdx.x != 0) return;
    i64 left = p.size - blockIdx.x * p.chunk;
    double count = static_cast<double>(left < p.chunk ? left : p.chunk);
    p.partials[blockIdx.x] = {cond_pivot + sums[0] / count, squared_deviations(sums[0], sums[1], count),
                              pivot + sums[2] / count, squared_deviations(sums[2], sums[3], count)};
}

// rescale std(cond) / std(combination) + (1 - rescale), from the partials in a fixed order, about the means of the first.
LTXK_DEVICE double rescale_factor(const GuidanceChunks& p, FourSums& scratch) {
    double cond_pivot = p.partials[0].cond_mean, pivot = p.partials[0].mean, chunk = static_cast<double>(p.chunk), sums[4] = {};
    u32 last = static_cast<u32>(p.chunks) - 1;
    for (u32 i = threadIdx.x; i <= last; i += blockDim.x) {
        GuidancePartial partial = p.partials[i];
        double count = i < last ? chunk : static_cast<double>(p.size - last * p.chunk);
        double cond_delta = partial.cond_mean - cond_pivot, delta = partial.mean - pivot;
        sums[0] += count * cond_delta;
        sums[1] += partial.cond_m2 + count * cond_delta * cond_delta;
        sums[2] += count * delta;
        sums[3] += partial.m2 + count * delta * delta;
    }
    sum_four(sums, scratch);
    if (threadIdx.x == 0) {
        double size = static_cast<double>(p.size), degrees = size - 1.0;
        double cond = square_root(squared_deviations(sums[0], sums[1], size) / degrees);
        scratch.factor = p.rescale * (cond / square_root(squared_deviations(sums[2], sums[3], size) / degrees)) + (1.0 - p.rescale);
    }
    __syncthreads();
    return scratch.factor;
}

// Block = one chunk, here and below.
template <class C, int V>
__global__ void __launch_bounds__(256) guidance_measure(GuidanceChunks p) {
    LTXK_SHARED(FourSums, scratch);
    i64 first = static_cast<i64>(blockIdx.x) * p.chunk, left = p.size - first, count = left < p.chunk ? left : p.chunk;
    C cond_pivot[1], pivot[1], cond[V], total[V];
    combine(p, first, cond_pivot, pivot);
    ShiftedSums cond_sums, of_total;
    for (i64 i = static_cast<i64>(threadIdx.x) * V; i < count; i += static_cast<i64>(blockDim.x) * V) {
        combine(p, first + i, cond, total);
        cond_sums.add(cond, cond_pivot[0]);
        of_total.add(total, pivot[0]);
    }
    double sums[4] = {cond_sums.sum, cond_sums.squares, of_total.sum, of_total.squares};
    store_partial(p, sums, cond_pivot[0], pivot[0], scratch);
}

template <class C, int V>
__global__ void __launch_bounds__(256) guidance_apply(GuidanceChunks p) {
    LTXK_SHARED(FourSums, scratch);
    C factor = p.partials ? static_cast<C>(rescale_factor(p, scratch)) : C(1);
    i64 first = static_cast<i64>(blockIdx.x) * p.chunk, left = p.size - first, count = left < p.chunk ? left : p.chunk;
    for (i64 i = static_cast<i64>(threadIdx.x) * V; i < count; i += static_cast<i64>(blockDim.x) * V) {
        C cond[V], total[V];
        combine(p, first + i, cond, total);
#pragma unroll
        for (int k = 0; k < V; ++k) total[k] *= factor;
        store_typed(p.out, p.type, first + i, total);
    }
}

// A thread's packs of 16 bytes of T, kTogether at a time so that the loads of all branches are under way together. Tensors of whole
// packs, fewer than 2^31, that begin on 16 bytes.
constexpr int kTogether = 2;

template <class T>
struct BranchPacks {
    static constexpr int V = kVector<T>;
    Raw<V> cond, uncond, perturbed, isolated;

    LTXK_DEVICE void load(const GuidanceChunks& b, u32 at) {
        cond = load_pack<T, V>(pack_address<T, V>(b.cond, at), 0);
        if (b.uncond) uncond = load_pack<T, V>(pack_address<T, V>(b.uncond, at), 0);
        if (b.perturbed) perturbed = load_pack<T, V>(pack_address<T, V>(b.perturbed, at), 0);
        if (b.isolated) isolated = load_pack<T, V>(pack_address<T, V>(b.isolated, at), 0);
    }

    static LTXK_DEVICE void add(const Raw<V>& branch, i64 factor, const float (&base)[V], float (&total)[V]) {
#pragma unroll
        for (int k = 0; k < V; ++k) total[k] = fused(float_of(factor), base[k] - element<T>(branch, k), total[k]);
    }

    LTXK_DEVICE void combine(const GuidanceChunks& b, float (&base)[V], float (&total)[V]) const {
#pragma unroll
        for (int k = 0; k < V; ++k) total[k] = base[k] = element<T>(cond, k);
        if (b.uncond) add(uncond, b.cfg_bits, base, total);
        if (b.perturbed) add(perturbed, b.stg_bits, base, total);
        if (b.isolated) add(isolated, b.modality_bits, base, total);
    }
};

// `use` meets each of this thread's packs of the block's chunk.
template <class T, class Use>
LTXK_DEVICE void each_pack(const GuidanceChunks& p, Use use) {
    u32 chunk = static_cast<u32>(p.chunk / kVector<T>), first = blockIdx.x * chunk, left = static_cast<u32>(p.size / kVector<T>) - first;
    u32 end = first + (left < chunk ? left : chunk), at = first + threadIdx.x, step = blockDim.x;
    for (; at < end; at += kTogether * step) {
        BranchPacks<T> packs[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
            if (at + j * step < end) packs[j].load(p, at + j * step);
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
            if (at + j * step < end) use(packs[j], at + j * step);
    }
}

// The power of two at which fp32 has the digits of a sum of squares: 1 but for the smallest and the largest.
LTXK_DEVICE float unit_of(float squares) { return squares < 0x1p-90f ? 0x1p100f : squares < 0x1p126f ? 1.0f : 0x1p-80f; }

// A thread sums in fp32 about its own first element, which lies within the root of its count of deviations from their mean; the
// roundings of 131072 threads mean nothing to the sums of all, which are fp64. Sums that 1 is no unit of it takes once more.
template <class T>
__global__ void __launch_bounds__(256, 4) guidance_measure_packs(GuidanceChunks p) {
    LTXK_SHARED(FourSums, scratch);
    struct Pivots {
        float cond, total;
    };
    LTXK_SHARED(Pivots, pivots);
    constexpr int V = kVector<T>;
    float sum[4], unit[2] = {1.0f, 1.0f};
    u32 count;
    Pivots own = {0.0f, 0.0f};
    bool again = false;
    do {
        if (again) unit[0] = unit_of(sum[1]), unit[1] = unit_of(sum[3]);
        count = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[k] = 0.0f;
        each_pack<T>(p, [&](const BranchPacks<T>& pack, u32) {
            float cond[V], total[V];
            pack.combine(p, cond, total);
            if (count == 0) own = {cond[0], total[0]};
#pragma unroll
            for (int k = 0; k < V; ++k) {
                float cond_delta = (cond[k] - own.cond) * unit[0], delta = (total[k] - own.total) * unit[1];
                sum[0] += cond_delta;
                sum[1] = fused(cond_delta, cond_delta, sum[1]);
                sum[2] += delta;
                sum[3] = fused(delta, delta, sum[3]);
            }
            count += V;
        });
        again = !again && count > 0 && (unit_of(sum[1]) != 1.0f || unit_of(sum[3]) != 1.0f);
    } while (again);
    if (threadIdx.x == 0) pivots = own;
    __syncthreads();
    double apart[2] = {static_cast<double>(own.cond) - pivots.cond, static_cast<double>(own.total) - pivots.total}, sums[4];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        double back = unit[k] > 1.0f ? 0x1p-100 : unit[k] < 1.0f ? 0x1p80 : 1.0;
        double sum_here = sum[2 * k] * back, moved = static_cast<double>(count) * apart[k];
        sums[2 * k] = sum_here + moved;
        sums[2 * k + 1] = sum[2 * k + 1] * back * back + apart[k] * (sum_here + sums[2 * k]);
    }
    store_partial(p, sums, pivots.cond, pivots.total, scratch);
}

template <class T>
__global__ void __launch_bounds__(256, 4) guidance_apply_packs(GuidanceChunks p) {
    LTXK_SHARED(FourSums, scratch);
    constexpr int V = kVector<T>;
    float factor = p.partials ? static_cast<float>(rescale_factor(p, scratch)) : 1.0f;
    each_pack<T>(p, [&](const BranchPacks<T>& pack, u32 at) {
        float cond[V], total[V];
        pack.combine(p, cond, total);
#pragma unroll
        for (int k = 0; k < V; ++k) total[k] *= factor;
        store_pack<T>(pack_address<T, V>(p.out, at), 0, rounded_pack<T>(total));
    });
}

}  // namespace ltxk
