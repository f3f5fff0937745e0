// GroupNorm + SiLU in one launch, for contiguous activations: the second read comes from shared memory, not from the device's memory.
//
// resident: a thread-block cluster (or a single block) holds one group. pipeline: a persistent grid holds two groups at a time, taking
// the statistics of the next one before applying this one, so that no block waits for the others with nothing to do. What does not fit
// into shared memory is read again, from L2 where that holds it.
#pragma once

#include "ltxkern/group_norm_silu.cuh"

namespace ltxk {

// What a launch adds.
struct GroupNormOnChip : GroupNormSilu {
    i64 groups;         // samples * groups per sample
    i64 blocks;         // blocks that share a group: the cluster, or a team of the persistent grid
    i64 slice;          // elements of a group per block, a multiple of the vector
    i64 kept;           // of these, elements held in shared memory, a multiple of the vector
    Partial* partials;  // pipeline only: [group][block of the team]
    u32* arrived;       // pipeline only: [group], zero before the launch
};

// One block's part of one group.
struct Slice {
    i64 start;          // in the activation
    u32 first, count;   // in the group
    u32 group_channel;  // first channel of the group
    i64 group_start;    // in the activation

    LTXK_DEVICE Slice(const GroupNormOnChip& p, i64 group, u32 block) {
        i64 length = p.group_channels * p.positions, from = p.slice * block;
        first = static_cast<u32>(from);
        count = from >= length ? 0u : static_cast<u32>(length - from < p.slice ? length - from : p.slice);
        group_start = group * length;
        start = group_start + from;
        group_channel = static_cast<u32>(group) % static_cast<u32>(p.channels / p.group_channels) * static_cast<u32>(p.group_channels);
    }
};

// The group's first value, about which its moments are taken: means far from zero would else lose digits in every merge. Loaded with
// the slice, since the result may replace it in memory.
template <class T>
LTXK_DEVICE float pivot_of(const GroupNormOnChip& p, const Slice& slice) {
    return to_float(static_cast<const T*>(p.x)[slice.group_start]) + load_param(p.conv_bias, p.conv_bias_type, slice.group_channel, 0.0f);
}

// Reads the slice once: its moments about the pivot, and its first p.kept elements into shared memory. A vector never straddles two
// channels.
template <class T, int V>
LTXK_DEVICE Moments<float> read_slice(const GroupNormOnChip& p, const Slice& slice, float pivot, T* kept) {
    constexpr int kBatch = 4;
    const T* x = static_cast<const T*>(p.x) + slice.start;
    u32 positions = static_cast<u32>(p.positions), keep = static_cast<u32>(p.kept), step = blockDim.x * V;
    Moments<float> moments;
    auto shift_at = [&](u32 i) {
        if (p.conv_bias == nullptr) return -pivot;
        return load_param(p.conv_bias, p.conv_bias_type, slice.group_channel + (slice.first + i) / positions, 0.0f) - pivot;
    };
    u32 i = threadIdx.x * V;
    for (; i + (kBatch - 1) * step < slice.count; i += kBatch * step) {
        Pack<T, V> packs[kBatch];
        float values[kBatch * V];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) packs[b] = i + b * step < keep ? load_streaming<T, V>(x + i + b * step) : load<T, V>(x + i + b * step);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            if (i + b * step < keep) store<T, V>(kept + i + b * step, packs[b]);
            float shift = shift_at(i + b * step);
#pragma unroll
            for (int k = 0; k < V; ++k) values[b * V + k] = to_float(packs[b].value[k]) + shift;
        }
        merge_values(moments, values);
    }
    for (; i < slice.count; i += step) {
        Pack<T, V> pack = load<T, V>(x + i);
        if (i < keep) store<T, V>(kept + i, pack);
        float values[V], shift = shift_at(i);
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] = to_float(pack.value[k]) + shift;
        merge_values(moments, values);
    }
    return moments;
}

// Normalises the slice; each thread meets the elements that it read before, so that shared memory needs no barrier.
template <class T, int V>
LTXK_DEVICE void apply_slice(const GroupNormOnChip& p, const Slice& slice, const T* kept, const ChannelAffine* affine) {
    const T* x = static_cast<const T*>(p.x) + slice.start;
    const T* residual = p.residual ? static_cast<const T*>(p.residual) + slice.start : nullptr;
    T* out = static_cast<T*>(p.out) + slice.start;
    u32 positions = static_cast<u32>(p.positions), keep = static_cast<u32>(p.kept), step = blockDim.x * V;
#pragma unroll 2
    for (u32 i = threadIdx.x * V; i < slice.count; i += step) {
        Pack<T, V> pack = i < keep ? load<T, V>(kept + i) : load_streaming<T, V>(x + i), added = {};
        if (residual) added = load_streaming<T, V>(residual + i);
        ChannelAffine channel = affine[(slice.first + i) / positions];
#pragma unroll
        for (int k = 0; k < V; ++k)
            pack.value[k] = round_to<T>(channel.apply(to_float(pack.value[k]), residual ? to_float(added.value[k]) : 0.0f));
        store_streaming<T, V>(out + i, pack);
    }
}

