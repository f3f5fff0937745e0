// Standardisation of noise, and its statistics: fp64, in fixed chunks, at most two launches; one for short slices.
//
// A partial is (mean, M2) of one chunk of one slice; sums run about the chunk's first element: a constant has none at all. Means are
// kept relative to the slice's first element, its origin: of a mean of many deviations one double holds too few digits.
// Partials of a slice are merged in a fixed order at the head of every block that needs them: no atomics.
#pragma once

#include "ltxkern/shifted_sums.cuh"
#include "ltxkern/typed.cuh"

namespace ltxk {

#include "ltxkern/normalize_noise_parameters.cuh"

// What the launches add.
struct NoiseChunks : NormalizeNoise {
    i64 chunk, chunks;       // elements of a chunk, chunks of a slice
    NoisePartial* partials;  // [slice][chunk]
    double* origins;         // [slice]: kept, as the values may be written over while others still need them
    double* flags;           // [block that measures]: 0, or NaN where one of its chunks holds a value that is not finite; may be null
    i64 flag_count;          // 0 where every slice stands for itself
};

LTXK_DEVICE i64 chunk_size(const NoiseChunks& cut, i64 chunk) {
    i64 left = cut.length - chunk * cut.chunk;
    return left < cut.chunk ? left : cut.chunk;
}

LTXK_DEVICE double element(const void* x, i64 type, i64 at) {
    double value[1];
    load_typed(x, type, at, value);
    return value[0];
}

// The threads take V elements each in turn, of `count` from `first` on, in this order; four loads are under way before the first is used.
template <int V, class Use>
LTXK_DEVICE void each_element(const void* x, i64 type, i64 first, i64 count, Use use) {
    constexpr int kBatch = 4;
    i64 i = static_cast<i64>(threadIdx.x) * V, step = static_cast<i64>(blockDim.x) * V;
    for (; i + (kBatch - 1) * step < count; i += kBatch * step) {
        Raw<V> raws[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) raws[b] = load_raw<V>(x, type, first + i + b * step);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            double values[V];
            convert(raws[b], type, values);
            use(values, first + i + b * step);
        }
    }
    for (; i < count; i += step) {
        double values[V];
        load_typed(x, type, first + i, values);
        use(values, first + i);
    }
}

// Moments of one chunk, the mean relative to `origin`.
template <int V>
LTXK_DEVICE NoisePartial chunk_moments(const void* x, i64 type, i64 first, i64 count, double origin, BlockMoments<double>& scratch) {
    double pivot = element(x, type, first);
    ShiftedSums sums;
    each_element<V>(x, type, first, count, [&](double (&values)[V], i64) { sums.add(values, pivot); });
    Moments<double> all = merge_block(sums.moments(pivot - origin), scratch);
    return {all.mean, all.m2};
}

// Blocks take the chunks of all slices in turn.
template <int V>
__global__ void __launch_bounds__(256) noise_measure(NoiseChunks p) {
    LTXK_SHARED(BlockMoments<double>, scratch);
    i64 tasks = p.slices * p.chunks;
    double flag = 0.0;
    for (i64 task = blockIdx.x; task < tasks; task += gridDim.x) {
        i64 chunk = task % p.chunks, slice = task / p.chunks, start = slice * p.length;
        double origin = element(p.x, p.type, start);
        NoisePartial partial = chunk_moments<V>(p.x, p.type, start + chunk * p.chunk, chunk_size(p, chunk), origin, scratch);
        flag += partial.m2 - partial.m2;
        if (threadIdx.x == 0) p.partials[task] = partial;
        if (threadIdx.x == 0 && chunk == 0) p.origins[slice] = origin;
    }
    if (p.flags && threadIdx.x == 0) p.flags[blockIdx.x] = flag;
}

