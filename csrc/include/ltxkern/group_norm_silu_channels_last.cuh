// The two passes of GroupNorm + SiLU for channels-last activations: a thread owns the channels of one 16-byte access.
//
// Rows of memory are positions, (n, position, channel). Statistics are per channel and chunk of positions, so that partials, their
// merging and the folding of conv_bias are those of the contiguous layout.
#pragma once

#include "ltxkern/group_norm_silu.cuh"

namespace ltxk {

// Where a thread works: its first channel, its first position, and how many positions of the chunk there are.
struct ColumnThread {
    u32 sample, chunk, lane, row;
    i64 channel, first, count;

    LTXK_DEVICE ColumnThread(const GroupNormTwoPass& p, u32 tile, int vector) {
        u32 chunks = static_cast<u32>(p.chunks), lanes = static_cast<u32>(p.lanes);
        sample = tile / chunks;
        chunk = tile % chunks;
        lane = threadIdx.x % lanes;
        row = threadIdx.x / lanes;
        channel = (static_cast<i64>(blockIdx.y) * lanes + lane) * vector;
        first = chunk * p.chunk;
        count = p.positions - first < p.chunk ? p.positions - first : p.chunk;
    }
};

template <int V>
struct ColumnScratch {
    Partial partial[256 * V];
};

// Block = one chunk of positions of one sample, and up to 256 * V channels.
template <class T, int V>
__global__ void __launch_bounds__(256, 2) group_norm_stats_columns(GroupNormTwoPass p) {
    LTXK_SHARED(ColumnScratch<V>, scratch);
    constexpr int kBatch = 8;
    ColumnThread at(p, blockIdx.x, V);
    i64 rows = p.rows;
    bool active = at.row < rows && at.channel < p.channels;
    float mean[V], m2[V], count = 0.0f;
#pragma unroll
    for (int k = 0; k < V; ++k) mean[k] = m2[k] = 0.0f;
    if (active) {
        const T* x = static_cast<const T*>(p.x) + (at.sample * p.positions + at.first) * p.channels + at.channel;
        i64 i = at.row;
        for (; i + (kBatch - 1) * rows < at.count; i += kBatch * rows) {
            Pack<T, V> packs[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; ++b) packs[b] = load<T, V>(x + (i + b * rows) * p.channels);
            float share = kBatch * fast_reciprocal(count + kBatch);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                float sum = 0.0f, squared = 0.0f;
#pragma unroll
                for (int b = 0; b < kBatch; ++b) sum += to_float(packs[b].value[k]);
                float batch_mean = sum * (1.0f / kBatch);
#pragma unroll
                for (int b = 0; b < kBatch; ++b) {
                    float d = to_float(packs[b].value[k]) - batch_mean;
                    squared += d * d;
                }
                float delta = batch_mean - mean[k];
                mean[k] += delta * share;
                m2[k] += squared + delta * delta * count * share;
            }
            count += kBatch;
        }
        for (; i < at.count; i += rows) {
            Pack<T, V> pack = load<T, V>(x + i * p.channels);
            float share = fast_reciprocal(count + 1.0f);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                float delta = to_float(pack.value[k]) - mean[k];
                mean[k] += delta * share;
                m2[k] += delta * delta * count * share;
            }
            count += 1.0f;
        }
#pragma unroll
        for (int k = 0; k < V; ++k) scratch.partial[(at.row * p.lanes + at.lane) * V + k] = {mean[k], m2[k]};
    }
    __syncthreads();
    u32 width = static_cast<u32>(p.lanes) * V;
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) {
        i64 channel = static_cast<i64>(blockIdx.y) * width + c;
        if (channel >= p.channels) continue;
        // Chan's rule for all rows at once, about the first one's mean.
        auto taken = [&](u32 r) { return at.count > r ? static_cast<float>((at.count - r - 1) / static_cast<u32>(rows) + 1) : 0.0f; };
        float per_element = fast_reciprocal(static_cast<float>(at.count)), pivot = scratch.partial[c].mean, shifted = 0.0f, sum = 0.0f;
        for (u32 r = 1; r < rows; ++r) shifted += (scratch.partial[r * width + c].mean - pivot) * (taken(r) * per_element);
        float centre = pivot + shifted;
        for (u32 r = 0; r < rows; ++r) {
            Partial partial = scratch.partial[r * width + c];
            float delta = partial.mean - centre;
            sum += partial.m2 + delta * delta * taken(r);
        }
        float shift = load_param(p.conv_bias, p.conv_bias_type, channel, 0.0f);
        p.partials[(at.sample * p.channels + channel) * p.chunks + at.chunk] = {centre + shift, sum};
    }
}

// Same blocks as the statistics, walked backwards.
template <class T, int V>
__global__ void __launch_bounds__(256, 2) group_norm_apply_columns(GroupNormTwoPass p) {
    ColumnThread at(p, gridDim.x - 1 - blockIdx.x, V);
    if (at.row >= p.rows || at.channel >= p.channels) return;
    ChannelAffine affine[V];
    u32 group_channels = static_cast<u32>(p.group_channels), groups = static_cast<u32>(p.channels) / group_channels;
#pragma unroll
    for (int k = 0; k < V; ++k) {
        u32 channel = static_cast<u32>(at.channel) + k;
        Partial final = p.finals[at.sample * groups + channel / group_channels];
        affine[k] = channel_affine(p, channel, final.mean, final.m2);
    }
    i64 base = (at.sample * p.positions + at.first) * p.channels + at.channel;
    const T* x = static_cast<const T*>(p.x) + base;
    const T* residual = p.residual ? static_cast<const T*>(p.residual) + base : nullptr;
    T* out = static_cast<T*>(p.out) + base;
    for (i64 i = at.row; i < at.count; i += p.rows) {
        i64 offset = i * p.channels;
        Pack<T, V> pack = load_streaming<T, V>(x + offset), added = {};
        if (residual) added = load_streaming<T, V>(residual + offset);
#pragma unroll
        for (int k = 0; k < V; ++k)
            pack.value[k] = round_to<T>(affine[k].apply(to_float(pack.value[k]), residual ? to_float(added.value[k]) : 0.0f));
        store_streaming<T, V>(out + offset, pack);
    }
}

}  // namespace ltxk
