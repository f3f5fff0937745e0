// The two passes of GroupNorm + SiLU for channels-last activations: a thread owns the channels of one 16-byte access.
//
// Rows of memory are positions, (n, position, channel). Statistics are per channel and chunk of positions, so that partials, their
// merging and the folding of conv_bias are those of the contiguous layout.
#pragma once

#include "ltxkern/group_norm_silu.cuh"

namespace ltxk {

// Where a thread works: its first channel, its place among the rows, and how many positions of the chunk there are.
struct ColumnThread {
    u32 sample, chunk, lane, row, channel, count;
    i64 first;  // element of the chunk's first position and this thread's first channel

    LTXK_DEVICE ColumnThread(const GroupNormTwoPass& p, u32 tile, int vector) {
        u32 lanes = static_cast<u32>(p.lanes);
        sample = divide(tile, p.by_chunks);
        chunk = tile - sample * static_cast<u32>(p.chunks);
        row = divide(threadIdx.x, p.by_lanes);
        lane = threadIdx.x - row * lanes;
        channel = (blockIdx.y * lanes + lane) * vector;
        i64 position = chunk * p.chunk;
        count = static_cast<u32>(p.positions - position < p.chunk ? p.positions - position : p.chunk);
        first = (sample * p.positions + position) * p.channels + channel;
    }
};

template <int V>
struct ColumnScratch {
    Partial partial[272 * V];
};

// Partials of channels, of as many positions each, to those of their groups: a thread a group.
LTXK_DEVICE void merge_groups(const GroupNormTwoPass& p, const ColumnThread& at, const Partial* channels, u32 width) {
    __syncthreads();
    u32 each = static_cast<u32>(p.group_channels), before = blockIdx.y * width;
    u32 groups = (at.sample * static_cast<u32>(p.channels) + before) / each;
    u32 here = static_cast<u32>(p.channels) - before < width ? static_cast<u32>(p.channels) - before : width;
    float count = static_cast<float>(at.count), share = fast_reciprocal(static_cast<float>(each));
    for (u32 group = threadIdx.x; group * each < here; group += blockDim.x) {
        auto partial = [&](u32 k) { return channels[place_of<Partial>(group * each + k)]; };
        float pivot = partial(0).mean, shifted = 0.0f, low = 0.0f, sum = 0.0f;
#pragma unroll 4
        for (u32 k = 0; k < each; ++k) shifted += (partial(k).mean - pivot) * share;
        float centre = pivot + shifted;
#pragma unroll 4
        for (u32 k = 0; k < each; ++k) {
            Partial one = partial(k);
            float delta = one.mean - centre;
            low += delta * share;
            sum += fused(delta * delta, count, one.m2);
        }
        p.partials[static_cast<i64>(groups + group) * p.chunks + at.chunk] = {centre + low, sum};
    }
}

// Block = one chunk of positions of one sample, and up to 256 * V channels.
template <class T, int V>
__global__ void __launch_bounds__(256, 4) group_norm_stats_columns(GroupNormTwoPass p) {
    LTXK_SHARED(ColumnScratch<V>, scratch);
    ColumnThread at(p, blockIdx.x, V);
    u32 rows = static_cast<u32>(p.rows), channels = static_cast<u32>(p.channels);
    bool active = at.row < rows && at.channel < channels;
    float mean[V], m2[V], count = 0.0f;
#pragma unroll
    for (int k = 0; k < V; ++k) mean[k] = m2[k] = 0.0f;
    Partial* own = scratch.partial + place_of<Partial>((at.row * static_cast<u32>(p.lanes) + at.lane) * V);
    if (active) {
        i64 stride = static_cast<i64>(rows) * channels;
        const T* x = static_cast<const T*>(p.x) + at.first + static_cast<i64>(at.row) * channels;
        u32 i = at.row;
        for (; i + (kBatch - 1) * rows < at.count; i += kBatch * rows) {
            Pack<T, V> packs[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; ++b, x += stride) packs[b] = load<T, V>(x);
            float share = count == 0.0f ? 1.0f : kBatch * fast_reciprocal(count + kBatch), weight = count * share;
#pragma unroll
            for (int k = 0; k < V; ++k) {
                float sum = 0.0f;
#pragma unroll
                for (int b = 0; b < kBatch; ++b) sum += to_float(packs[b].value[k]);
                float centre = sum * (1.0f / kBatch), delta = centre - mean[k];
#pragma unroll
                for (int b = 0; b < kBatch; ++b) {
                    float d = to_float(packs[b].value[k]) - centre;
                    m2[k] = fused(d, d, m2[k]);
                }
                mean[k] = fused(delta, share, mean[k]);
                m2[k] = fused(delta * delta, weight, m2[k]);
            }
            count += kBatch;
        }
        for (; i < at.count; i += rows, x += stride) {
            Pack<T, V> pack = load<T, V>(x);
            float share = count == 0.0f ? 1.0f : fast_reciprocal(count + 1.0f), weight = count * share;
#pragma unroll
            for (int k = 0; k < V; ++k) {
                float delta = to_float(pack.value[k]) - mean[k];
                mean[k] = fused(delta, share, mean[k]);
                m2[k] = fused(delta * delta, weight, m2[k]);
            }
            count += 1.0f;
        }
#pragma unroll
        for (int k = 0; k < V; ++k) own[k] = {mean[k], m2[k]};
    }
    __syncthreads();
    u32 width = static_cast<u32>(p.lanes) * V, whole = divide(at.count, p.by_rows), rest = at.count - whole * rows;
    auto taken = [&](u32 r) { return static_cast<float>(whole + (r < rest)); };
    float per_element = fast_reciprocal(static_cast<float>(at.count));
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) {
        u32 channel = blockIdx.y * width + c;
        if (channel >= channels) continue;
        // Chan's rule for all rows at once: about the first one's mean, which may lie far away, then about the mean of all.
        auto partial_of = [&](u32 r) { return scratch.partial + place_of<Partial>(r * width + c); };
        float pivot = partial_of(0)->mean, shifted = 0.0f, low = 0.0f, sum = 0.0f;
#pragma unroll 4
        for (u32 r = 1; r < rows; ++r) shifted += (partial_of(r)->mean - pivot) * (taken(r) * per_element);
        float centre = pivot + shifted;
#pragma unroll 4
        for (u32 r = 0; r < rows; ++r) {
            Partial partial = *partial_of(r);
            float delta = partial.mean - centre;
            low += delta * (taken(r) * per_element);
            sum += fused(delta * delta, taken(r), partial.m2);
        }
        Partial all = {centre + low, sum};
        if (p.merged) {
            all.mean += load_param(p.conv_bias, p.conv_bias_type, channel, 0.0f);
            *partial_of(0) = all;
        } else {
            p.partials[(static_cast<i64>(at.sample) * channels + channel) * p.chunks + at.chunk] = all;
        }
    }
    if (p.merged) merge_groups(p, at, scratch.partial, width);
}

