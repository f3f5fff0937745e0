// GroupNorm + SiLU in two passes over the activation: statistics per tile, then normalise, scale, add, SiLU.
//
// A partial is the (mean, M2) of one channel over one chunk of positions, of known count. Between the passes a small kernel merges the
// partials of each group in a fixed order, their means shifted by conv_bias, so that the convolution's bias costs nothing, and writes
// what every channel does to its elements: no atomics, nothing to reset between replays of a graph.
#pragma once

#include "ltxkern/moments.cuh"
#include "ltxkern/types.cuh"

namespace ltxk {

// One partial, of 8 bytes.
struct alignas(8) Partial {
    float mean, m2;
};

// What one channel does to its elements: silu((v - mean) * scale + offset + residual).
struct alignas(16) ChannelAffine {
    float mean, scale, offset;

    // With the factor that T's silu asks for in scale and offset.
    template <class T>
    LTXK_DEVICE ChannelAffine scaled() const {
        return {mean, scale * kSiluFactor<T>, offset * kSiluFactor<T>};
    }
};

#include "ltxkern/group_norm_silu_parameters.cuh"

// What the launches of two passes add. by_x: what divides by x.
struct GroupNormTwoPass : GroupNormSilu {
    Partial* partials;      // [n][channel][chunk]
    ChannelAffine* affine;  // [n][channel]
    i64 chunk;              // positions per partial
    i64 chunks, by_chunks;  // partials per channel: ceil(positions / chunk)
    i64 by_groups;          // groups of one sample
    i64 range;              // elements of a chunk that each warp takes
    i64 merged;             // whether a partial is that of a group's channels together, conv_bias added: [n][group][chunk]
    i64 lanes, by_lanes, rows, by_rows;  // channels-last: threads of a block along the channels, the others take further positions
};

// Values of 16 bits have no mean that one float does not hold.
template <class T>
constexpr bool kWide = sizeof(T) > 2;

// The shift goes into the mean: (v + conv_bias) - mean = v - (mean - conv_bias); what that loses goes into the offset.
LTXK_DEVICE ChannelAffine channel_affine(const GroupNormSilu& p, i64 channel, const PairMoments& all, float rstd) {
    float shift = load_param(p.conv_bias, p.conv_bias_type, channel, 0.0f);
    float scale = load_param(p.weight, p.weight_type, channel, 1.0f) * rstd;
    Pair mean = exact_sum(all.mean, -shift);
    return {mean.high, scale, fused(-(mean.low + all.low), scale, load_param(p.bias, p.bias_type, channel, 0.0f))};
}

// The numbers of element k of a pack: all of one channel, or each of its own.
LTXK_DEVICE const ChannelAffine& channel_of(const ChannelAffine& all, int) { return all; }
template <int V>
LTXK_DEVICE const ChannelAffine& channel_of(const ChannelAffine (&each)[V], int k) {
    return each[k];
}

template <class T, bool RESIDUAL, int V, class Scaled>
LTXK_DEVICE Pack<T, V> normalised(const Pack<T, V>& pack, const Pack<T, V>& residual, const Scaled& scaled) {
    float values[V], added[V];
    unpack(pack, values);
    if constexpr (RESIDUAL) unpack(residual, added);
#pragma unroll
    for (int k = 0; k < V; ++k) {
        const ChannelAffine& channel = channel_of(scaled, k);
        float v = fused(values[k] - channel.mean, channel.scale, channel.offset);
        if constexpr (RESIDUAL) v = fused(added[k], kSiluFactor<T>, v);
        values[k] = silu<T>(v);
    }
    return rounded<T, V>(values);
}

// Where the i-th of what several threads share lies in shared memory: behind each 128 bytes one place is free, so that threads that
// each have some in a row do not meet in one bank.
template <class Shared>
LTXK_DEVICE u32 place_of(u32 i) {
    return i + i / (128 / sizeof(Shared));
}

// Packs of a thread whose loads are under way before the first is used. They lie a warp's packs apart, so that the addresses of a
// batch differ by a number in the instruction.
constexpr int kBatch = 4;
// Of two tensors: but for sm_90 the compilers spill four and four of 16-bit elements.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 != 9
template <class T>
constexpr int kResidualBatch = kWide<T> ? kBatch : 2;
#else
template <class T>
constexpr int kResidualBatch = kBatch;
#endif
template <int V>
constexpr u32 kApart = 32 * V;

template <int N>
struct Count {
    static constexpr int value = N;
};

// All packs of `count` elements, a multiple of V, by the threads of the block: every warp has a range of its own, of as many elements.
// `batch` takes the first element of so many packs, B of them and at the end perhaps one less, `single` that of one.
template <int V, int B = kBatch, class Batch, class Single>
LTXK_DEVICE void each_pack(u32 count, i64 range, Batch batch, Single single) {
    u32 begin = threadIdx.x / 32 * static_cast<u32>(range), end = begin + static_cast<u32>(range);
    u32 i = begin + threadIdx.x % 32 * V;
    if (end > count) end = count;
    for (; i + (B - 1) * kApart<V> < end; i += B * kApart<V>) batch(Count<B>(), i);
    // Of single elements not: there the compilers spill.
    if constexpr (B > 2 && V > 1) {
        if (i + (B - 2) * kApart<V> < end) {
            batch(Count<B - 1>(), i);
            i += (B - 1) * kApart<V>;
        }
    }
    for (; i < end; i += kApart<V>) single(i);
}

// Normalises `count` elements of x, which are of one channel.
template <class T, int V, bool RESIDUAL>
LTXK_DEVICE void apply_all(T* out, const T* x, const T* residual, u32 count, i64 range, const ChannelAffine& scaled) {
    // Of single elements as well.
    constexpr int kLoads = V == 1 ? 2 : RESIDUAL ? kResidualBatch<T> : kBatch;
    each_pack<V, kLoads>(
        count, range,
        [&](auto batch, u32 i) {
            constexpr int B = decltype(batch)::value;
            const T* from = x + i;
            T* to = out + i;
            Pack<T, V> packs[B], added[RESIDUAL ? B : 1];
#pragma unroll
            for (int b = 0; b < B; ++b) packs[b] = load_streaming<T, V>(from + b * kApart<V>);
            if constexpr (RESIDUAL) {
                const T* more = residual + i;
#pragma unroll
                for (int b = 0; b < B; ++b) added[b] = load_streaming<T, V>(more + b * kApart<V>);
            }
#pragma unroll
            for (int b = 0; b < B; ++b)
                store_streaming<T, V>(to + b * kApart<V>, normalised<T, RESIDUAL>(packs[b], added[RESIDUAL ? b : 0], scaled));
        },
        [&](u32 i) {
            Pack<T, V> added;
            if constexpr (RESIDUAL) added = load_streaming<T, V>(residual + i);
            store_streaming<T, V>(out + i, normalised<T, RESIDUAL>(load_streaming<T, V>(x + i), added, scaled));
        });
}

// A tile, one chunk of one channel of one sample: a body that begins at 16 bytes and is whole accesses, and its two ragged ends.
struct Tile {
    i64 first;               // element
    u32 head, body, ragged;  // elements of the end before the body, of the body, and of both ends