// Mean and M2 of one slice from its partials, about the first one's mean.
LTXK_DEVICE NoisePartial slice_moments(const NoisePartial* partials, const NoiseChunks& cut, BlockSum<double>& scratch) {
    double pivot = partials[0].mean, shifted = 0.0, m2 = 0.0;
    for (i64 i = threadIdx.x; i < cut.chunks; i += blockDim.x) shifted += (partials[i].mean - pivot) * static_cast<double>(chunk_size(cut, i));
    double offset = sum_block(shifted, scratch) / static_cast<double>(cut.length);
    for (i64 i = threadIdx.x; i < cut.chunks; i += blockDim.x) {
        double delta = (partials[i].mean - pivot) - offset;
        m2 += partials[i].m2 + delta * delta * static_cast<double>(chunk_size(cut, i));
    }
    return {pivot + offset, sum_block(m2, scratch)};
}

// Block = one slice.
__global__ void __launch_bounds__(256) noise_statistics(NoiseChunks p) {
    LTXK_SHARED(BlockSum<double>, scratch);
    i64 slice = blockIdx.x;
    NoisePartial all = slice_moments(p.partials + slice * p.chunks, p, scratch);
    if (threadIdx.x != 0) return;
    p.stats[3 * slice] = static_cast<double>(p.length);
    p.stats[3 * slice + 1] = p.origins[slice] + all.mean;
    p.stats[3 * slice + 2] = all.m2;
}

// Block = one chunk, the last ones first: their elements may still lie in the L2 cache.
template <int V>
__global__ void __launch_bounds__(256) noise_apply(NoiseChunks p) {
    LTXK_SHARED(BlockSum<double>, scratch);
    i64 task = static_cast<i64>(gridDim.x) - 1 - blockIdx.x, slice = task / p.chunks, chunk = task % p.chunks;
    NoisePartial all = slice_moments(p.partials + slice * p.chunks, p, scratch);
    double origin = p.origins[slice], factor = 1.0 / square_root(all.m2 / static_cast<double>(p.length - 1)), flag = 0.0;
    for (i64 i = threadIdx.x; i < p.flag_count; i += blockDim.x) flag += p.flags[i];
    if (p.flag_count) factor += sum_block(flag, scratch);
    i64 first = slice * p.length + chunk * p.chunk, count = chunk_size(p, chunk);
    each_element<V>(p.x, p.type, first, count, [&](double (&values)[V], i64 at) {
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] = ((values[k] - origin) - all.mean) * factor;
        store_typed(p.out, p.type, at, values);
    });
}

// Block = one slice, whose at most HELD values a thread stay in registers between their uses.
template <int V, int HELD>
__global__ void __launch_bounds__(512) noise_single(NoiseChunks p) {
    LTXK_SHARED(BlockSum<double>, scratch);
    constexpr int kHeld = HELD / V;
    i64 start = static_cast<i64>(blockIdx.x) * p.length, at = start + threadIdx.x * V;
    u32 length = static_cast<u32>(p.length), first = threadIdx.x * V, step = blockDim.x * V;
    Raw<V> raws[kHeld];
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
        if (first + h * step < length) raws[h] = load_raw<V>(p.x, p.type, at + h * step);
    double origin = element(p.x, p.type, start), values[kHeld][V], sum = 0.0, squares = 0.0;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
        if (first + h * step >= length) continue;
        convert(raws[h], p.type, values[h]);
#pragma unroll
        for (int k = 0; k < V; ++k) sum += values[h][k] -= origin;
    }
    double mean = sum_block(sum, scratch) / static_cast<double>(length);
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
        if (first + h * step >= length) continue;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            values[h][k] -= mean;
            squares += values[h][k] * values[h][k];
        }
    }
    double factor = 1.0 / square_root(sum_block(squares, scratch) / static_cast<double>(length - 1));
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
        if (first + h * step >= length) continue;
#pragma unroll
        for (int k = 0; k < V; ++k) values[h][k] *= factor;
        store_typed(p.out, p.type, at + h * step, values[h]);
    }
}

}  // namespace ltxk
