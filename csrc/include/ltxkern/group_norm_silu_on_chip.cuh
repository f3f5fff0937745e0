// GroupNorm + SiLU in one launch, for contiguous activations: the second read comes from shared memory, not from the device's memory.
//
// resident: a thread-block cluster (or a single block) holds one group. pipeline: a persistent grid holds two groups at a time, taking
// the statistics of the next one before applying this one, so that no block waits for the others with nothing to do. What does not fit
// into shared memory is read again, from L2 where that holds it.
#pragma once

#include "ltxkern/group_norm_silu.cuh"

namespace ltxk {

// What a launch adds. by_x: what divides by x.
struct GroupNormOnChip : GroupNormSilu {
    i64 groups, by_groups;    // samples * groups per sample; by_groups: by those of one sample
    i64 blocks, by_blocks;    // blocks that share a group: the cluster, or a team of the persistent grid
    i64 slice;                // elements of a group per block, a multiple of the vector
    i64 kept;                 // of these, elements held in shared memory, a multiple of the vector
    i64 by_positions;
    i64 kept_range, rest_range;  // of what is held in shared memory, and of the rest, elements that each warp takes
    i64 by_teams;             // pipeline only: teams of the grid
    PairMoments* partials;    // pipeline only: [group][block of the team]
    u32* arrived;             // pipeline only: [group], zero before the launch
};

// One block's part of one group.
struct Slice {
    i64 start;          // in the activation
    u32 first, count;   // in the group
    u32 group_channel;  // first channel of the group

    LTXK_DEVICE Slice(const GroupNormOnChip& p, u32 group, u32 block) {
        // Groups have fewer than 2^31 elements.
        u32 length = static_cast<u32>(p.group_channels) * static_cast<u32>(p.positions), most = static_cast<u32>(p.slice);
        first = most * block;
        u32 left = first < length ? length - first : 0u;
        count = left < most ? left : most;
        start = static_cast<i64>(group) * length + first;
        u32 channels = static_cast<u32>(p.group_channels);
        group_channel = group * channels - divide(group, p.by_groups) * static_cast<u32>(p.channels);
    }
};

// The tables of one group's channels, at the end of shared memory.
struct ChannelTables {
    ChannelAffine* affine;
    float* shift;  // conv_bias

