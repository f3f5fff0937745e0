// GroupNorm + SiLU in one launch, for channels-last activations: all blocks wait for one another between statistics and result, and
// keep in shared memory what fits of what they read. The rest they read again, its tail from L2.
#pragma once

#include "ltxkern/group_norm_silu.cuh"

namespace ltxk {

// What the launch adds. A warp takes a position's channels of one tile, 32 * V of them, which are whole groups.
struct GroupNormColumns : GroupNormSilu {
    PairMoments* partials;  // [n][group][chunk]
    u32* arrived;           // [n][tile], zero before the launch
    i64 chunk;              // positions of a block
    i64 chunks, by_chunks;  // blocks of a tile: ceil(positions / chunk)
    i64 kept_rows;          // of a block's positions those in shared memory
    i64 lanes;              // of a warp that share a group, a power of two
};

template <class F>
LTXK_DEVICE F sum_lanes(F value, u32 lanes) {
    for (u32 step = lanes / 2; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, static_cast<int>(step));
    return value;
}

// merge_warp for each group's lanes, all of as many values.
template <bool WIDE>
LTXK_DEVICE PairMoments merge_lanes(const PairMoments& lane, u32 lanes) {
    float share = fast_reciprocal(static_cast<float>(lanes));
    float pivot = __shfl_sync(0xffffffffu, lane.mean, static_cast<int>(threadIdx.x % 32 & ~(lanes - 1)));
    PairMoments all;
    all.count = lane.count * static_cast<float>(lanes);
    all.mean = pivot + sum_lanes(((lane.mean - pivot) + lane.low) * share, lanes);
    float offset = (lane.mean - all.mean) + lane.low;
    if constexpr (WIDE) all.low = sum_lanes(offset * share, lanes);
    all.m2 = sum_lanes(fused(offset * offset, lane.count, lane.m2), lanes);
    return all;
}

// Of a block's warps, by group and warp; rows of 17, for a warp writes to all of them.
struct TileMoments {
    PairMoments group[32][17];
};

// Where a warp works: one tile of channels at the positions of one chunk. Row r of the chunk lies r * row_bytes behind `first`.
struct TileRows {
    u32 sample, channel, row_bytes, count;
    i64 first;  // bytes

