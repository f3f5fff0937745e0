// GroupNorm + SiLU in two passes over the activation: statistics per tile, then normalise, scale, add, SiLU.
//
// A partial is the (mean, M2) of one channel over one chunk of positions, of known count; conv_bias shifts its mean, so the
// convolution's bias costs nothing. Partials of a group are merged in a fixed order, at the head of the apply pass where they are
// few, by a finalise kernel where they are many: no atomics, nothing to reset between replays of a graph.
#pragma once

#include "ltxkern/moments.cuh"
#include "ltxkern/types.cuh"

namespace ltxk {

// One partial, of 8 bytes.
struct alignas(8) Partial {
    float mean, m2;
};

#include "ltxkern/group_norm_silu_parameters.cuh"

// What the launches of two passes add.
struct GroupNormTwoPass : GroupNormSilu {
    Partial* partials;  // [n][channel][chunk]
    Partial* finals;    // [n][group]: mean and 1 / sqrt(var + eps); null: each block merges the partials itself
    i64 chunk;          // positions per partial
    i64 chunks;         // partials per channel: ceil(positions / chunk)
    i64 lanes, rows;    // channels-last: threads of a block along the channels, the others take further positions
};

// What one channel does to its elements: silu((v - mean) * scale + offset + residual).
struct ChannelAffine {
    float mean, scale, offset;

    LTXK_DEVICE float apply(float v, float residual) const { return silu((v - mean) * scale + offset + residual); }
};

LTXK_DEVICE float inverse_deviation(float variance, float eps) { return fast_rsqrt(variance + eps); }

// The shift goes into the mean: (v + conv_bias) - mean = v - (mean - conv_bias).
LTXK_DEVICE ChannelAffine channel_affine(const GroupNormSilu& p, i64 channel, float mean, float rstd) {
    ChannelAffine affine;
    affine.mean = mean - load_param(p.conv_bias, p.conv_bias_type, channel, 0.0f);
    affine.scale = load_param(p.weight, p.weight_type, channel, 1.0f) * rstd;
    affine.offset = load_param(p.bias, p.bias_type, channel, 0.0f);
    return affine;
}

// Mean and M2 of COUNT values held in registers, in two passes.
template <int COUNT>
LTXK_DEVICE void merge_values(Moments<float>& moments, const float (&values)[COUNT]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum += values[i];
    float mean = sum * (1.0f / COUNT), m2 = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) m2 += (values[i] - mean) * (values[i] - mean);
    moments.merge(COUNT, mean, m2);
}

// An interval of elements split into a 16-byte aligned body and its two ragged ends.
struct Span {
    i64 begin, body_begin, body_end, end;

    LTXK_DEVICE Span(i64 first, i64 last, int vector) : begin(first), end(last) {
        body_begin = (first + vector - 1) / vector * vector;
        body_end = last / vector * vector;
        if (body_begin >= body_end) body_begin = body_end = last;
    }
    LTXK_DEVICE i64 ragged() const { return (body_begin - begin) + (end - body_end); }
    LTXK_DEVICE i64 ragged_index(i64 i) const {
        i64 head = body_begin - begin;
        return i < head ? begin + i : body_end + (i - head);
    }
};

// Moments of elements [span.begin, span.end) as seen by this thread.
template <class T, int V>
LTXK_DEVICE Moments<float> thread_moments(const T* x, const Span& span) {
    constexpr int kBatch = 4;
    Moments<float> moments;
    i64 step = static_cast<i64>(blockDim.x) * V, i = span.body_begin + static_cast<i64>(threadIdx.x) * V;
    for (; i + (kBatch - 1) * step < span.body_end; i += kBatch * step) {
        Pack<T, V> packs[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) packs[b] = load<T, V>(x + i + b * step);
        float values[kBatch * V];
#pragma unroll
        for (int k = 0; k < kBatch * V; ++k) values[k] = to_float(packs[k / V].value[k % V]);
        merge_values(moments, values);
    }
    for (; i < span.body_end; i += step) {
        Pack<T, V> pack = load<T, V>(x + i);
        float values[V];
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] = to_float(pack.value[k]);
        merge_values(moments, values);
    }
    for (i64 k = threadIdx.x; k < span.ragged(); k += blockDim.x) moments.merge(1.0f, to_float(x[span.ragged_index(k)]), 0.0f);
    return moments;
}