template <class T, int V, bool RESIDUAL>
LTXK_DEVICE void apply_column(const GroupNormTwoPass& p, const ColumnThread& at, const ChannelAffine (&scaled)[V]) {
    // As many bytes in flight, and no more registers.
    constexpr int kLoads = RESIDUAL ? kBatch / 2 : kBatch;
    u32 rows = static_cast<u32>(p.rows);
    i64 stride = static_cast<i64>(rows) * p.channels, offset = at.first + static_cast<i64>(at.row) * p.channels;
    const T* x = static_cast<const T*>(p.x);
    const T* residual = static_cast<const T*>(p.residual);
    T* out = static_cast<T*>(p.out);
    auto apply = [&](const Pack<T, V>& pack, const Pack<T, V>& added, i64 to) {
        store_streaming<T, V>(out + to, normalised<T, RESIDUAL>(pack, added, scaled));
    };
    u32 i = at.row;
    for (; i + (kLoads - 1) * rows < at.count; i += kLoads * rows, offset += kLoads * stride) {
        Pack<T, V> packs[kLoads], added[RESIDUAL ? kLoads : 1];
#pragma unroll
        for (int b = 0; b < kLoads; ++b) packs[b] = load_streaming<T, V>(x + offset + b * stride);
        if constexpr (RESIDUAL) {
#pragma unroll
            for (int b = 0; b < kLoads; ++b) added[b] = load_streaming<T, V>(residual + offset + b * stride);
        }
#pragma unroll
        for (int b = 0; b < kLoads; ++b) apply(packs[b], added[RESIDUAL ? b : 0], offset + b * stride);
    }
    for (; i < at.count; i += rows, offset += stride) {
        Pack<T, V> added;
        if constexpr (RESIDUAL) added = load_streaming<T, V>(residual + offset);
        apply(load_streaming<T, V>(x + offset), added, offset);
    }
}

// Same blocks as the statistics, walked backwards.
template <class T, int V>
__global__ void __launch_bounds__(256, 4) group_norm_apply_columns(GroupNormTwoPass p) {
    ColumnThread at(p, gridDim.x - 1 - blockIdx.x, V);
    u32 channels = static_cast<u32>(p.channels);
    if (at.row >= static_cast<u32>(p.rows) || at.channel >= channels) return;
    ChannelAffine scaled[V];
#pragma unroll
    for (int k = 0; k < V; ++k) scaled[k] = p.affine[static_cast<i64>(at.sample) * channels + at.channel + k].scaled<T>();
    if (p.residual) apply_column<T, V, true>(p, at, scaled);
    else apply_column<T, V, false>(p, at, scaled);
}

}  // namespace ltxk