    template <class T, int V>
    static LTXK_DEVICE TileRows of(const GroupNormColumns& p) {
        TileRows at;
        at.sample = divide(blockIdx.x, p.by_chunks);
        i64 position = (blockIdx.x - at.sample * static_cast<u32>(p.chunks)) * p.chunk;
        at.channel = (blockIdx.y * 32 + threadIdx.x % 32) * V;
        at.row_bytes = static_cast<u32>(p.channels * sizeof(T));
        at.count = static_cast<u32>(p.positions - position < p.chunk ? p.positions - position : p.chunk);
        at.first = ((at.sample * p.positions + position) * p.channels + at.channel) * static_cast<i64>(sizeof(T));
        return at;
    }
};

// Rows [begin, end) by the warps of the block in turn: B at once by `batch`, and what is left by `single`.
template <int B, class Batch, class Single>
LTXK_DEVICE void each_row(u32 begin, u32 end, Batch batch, Single single) {
    u32 warps = blockDim.x / 32, i = begin + threadIdx.x / 32;
    for (; i + (B - 1) * warps < end; i += B * warps) batch(i, warps);
    for (; i < end; i += warps) single(i);
}

// Moments of rows [begin, end), which go into shared memory where they are KEPT; `kept` is this thread's place in the first row there.
template <class T, int V, bool KEPT, bool SHIFTED>
LTXK_DEVICE void read_rows(
    const TileRows& at, const char* x, T* kept, u32 begin, u32 end, const float (&shifts)[V], PairMoments& moments) {
    auto read = [&](u32 row) {
        const T* from = reinterpret_cast<const T*>(x + static_cast<u64>(row) * at.row_bytes);
        if constexpr (KEPT) return load_streaming<T, V>(from);
        else return load<T, V>(from);
    };
    auto take = [&](u32 row, const Pack<T, V>& pack, float (&values)[V]) {
        if constexpr (KEPT) store<T, V>(kept + row * (32 * V), pack);
        unpack(pack, values);
        if constexpr (SHIFTED && !kWide<T>) {
#pragma unroll
            for (int k = 0; k < V; ++k) values[k] += shifts[k];
        }
    };
    // The values of B rows; each channel's by themselves where a sum with its shift would lose digits.
    auto add = [&](auto& values) {
        constexpr int B = sizeof(values) / sizeof(values[0]);
        if constexpr (SHIFTED && kWide<T>) {
#pragma unroll
            for (int k = 0; k < V; ++k) {
                float column[B];
#pragma unroll
                for (int b = 0; b < B; ++b) column[b] = values[b][k];
                moments.add<true>(column, shifts[k]);
            }
        } else {
            moments.add<kWide<T>>(reinterpret_cast<float (&)[B * V]>(values));
        }
    };
    each_row<kBatch>(
        begin, end,
        [&](u32 row, u32 warps) {
            Pack<T, V> packs[kBatch];
            float values[kBatch][V];
#pragma unroll
            for (int b = 0; b < kBatch; ++b) packs[b] = read(row + b * warps);
#pragma unroll
            for (int b = 0; b < kBatch; ++b) take(row + b * warps, packs[b], values[b]);
            add(values);
        },
        [&](u32 row) {
            float values[1][V];
            take(row, read(row), values[0]);
            add(values);
        });
}

// What the block found of its groups, to the others; then what all found, and what it does to every channel of the tile.
template <class T>
LTXK_DEVICE void exchange(const GroupNormColumns& p, const TileRows& at, const PairMoments& found, ChannelAffine* affine) {
    LTXK_SHARED(TileMoments, scratch);
    u32 lanes = static_cast<u32>(p.lanes), lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    u32 each = static_cast<u32>(p.group_channels), width = 32 / lanes * each, chunks = static_cast<u32>(p.chunks);
    u32 tile = at.sample * gridDim.y + blockIdx.y, chunk = blockIdx.x - at.sample * chunks;
    PairMoments mine = merge_lanes<kWide<T>>(found, lanes);
    if (lane % lanes == 0) scratch.group[lane / lanes][warp] = mine;
    __syncthreads();
    PairMoments* partials = p.partials + static_cast<i64>(tile) * (32 / lanes) * chunks;
    for (u32 group = warp; group < 32 / lanes; group += warps) {
        PairMoments other;
        if (lane < warps) other = scratch.group[group][lane];
        other = merge_warp(other);
        if (lane == 0) partials[group * chunks + chunk] = other;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        signal_add(p.arrived + tile);
        while (acquire(p.arrived + tile) < chunks) spin_pause();
    }
    __syncthreads();
    for (u32 group = warp; group < 32 / lanes; group += warps) {
        PairMoments all;
        for (u32 c = lane; c < chunks; c += 32) {
            PairMoments one = partials[group * chunks + c];
            all.merge<true>(one.count, one.mean, one.low, one.m2);
        }
        all = merge_warp(all);
        float rstd = inverse_deviation(all, static_cast<float>(p.eps));
        for (u32 c = lane; c < each; c += 32)
            affine[place_of<ChannelAffine>(group * each + c)] =
                channel_affine(p, blockIdx.y * width + group * each + c, all, rstd).scaled<T>();
    }
    __syncthreads();
}

// Normalises rows [begin, end), those that are not KEPT backwards, as their tail was read last.
template <class T, int V, bool KEPT, bool RESIDUAL>
LTXK_DEVICE void apply_rows(
    const GroupNormColumns& p, const TileRows& at, const T* kept, u32 begin, u32 end, const ChannelAffine (&scaled)[V]) {
    // As many bytes in flight, and no more registers.
    constexpr int kLoads = RESIDUAL ? kBatch / 2 : kBatch;
    const char* x = static_cast<const char*>(p.x) + at.first;
    const char* residual = static_cast<const char*>(p.residual) + at.first;
    char* out = static_cast<char*>(p.out) + at.first;
    auto offset = [&](u32 i) { return static_cast<u64>(KEPT ? i : begin + end - 1 - i) * at.row_bytes; };
    auto read = [&](u32 i) {
        if constexpr (KEPT) return load<T, V>(kept + i * (32 * V));
        else return load_streaming<T, V>(reinterpret_cast<const T*>(x + offset(i)));
    };
    auto added_at = [&](u32 i) {
        if constexpr (RESIDUAL) return load_streaming<T, V>(reinterpret_cast<const T*>(residual + offset(i)));
        else return Pack<T, V>();
    };
    auto write = [&](u32 i, const Pack<T, V>& pack, const Pack<T, V>& added) {
        store_streaming<T, V>(reinterpret_cast<T*>(out + offset(i)), normalised<T, RESIDUAL>(pack, added, scaled));
    };
    each_row<kLoads>(
        begin, end,
        [&](u32 i, u32 warps) {
            Pack<T, V> packs[kLoads], added[kLoads];
#pragma unroll
            for (int b = 0; b < kLoads; ++b) packs[b] = read(i + b * warps);
#pragma unroll
            for (int b = 0; b < kLoads; ++b) added[b] = added_at(i + b * warps);
#pragma unroll
            for (int b = 0; b < kLoads; ++b) write(i + b * warps, packs[b], added[b]);
        },
        [&](u32 i) { write(i, read(i), added_at(i)); });
}

// Cooperative; block = one chunk of positions of one sample, and 32 * V channels.
template <class T, int V>
__global__ void __launch_bounds__(512, 2) group_norm_columns(GroupNormColumns p) {
    LTXK_DYNAMIC_SHARED(unsigned char, memory);
    u32 lane = threadIdx.x % 32, keep = static_cast<u32>(p.kept_rows);
    T* kept = reinterpret_cast<T*>(memory) + lane * V;
    ChannelAffine* affine = reinterpret_cast<ChannelAffine*>(memory + keep * (32 * V * sizeof(T)));
    TileRows at = TileRows::of<T, V>(p);
    if (keep > at.count) keep = at.count;
    {
        const char* x = static_cast<const char*>(p.x) + at.first;
        PairMoments found;
        float shifts[V];
        if (p.conv_bias) {
#pragma unroll
            for (int k = 0; k < V; ++k) shifts[k] = load_param(p.conv_bias, p.conv_bias_type, at.channel + k, 0.0f);
            read_rows<T, V, true, true>(at, x, kept, 0, keep, shifts, found);
            read_rows<T, V, false, true>(at, x, kept, keep, at.count, shifts, found);
        } else {
            read_rows<T, V, true, false>(at, x, kept, 0, keep, shifts, found);
            read_rows<T, V, false, false>(at, x, kept, keep, at.count, shifts, found);
        }
        exchange<T>(p, at, found, affine);
    }
    ChannelAffine scaled[V];
#pragma unroll
    for (int k = 0; k < V; ++k) scaled[k] = affine[place_of<ChannelAffine>(lane * V) + k];
    if (p.residual) {
        apply_rows<T, V, false, true>(p, at, kept, keep, at.count, scaled);
        apply_rows<T, V, true, true>(p, at, kept, 0, keep, scaled);
    } else {
        apply_rows<T, V, false, false>(p, at, kept, keep, at.count, scaled);
        apply_rows<T, V, true, false>(p, at, kept, 0, keep, scaled);
    }
}

}  // namespace ltxk