// Contiguous layout; block = one chunk of one channel of one sample.
template <class T, int V>
__global__ void __launch_bounds__(256) group_norm_stats(GroupNormTwoPass p) {
    LTXK_SHARED(BlockMoments<float>, scratch);
    u32 tile = blockIdx.x, chunks = static_cast<u32>(p.chunks);
    i64 row = tile / chunks, first = (tile % chunks) * p.chunk;
    i64 last = first + p.chunk < p.positions ? first + p.chunk : p.positions;
    Moments<float> mine = thread_moments<T, V>(static_cast<const T*>(p.x), Span(row * p.positions + first, row * p.positions + last, V));
    Moments<float> all = merge_block(mine, scratch);
    if (threadIdx.x == 0) {
        float shift = load_param(p.conv_bias, p.conv_bias_type, static_cast<u32>(row) % static_cast<u32>(p.channels), 0.0f);
        p.partials[tile] = {all.mean + shift, all.m2};
    }
}

// Mean and inverse deviation of one group from its partials: Chan's rule for all of them at once, about the first one's mean.
// `group`: of all samples.
LTXK_DEVICE Partial merge_partials(const GroupNormTwoPass& p, i64 group, BlockSum<float>& scratch) {
    const Partial* partials = p.partials + group * p.group_channels * p.chunks;
    u32 chunks = static_cast<u32>(p.chunks), count = static_cast<u32>(p.group_channels) * chunks;
    float whole = static_cast<float>(p.chunk), rest = static_cast<float>(p.positions - (p.chunks - 1) * p.chunk);
    float per_element = fast_reciprocal(static_cast<float>(p.group_channels * p.positions)), pivot = partials[0].mean, shifted = 0.0f;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
        float weight = i % chunks == chunks - 1 ? rest : whole;
        shifted += (partials[i].mean - pivot) * (weight * per_element);
    }
    float mean = pivot + sum_block(shifted, scratch), variance = 0.0f;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
        float weight = i % chunks == chunks - 1 ? rest : whole;
        float delta = partials[i].mean - mean;
        variance += partials[i].m2 * per_element + delta * delta * (weight * per_element);
    }
    variance = sum_block(variance, scratch);
    return {mean, inverse_deviation(variance, static_cast<float>(p.eps))};
}

// Block = one group of one sample.
__global__ void __launch_bounds__(256) group_norm_finalize(GroupNormTwoPass p) {
    LTXK_SHARED(BlockSum<float>, scratch);
    i64 group = blockIdx.x;
    Partial final = merge_partials(p, group, scratch);
    if (threadIdx.x == 0) p.finals[group] = final;
}

template <class T, int V>
LTXK_DEVICE void apply_pack(const T* x, T* out, const T* residual, const ChannelAffine& affine, i64 i) {
    Pack<T, V> pack = load_streaming<T, V>(x + i), added = {};
    if (residual) added = load_streaming<T, V>(residual + i);
#pragma unroll
    for (int k = 0; k < V; ++k)
        pack.value[k] = round_to<T>(affine.apply(to_float(pack.value[k]), residual ? to_float(added.value[k]) : 0.0f));
    store_streaming<T, V>(out + i, pack);
}

// Contiguous layout; blocks walk the activation backwards, so that they meet its tail while it is still in the L2 cache.
template <class T, int V>
__global__ void __launch_bounds__(256, 4) group_norm_apply(GroupNormTwoPass p) {
    LTXK_SHARED(BlockSum<float>, scratch);
    u32 tile = gridDim.x - 1 - blockIdx.x, chunks = static_cast<u32>(p.chunks), row = tile / chunks;
    i64 first = (tile % chunks) * p.chunk, last = first + p.chunk < p.positions ? first + p.chunk : p.positions;
    u32 channel = row % static_cast<u32>(p.channels), group = row / static_cast<u32>(p.group_channels);
    Partial final = p.finals ? p.finals[group]
                             : merge_partials(p, group, scratch);
    ChannelAffine affine = channel_affine(p, channel, final.mean, final.m2);
    const T* x = static_cast<const T*>(p.x);
    const T* residual = static_cast<const T*>(p.residual);
    T* out = static_cast<T*>(p.out);
    Span span(static_cast<i64>(row) * p.positions + first, static_cast<i64>(row) * p.positions + last, V);
    i64 step = static_cast<i64>(blockDim.x) * V;
#pragma unroll 2
    for (i64 i = span.body_begin + static_cast<i64>(threadIdx.x) * V; i < span.body_end; i += step)
        apply_pack<T, V>(x, out, residual, affine, i);
    for (i64 k = threadIdx.x; k < span.ragged(); k += blockDim.x) apply_pack<T, 1>(x, out, residual, affine, span.ragged_index(k));
}

}  // namespace ltxk