    LTXK_DEVICE ChannelTables(const GroupNormOnChip& p, unsigned char* memory) {
        affine = reinterpret_cast<ChannelAffine*>(memory);
        shift = reinterpret_cast<float*>(affine + p.group_channels);
    }
};

// Moments of `count` elements of the slice from `first` on, which go into shared memory where they are KEPT. A vector never straddles
// two channels.
template <class T, int V, bool KEPT, bool SHIFTED>
LTXK_DEVICE void read_part(
    const GroupNormOnChip& p, const Slice& slice, T* kept, const float* shifts, u32 first, u32 count, PairMoments& moments) {
    const T* x = static_cast<const T*>(p.x) + slice.start + first;
    u32 in_group = slice.first + first;
    auto read = [](const T* from) {
        if constexpr (KEPT) return load_streaming<T, V>(from);
        else return load<T, V>(from);
    };
    auto shift_at = [&](u32 i) { return SHIFTED ? shifts[divide(in_group + i, p.by_positions)] : 0.0f; };
    each_pack<V>(
        count, KEPT ? p.kept_range : p.rest_range,
        [&](auto batch, u32 i) {
            constexpr int B = decltype(batch)::value;
            const T* from = x + i;
            [[maybe_unused]] T* to = kept + i;
            Pack<T, V> packs[B];
            float values[B][V];
#pragma unroll
            for (int b = 0; b < B; ++b) packs[b] = read(from + b * kApart<V>);
#pragma unroll
            for (int b = 0; b < B; ++b) {
                if constexpr (KEPT) store<T, V>(to + b * kApart<V>, packs[b]);
                unpack(packs[b], values[b]);
                float shift = shift_at(i + b * kApart<V>);
                if constexpr (SHIFTED && kWide<T>) {
                    moments.add<true>(values[b], shift);
                } else if constexpr (SHIFTED) {
#pragma unroll
                    for (int k = 0; k < V; ++k) values[b][k] += shift;
                }
            }
            if constexpr (!SHIFTED || !kWide<T>) moments.add<kWide<T>>(reinterpret_cast<float (&)[B * V]>(values));
        },
        [&](u32 i) {
            Pack<T, V> pack = read(x + i);
            float values[V], shift = shift_at(i);
            if constexpr (KEPT) store<T, V>(kept + i, pack);
            unpack(pack, values);
            if constexpr (SHIFTED && !kWide<T>) {
#pragma unroll
                for (int k = 0; k < V; ++k) values[k] += shift;
            }
            moments.add<kWide<T>>(values, shift);
        });
}

// Reads the slice once: its moments, and its first p.kept elements into shared memory.
template <class T, int V, bool ALL>
LTXK_DEVICE PairMoments read_slice(const GroupNormOnChip& p, const Slice& slice, T* kept, const float* shifts) {
    u32 keep = ALL || slice.count < static_cast<u32>(p.kept) ? slice.count : static_cast<u32>(p.kept);
    PairMoments moments;
    if (p.conv_bias) {
        read_part<T, V, true, true>(p, slice, kept, shifts, 0, keep, moments);
        if (!ALL && keep < slice.count) read_part<T, V, false, true>(p, slice, kept, shifts, keep, slice.count - keep, moments);
    } else {
        read_part<T, V, true, false>(p, slice, kept, shifts, 0, keep, moments);
        if (!ALL && keep < slice.count) read_part<T, V, false, false>(p, slice, kept, shifts, keep, slice.count - keep, moments);
    }
    return moments;
}

// apply_all of a part of a group. A warp whose range is of one channel, as most are, looks its numbers up once.
template <class T, int V, bool KEPT, bool RESIDUAL>
LTXK_DEVICE void apply_part(T* out, const T* x, const T* residual, u32 count, i64 range, const ChannelsOfGroup& channels) {
    u32 begin = threadIdx.x / 32 * static_cast<u32>(range), end = begin + static_cast<u32>(range);
    if (end > count) end = count;
    if (begin >= end) return;
    if (channels.same(begin, end - 1))
        apply_all<T, V, KEPT, RESIDUAL>(out, x, residual, count, range, OneChannel{channels.at(begin)});
    else
        apply_all<T, V, KEPT, RESIDUAL>(out, x, residual, count, range, channels);
}

template <class T, int V, bool ALL, bool RESIDUAL>
LTXK_DEVICE void apply_parts(const GroupNormOnChip& p, const Slice& slice, const T* kept, const ChannelAffine* affine) {
    const T* x = static_cast<const T*>(p.x) + slice.start;
    const T* residual = RESIDUAL ? static_cast<const T*>(p.residual) + slice.start : nullptr;
    T* out = static_cast<T*>(p.out) + slice.start;
    u32 keep = ALL || slice.count < static_cast<u32>(p.kept) ? slice.count : static_cast<u32>(p.kept);
    ChannelsOfGroup first{affine, slice.first, p.by_positions};
    // A whole slice in a block: its ranges are long. The pipeline's are not worth a second loop.
    if constexpr (ALL) apply_part<T, V, true, RESIDUAL>(out, kept, residual, keep, p.kept_range, first);
    else apply_all<T, V, true, RESIDUAL>(out, kept, residual, keep, p.kept_range, first);
    if (!ALL && keep < slice.count) {
        apply_all<T, V, false, RESIDUAL>(
            out + keep, x + keep, RESIDUAL ? residual + keep : nullptr, slice.count - keep, p.rest_range,
            ChannelsOfGroup{affine, slice.first + keep, p.by_positions});
    }
}

// Normalises the slice; each thread meets the elements that it read before, so that shared memory needs no barrier.
template <class T, int V, bool ALL>
LTXK_DEVICE void apply_slice(const GroupNormOnChip& p, const Slice& slice, const T* kept, const ChannelAffine* affine) {
    if (p.residual) apply_parts<T, V, ALL, true>(p, slice, kept, affine);
    else apply_parts<T, V, ALL, false>(p, slice, kept, affine);
}

// A barrier follows before they are used, where there is a conv_bias at all.
LTXK_DEVICE void fill_shifts(const GroupNormOnChip& p, const Slice& slice, float* shifts) {
    if (p.conv_bias == nullptr) return;
    for (u32 c = threadIdx.x; c < static_cast<u32>(p.group_channels); c += blockDim.x)
        shifts[c] = load_param(p.conv_bias, p.conv_bias_type, slice.group_channel + c, 0.0f);
    __syncthreads();
}

// The first warp's work: so few channels are not worth a barrier more, nor what each warp would do for its share.
template <class T>
LTXK_DEVICE void fill_affine(const GroupNormOnChip& p, const Slice& slice, ChannelAffine* affine, const PairMoments& all) {
    float rstd = inverse_deviation(all, static_cast<float>(p.eps));
    for (u32 c = threadIdx.x; c < static_cast<u32>(p.group_channels); c += 32)
        affine[c] = channel_affine(p, slice.group_channel + c, all, rstd).scaled<T>();
}

// Bytes of one slot of kept elements, rounded so that what follows is aligned.
template <class T>
LTXK_DEVICE u32 slot_bytes(const GroupNormOnChip& p) {
    return (static_cast<u32>(p.kept) * sizeof(T) + 15u) / 16u * 16u;
}

// Grid = groups * blocks, in clusters of `blocks`; p.kept == p.slice.
template <class T, int V>
__global__ void __launch_bounds__(1024) group_norm_resident(GroupNormOnChip p) {
    LTXK_SHARED(WarpMoments, scratch);
    LTXK_SHARED(PairMoments, total);
    LTXK_DYNAMIC_SHARED(unsigned char, memory);
    T* kept = reinterpret_cast<T*>(memory);
    ChannelTables tables(p, memory + slot_bytes<T>(p));
    u32 blocks = static_cast<u32>(p.blocks), group = divide(blockIdx.x, p.by_blocks);
    Slice slice(p, group, blockIdx.x - group * blocks);
    fill_shifts(p, slice, tables.shift);
    PairMoments all = merge_to_first_warp<kWide<T>>(read_slice<T, V, true>(p, slice, kept, tables.shift), scratch);
    if (threadIdx.x == 0) total = all;
    cluster_sync();
    if (threadIdx.x < 32) {
        if (blocks > 1) {
            PairMoments mine;
            if (threadIdx.x < blocks) mine = *cluster_peer(&total, threadIdx.x);
            all = merge_warp(mine);
        }
        fill_affine<T>(p, slice, tables.affine, all);
    }
    // Also keeps every block's `total` alive until the last peer has read it.
    cluster_sync();
    apply_slice<T, V, true>(p, slice, kept, tables.affine);
}

// For the first warp: waits until all blocks of the team have delivered this group, then merges what they found.
LTXK_DEVICE PairMoments await_group(const GroupNormOnChip& p, u32 group) {
    u32 blocks = static_cast<u32>(p.blocks);
    if (threadIdx.x == 0)
        while (acquire(p.arrived + group) < blocks) spin_pause();
    __syncwarp();
    const PairMoments* partials = p.partials + static_cast<i64>(group) * blocks;
    PairMoments mine;
    for (u32 b = threadIdx.x; b < blocks; b += 32) {
        PairMoments one = partials[b];
        if (one.count > 0.0f) mine.merge<true>(one.count, one.mean, one.low, one.m2);
    }
    return merge_warp(mine);
}

// Cooperative grid of teams; a team walks the groups team, team + teams, ... with two slots of shared memory.
template <class T, int V>
__global__ void __launch_bounds__(512, 2) group_norm_pipeline(GroupNormOnChip p) {
    LTXK_SHARED(WarpMoments, scratch);
    LTXK_DYNAMIC_SHARED(unsigned char, memory);
    ChannelTables tables(p, memory + 2 * slot_bytes<T>(p));
    u32 blocks = static_cast<u32>(p.blocks), team = divide(blockIdx.x, p.by_blocks), block = blockIdx.x - team * blocks;
    u32 teams = divide(gridDim.x, p.by_blocks), groups = static_cast<u32>(p.groups);
    for (u32 group = team; group < groups + teams; group += teams) {
        // Not carried along: a register less.
        u32 slot = divide(group, p.by_teams) & 1;
        if (group < groups) {
            Slice slice(p, group, block);
            T* kept = reinterpret_cast<T*>(memory + slot * slot_bytes<T>(p));
            fill_shifts(p, slice, tables.shift);
            PairMoments mine = merge_to_first_warp<kWide<T>>(read_slice<T, V, false>(p, slice, kept, tables.shift), scratch);
            if (threadIdx.x == 0) {
                p.partials[static_cast<i64>(group) * blocks + block] = mine;
                signal_add(p.arrived + group);
            }
        } else {
            // Every warp is done with the table of the group before.
            __syncthreads();
        }
        if (group < teams) continue;
        u32 before = group - teams;
        Slice slice(p, before, block);
        if (threadIdx.x < 32) fill_affine<T>(p, slice, tables.affine, await_group(p, before));
        __syncthreads();
        apply_slice<T, V, false>(p, slice, reinterpret_cast<const T*>(memory + (slot ^ 1) * slot_bytes<T>(p)), tables.affine);
    }
}

}  // namespace ltxk