// `mean` counts from the pivot: it goes into the offset.
LTXK_DEVICE void fill_affine(const GroupNormOnChip& p, const Slice& slice, ChannelAffine* affine, float pivot, float mean, float rstd) {
    for (u32 c = threadIdx.x; c < static_cast<u32>(p.group_channels); c += blockDim.x) {
        ChannelAffine channel = channel_affine(p, slice.group_channel + c, pivot, rstd);
        channel.offset -= mean * channel.scale;
        affine[c] = channel;
    }
}

// Bytes of one slot of kept elements, rounded so that what follows is aligned.
template <class T>
LTXK_DEVICE u32 slot_bytes(const GroupNormOnChip& p) {
    return (static_cast<u32>(p.kept) * sizeof(T) + 15u) / 16u * 16u;
}

// Grid = groups * blocks, in clusters of `blocks`; p.kept == p.slice.
template <class T, int V>
__global__ void __launch_bounds__(512, 2) group_norm_resident(GroupNormOnChip p) {
    LTXK_SHARED(BlockMoments<float>, scratch);
    LTXK_SHARED(Moments<float>, total);
    LTXK_DYNAMIC_SHARED(unsigned char, memory);
    T* kept = reinterpret_cast<T*>(memory);
    ChannelAffine* affine = reinterpret_cast<ChannelAffine*>(memory + slot_bytes<T>(p));
    u32 blocks = static_cast<u32>(p.blocks);
    Slice slice(p, blockIdx.x / blocks, blockIdx.x % blocks);
    float pivot = pivot_of<T>(p, slice);
    Moments<float> mine = merge_block(read_slice<T, V>(p, slice, pivot, kept), scratch);
    if (threadIdx.x == 0) total = mine;
    cluster_sync();
    Moments<float> all;
    for (u32 rank = 0; rank < blocks; ++rank) all.merge(*cluster_peer(&total, rank));
    fill_affine(p, slice, affine, pivot, all.mean, fast_rsqrt(all.m2 * fast_reciprocal(all.count) + static_cast<float>(p.eps)));
    // Also keeps every block's `total` alive until the last peer has read it.
    cluster_sync();
    apply_slice<T, V>(p, slice, kept, affine);
}

// Waits until all blocks of the team have delivered this group, then merges their partials about the first one's mean.
LTXK_DEVICE Partial await_group(const GroupNormOnChip& p, i64 group, BlockSum<float>& scratch) {
    u32 blocks = static_cast<u32>(p.blocks);
    if (threadIdx.x == 0)
        while (acquire(p.arrived + group) < blocks) spin_pause();
    __syncthreads();
    const Partial* partials = p.partials + group * blocks;
    i64 length = p.group_channels * p.positions;
    float per_element = fast_reciprocal(static_cast<float>(length)), pivot = partials[0].mean, shifted = 0.0f, variance = 0.0f;
    auto weight = [&](u32 block) { return static_cast<float>(Slice(p, group, block).count) * per_element; };
    for (u32 b = threadIdx.x; b < blocks; b += blockDim.x) shifted += (partials[b].mean - pivot) * weight(b);
    float mean = pivot + sum_block(shifted, scratch);
    for (u32 b = threadIdx.x; b < blocks; b += blockDim.x) {
        float delta = partials[b].mean - mean;
        variance += partials[b].m2 * per_element + delta * delta * weight(b);
    }
    return {mean, fast_rsqrt(sum_block(variance, scratch) + static_cast<float>(p.eps))};
}

struct SlotPivots {
    float slot[2];
};

// Cooperative grid of teams; a team walks the groups team, team + teams, ... with two slots of shared memory.
template <class T, int V>
__global__ void __launch_bounds__(512, 2) group_norm_pipeline(GroupNormOnChip p) {
    LTXK_SHARED(BlockMoments<float>, scratch);
    LTXK_SHARED(BlockSum<float>, sums);
    LTXK_SHARED(SlotPivots, pivots);
    LTXK_DYNAMIC_SHARED(unsigned char, memory);
    ChannelAffine* affine = reinterpret_cast<ChannelAffine*>(memory + 2 * slot_bytes<T>(p));
    u32 blocks = static_cast<u32>(p.blocks), block = blockIdx.x % blocks, teams = gridDim.x / blocks;
    u32 slot = 0;
    for (i64 group = blockIdx.x / blocks; group < p.groups + teams; group += teams, slot ^= 1) {
        if (group < p.groups) {
            Slice slice(p, group, block);
            float pivot = pivot_of<T>(p, slice);
            T* kept = reinterpret_cast<T*>(memory + slot * slot_bytes<T>(p));
            Moments<float> mine = merge_block(read_slice<T, V>(p, slice, pivot, kept), scratch);
            if (threadIdx.x == 0) {
                pivots.slot[slot] = pivot;
                p.partials[group * blocks + block] = {mine.mean, mine.m2};
                signal_add(p.arrived + group);
            }
        }
        i64 before = group - teams;
        if (before < 0) continue;
        Partial final = await_group(p, before, sums);
        Slice slice(p, before, block);
        fill_affine(p, slice, affine, pivots.slot[slot ^ 1], final.mean, final.m2);
        __syncthreads();
        apply_slice<T, V>(p, slice, reinterpret_cast<const T*>(memory + (slot ^ 1) * slot_bytes<T>(p)), affine);
    }
}

}  // namespace ltxk
