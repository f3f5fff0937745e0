// PixelNorm (root mean square over the channels of a position) + SiLU: every element is read once and written once.
#pragma once

#include "ltxkern/types.cuh"

namespace ltxk {

#include "ltxkern/pixel_norm_silu_parameters.cuh"

// What a launch adds.
struct PixelNormLanes : PixelNormSilu {
    i64 lanes;  // contiguous: threads along positions; channels-last: threads along channels (a power of two up to 32)
};

LTXK_DEVICE float inverse_root_mean_square(const PixelNormSilu& p, float sum) {
    return fast_rsqrt(sum * fast_reciprocal(static_cast<float>(p.channels)) + static_cast<float>(p.eps));
}

struct PixelSums {
    float sum[256 * 8];
};

// Contiguous. Block = lanes * V positions of one sample with all their channels, which stay in shared memory; threads beyond `lanes`
// take further channels, and each meets its own elements again.
template <class T, int V>
__global__ void __launch_bounds__(256, 2) pixel_norm_rows(PixelNormLanes p) {
    LTXK_SHARED(PixelSums, sums);
    LTXK_DYNAMIC_SHARED(unsigned char, memory);
    T* kept = reinterpret_cast<T*>(memory);
    u32 lanes = static_cast<u32>(p.lanes), rows = blockDim.x / lanes, lane = threadIdx.x % lanes, row = threadIdx.x / lanes;
    u32 width = lanes * V, channels = static_cast<u32>(p.channels);
    u32 tiles = static_cast<u32>((p.positions + width - 1) / width), sample = blockIdx.x / tiles;
    i64 position = static_cast<i64>(blockIdx.x % tiles) * width + lane * V;
    bool active = position < p.positions;
    i64 base = sample * p.channels * p.positions + position;
    const T* x = static_cast<const T*>(p.x) + base;
    float squares[V];
#pragma unroll
    for (int k = 0; k < V; ++k) squares[k] = 0.0f;
    if (active) {
#pragma unroll 4
        for (u32 c = row; c < channels; c += rows) {
            Pack<T, V> pack = load_streaming<T, V>(x + c * p.positions);
            store<T, V>(kept + c * width + lane * V, pack);
#pragma unroll
            for (int k = 0; k < V; ++k) squares[k] += to_float(pack.value[k]) * to_float(pack.value[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) sums.sum[row * width + lane * V + k] = squares[k];
    __syncthreads();
    if (!active) return;
    float scale[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
        float sum = 0.0f;
        for (u32 r = 0; r < rows; ++r) sum += sums.sum[r * width + lane * V + k];
        scale[k] = inverse_root_mean_square(p, sum);
    }
    T* out = static_cast<T*>(p.out) + base;
#pragma unroll 2
    for (u32 c = row; c < channels; c += rows) {
        Pack<T, V> pack = load<T, V>(kept + c * width + lane * V);
        float weight = load_param(p.weight, p.weight_type, c, 1.0f);
#pragma unroll
        for (int k = 0; k < V; ++k) pack.value[k] = round_to<T>(silu<T>(to_float(pack.value[k]) * scale[k] * weight * kSiluFactor<T>));
        store_streaming<T, V>(out + c * p.positions, pack);
    }
}

// Channels-last. `lanes` threads of a warp share one position; they hold up to HELD accesses each in registers and read the rest again.
template <class T, int V, int HELD>
__global__ void __launch_bounds__(256, 3) pixel_norm_columns(PixelNormLanes p) {
    u32 lanes = static_cast<u32>(p.lanes), lane = threadIdx.x % lanes, channels = static_cast<u32>(p.channels), step = lanes * V;
    i64 position = static_cast<i64>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
    // Lanes past the end join the shuffles on the last position and store nothing.
    bool active = position < p.samples * p.positions;
    i64 base = (active ? position : p.samples * p.positions - 1) * p.channels;
    const T* x = static_cast<const T*>(p.x) + base;
    T* out = static_cast<T*>(p.out) + base;
    Pack<T, V> held[HELD];
    float sum = 0.0f;
    auto add = [&](const Pack<T, V>& pack) {
        float part = 0.0f;
#pragma unroll
        for (int k = 0; k < V; ++k) part += to_float(pack.value[k]) * to_float(pack.value[k]);
        sum += part;
    };
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
        u32 c = lane * V + h * step;
        if (c < channels) held[h] = load_streaming<T, V>(x + c);
    }
#pragma unroll
    for (int h = 0; h < HELD; ++h)
        if (lane * V + h * step < channels) add(held[h]);
    for (u32 c = lane * V + HELD * step; c < channels; c += step) add(load<T, V>(x + c));
    for (u32 bits = lanes / 2; bits > 0; bits >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
    if (!active) return;
    float scale = inverse_root_mean_square(p, sum);
    auto emit = [&](Pack<T, V> pack, u32 c) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
            float weight = load_param(p.weight, p.weight_type, c + k, 1.0f);
            pack.value[k] = round_to<T>(silu<T>(to_float(pack.value[k]) * scale * weight * kSiluFactor<T>));
        }
        store_streaming<T, V>(out + c, pack);
    };
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
        u32 c = lane * V + h * step;
        if (c < channels) emit(held[h], c);
    }
    for (u32 c = lane * V + HELD * step; c < channels; c += step) emit(load<T, V>(x + c), c);
}

}  // namespace ltxk