    LTXK_DEVICE Tile(const GroupNormTwoPass& p, u32 row, u32 chunk, u32 vector) {
        u32 most = static_cast<u32>(p.chunk);
        first = row * p.positions + static_cast<i64>(chunk) * most;
        // What is left for the last chunk is less than 2^31, whatever the others have.
        u32 count = chunk + 1 == static_cast<u32>(p.chunks) ? static_cast<u32>(p.positions) - chunk * most : most;
        head = (0u - static_cast<u32>(first)) % vector;
        if (head > count) head = count;
        body = (count - head) / vector * vector;
        ragged = count - body;
    }
    LTXK_DEVICE i64 ragged_element(u32 i) const { return first + (i < head ? i : i + body); }
};

// Moments of a tile's elements as seen by this thread.
template <class T, int V>
LTXK_DEVICE PairMoments thread_moments(const T* x, const Tile& tile, i64 range) {
    PairMoments moments;
    const T* body = x + (tile.first + tile.head);
    each_pack<V>(
        tile.body, range,
        [&](auto batch, u32 i) {
            constexpr int B = decltype(batch)::value;
            const T* from = body + i;
            Pack<T, V> packs[B];
            float values[B][V];
#pragma unroll
            for (int b = 0; b < B; ++b) packs[b] = load<T, V>(from + b * kApart<V>);
#pragma unroll
            for (int b = 0; b < B; ++b) unpack(packs[b], values[b]);
            moments.add<kWide<T>>(reinterpret_cast<float (&)[B * V]>(values));
        },
        [&](u32 i) {
            float values[V];
            unpack(load<T, V>(body + i), values);
            moments.add<kWide<T>>(values);
        });
    for (u32 k = threadIdx.x; k < tile.ragged; k += blockDim.x)
        moments.merge<kWide<T>>(1.0f, to_float(x[tile.ragged_element(k)]), 0.0f, 0.0f);
    return moments;
}

// Contiguous layout; block = one tile.
template <class T, int V>
__global__ void __launch_bounds__(256) group_norm_stats(GroupNormTwoPass p) {
    LTXK_SHARED(WarpMoments, scratch);
    u32 row = divide(blockIdx.x, p.by_chunks), chunk = blockIdx.x - row * static_cast<u32>(p.chunks);
    Tile tile(p, row, chunk, V);
    PairMoments all = merge_to_first_warp<kWide<T>>(thread_moments<T, V>(static_cast<const T*>(p.x), tile, p.range), scratch);
    if (threadIdx.x == 0) p.partials[blockIdx.x] = {all.mean, all.m2};
}

// Block = one group of one sample: its mean and deviation from its partials, then what each of its channels does.
__global__ void __launch_bounds__(512, 2) group_norm_finalize(GroupNormTwoPass p) {
    LTXK_SHARED(WarpMoments, scratch);
    constexpr int kLoads = 8;
    u32 group = blockIdx.x, chunks = static_cast<u32>(p.chunks), channels = static_cast<u32>(p.group_channels);
    u32 first = group * channels, each = p.merged ? 1u : channels, count = each * chunks;
    const Partial* partials = p.partials + static_cast<i64>(group) * count;
    const void* conv_bias = p.merged ? nullptr : p.conv_bias;
    u32 channel = first - divide(group, p.by_groups) * static_cast<u32>(p.channels);
    i64 together = p.merged ? p.group_channels : 1;
    float whole = static_cast<float>(together * p.chunk);
    float rest = static_cast<float>(together * (p.positions - (p.chunks - 1) * p.chunk));
    PairMoments moments;
    for (u32 i = threadIdx.x; i < count; i += kLoads * blockDim.x) {
        Partial batch[kLoads];
#pragma unroll
        for (int b = 0; b < kLoads; ++b) batch[b] = partials[i + b * blockDim.x < count ? i + b * blockDim.x : i];
#pragma unroll
        for (int b = 0; b < kLoads; ++b) {
            u32 at = i + b * blockDim.x, c = divide(at, p.by_chunks), chunk = at - c * chunks;
            if (at >= count) continue;
            Pair mean = exact_sum(batch[b].mean, load_param(conv_bias, p.conv_bias_type, channel + c, 0.0f));
            moments.merge<true>(chunk == chunks - 1 ? rest : whole, mean.high, mean.low, batch[b].m2);
        }
    }
    PairMoments all = merge_block(moments, scratch);
    float rstd = inverse_deviation(all, static_cast<float>(p.eps));
    for (u32 c = threadIdx.x; c < channels; c += blockDim.x) p.affine[first + c] = channel_affine(p, channel + c, all, rstd);
}

template <class T, int V, bool RESIDUAL>
LTXK_DEVICE void apply_tile(const GroupNormTwoPass& p, const Tile& tile, const ChannelAffine& scaled) {
    const T* x = static_cast<const T*>(p.x);
    const T* residual = static_cast<const T*>(p.residual);
    T* out = static_cast<T*>(p.out);
    i64 body = tile.first + tile.head;
    apply_all<T, V, RESIDUAL>(out + body, x + body, RESIDUAL ? residual + body : nullptr, tile.body, p.range, scaled);
    for (u32 k = threadIdx.x; k < tile.ragged; k += blockDim.x) {
        i64 at = tile.ragged_element(k);
        Pack<T, 1> added = {};
        if constexpr (RESIDUAL) added = load<T, 1>(residual + at);
        store<T, 1>(out + at, normalised<T, RESIDUAL>(load<T, 1>(x + at), added, scaled));
    }
}

// Contiguous layout; blocks walk the activation backwards, so that they meet its tail while it is still in the L2 cache.
template <class T, int V>
__global__ void __launch_bounds__(256, 4) group_norm_apply(GroupNormTwoPass p) {
    u32 place = gridDim.x - 1 - blockIdx.x, row = divide(place, p.by_chunks), chunk = place - row * static_cast<u32>(p.chunks);
    ChannelAffine scaled = p.affine[row].scaled<T>();
    Tile tile(p, row, chunk, V);
    if (p.residual) apply_tile<T, V, true>(p, tile, scaled);
    else apply_tile<T, V, false>(p, tile, scaled);
}

}  // namespace ltxk
