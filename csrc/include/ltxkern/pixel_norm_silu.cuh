// PixelNorm (root mean square over the channels of a position) + SiLU: every element is read once and written once.
#pragma once

#include "ltxkern/moments.cuh"
#include "ltxkern/types.cuh"

namespace ltxk {

#include "ltxkern/pixel_norm_silu_parameters.cuh"

// What a launch adds.
struct PixelNormLanes : PixelNormSilu {
    i64 lane_bits;        // 1 << lane_bits threads lie along positions (contiguous) or along channels (channels-last): up to 32
    i64 tiles, by_tiles;  // contiguous: blocks of one sample, and what divides by them
    i64 walk;             // channels-last: positions that a thread takes one after the other
    double per_channel;   // 1 / channels
};

// With the factor that T's silu asks for.
template <class T>
LTXK_DEVICE float inverse_root_mean_square(const PixelNormSilu& p, float sum, double per_channel) {
    float share = static_cast<float>(per_channel), quick = sum * share;
    float mean = nearer(quick, fused(fused(-static_cast<float>(p.channels), quick, sum), share, quick));
    return inverse_root(mean + static_cast<float>(p.eps)) * kSiluFactor<T>;
}

// The sums of up to 8 warps, then the factor of every position: four positions of a lane side by side, no bank twice.
struct PixelSums {
    alignas(16) float sum[8 * 256];
};

// Contiguous. Block = lanes * V positions of one sample with all their channels, which stay in shared memory; the threads of further
// rows take further channels, and each meets its own elements again. Behind the channels lie the weights in fp32, if there are any.
template <class T, int V>
__global__ void __launch_bounds__(256, 2) pixel_norm_rows(PixelNormLanes p) {
    LTXK_SHARED(PixelSums, sums);
    LTXK_DYNAMIC_SHARED(unsigned char, memory);
    constexpr int kBatch = 4, kPart = V < 4 ? V : 4;
    u32 bits = static_cast<u32>(p.lane_bits), lanes = 1u << bits, lane = threadIdx.x & (lanes - 1), row = threadIdx.x >> bits;
    u32 rows = blockDim.x >> bits, width = lanes * V, channels = static_cast<u32>(p.channels), warps = blockDim.x / 32;
    u32 sample = divide(blockIdx.x, p.by_tiles), tile = blockIdx.x - sample * static_cast<u32>(p.tiles);
    i64 position = static_cast<i64>(tile) * width + lane * V, base = sample * p.channels * p.positions + position;
    i64 stride = rows * p.positions;
    bool active = position < p.positions;
    float* weights = reinterpret_cast<float*>(memory + channels * width * sizeof(T));
    if (p.weight)
        for (u32 c = threadIdx.x; c < channels; c += blockDim.x) weights[c] = load_param(p.weight, p.weight_type, c, 1.0f);
    T* kept = reinterpret_cast<T*>(memory) + row * width + lane * V;
    float squares[V];
#pragma unroll
    for (int k = 0; k < V; ++k) squares[k] = 0.0f;
    auto take = [&](const Pack<T, V>& pack, T* place) {
        store<T, V>(place, pack);
        float values[V];
        unpack(pack, values);
#pragma unroll
        for (int k = 0; k < V; ++k) squares[k] = fused(values[k], values[k], squares[k]);
    };
    if (active) {
        const T* x = static_cast<const T*>(p.x) + base + row * p.positions;
        T* place = kept;
        u32 c = row, step = rows * width;
        for (; c + (kBatch - 1) * rows < channels; c += kBatch * rows) {
            Pack<T, V> packs[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; ++b, x += stride) packs[b] = load_streaming<T, V>(x);
#pragma unroll
            for (int b = 0; b < kBatch; ++b, place += step) take(packs[b], place);
        }
        for (; c < channels; c += rows, x += stride, place += step) take(load_streaming<T, V>(x), place);
    }
    for (u32 apart = lanes; apart < 32; apart <<= 1) {
#pragma unroll
        for (int k = 0; k < V; ++k) squares[k] += __shfl_xor_sync(0xffffffffu, squares[k], apart);
    }
    if (threadIdx.x % 32 < lanes) {
#pragma unroll
        for (int k = 0; k < V; k += kPart) {
            Pack<float, kPart> part;
#pragma unroll
            for (int i = 0; i < kPart; ++i) part.value[i] = squares[k + i];
            store<float, kPart>(sums.sum + threadIdx.x / 32 * width + k * lanes + lane * kPart, part);
        }
    }
    __syncthreads();
    for (u32 s = threadIdx.x; s < width; s += blockDim.x) {
        float sum = 0.0f;
#pragma unroll
        for (u32 w = 0; w < 8; ++w)
            if (w < warps) sum += sums.sum[w * width + s];
        sums.sum[s] = inverse_root_mean_square<T>(p, sum, p.per_channel);
    }
    __syncthreads();
    if (!active) return;
    float scale[V];
#pragma unroll
    for (int k = 0; k < V; k += kPart) {
        Pack<float, kPart> part = load<float, kPart>(sums.sum + k * lanes + lane * kPart);
#pragma unroll
        for (int i = 0; i < kPart; ++i) scale[k + i] = part.value[i];
    }
    T* out = static_cast<T*>(p.out) + sample * p.out_sample + row * p.out_channel + position;
    i64 out_stride = rows * p.out_channel;
    auto emit = [&](auto finish) {
        u32 step = rows * width;
#pragma unroll 8
        for (u32 c = row; c < channels; c += rows, out += out_stride, kept += step) {
            float values[V];
            unpack(load<T, V>(kept), values);
            finish(values, c);
            store_streaming<T, V>(out, rounded<T, V>(values));
        }
    };
    if (p.weight) {
        emit([&](float (&values)[V], u32 c) {
            float weight = weights[c];
#pragma unroll
            for (int k = 0; k < V; ++k) values[k] = silu<T>(values[k] * scale[k] * weight);
        });
    } else {
        emit([&](float (&values)[V], u32) {
#pragma unroll
            for (int k = 0; k < V; ++k) values[k] = silu<T>(values[k] * scale[k]);
        });
    }
}

// Blocks of a multiprocessor for which the compilers do not spill.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ / 100 == 12)
constexpr int kColumnBlocks = 3;
#else
constexpr int kColumnBlocks = 4;
#endif

// What a generic function takes at compile time.
template <bool V>
struct Constant {
    static constexpr bool value = V;
};

// Channels-last. The lanes of one position hold up to HELD accesses each in registers and read the rest again; a warp has as many
// positions as there is room for, and `walk` such sets one after the other.
template <class T, int V, int HELD>
__global__ void __launch_bounds__(256, HELD > 4 ? 2 : kColumnBlocks) pixel_norm_columns(PixelNormLanes p) {
    u32 bits = static_cast<u32>(p.lane_bits), lane = threadIdx.x & ((1u << bits) - 1), channels = static_cast<u32>(p.channels);
    u32 step = V << bits, first = lane * V, together = blockDim.x >> bits, walk = static_cast<u32>(p.walk);
    i64 position = static_cast<i64>(blockIdx.x) * together * walk + (threadIdx.x >> bits), all = p.samples * p.positions;
    const T* x = static_cast<const T*>(p.x) + position * channels + first;
    T* out = static_cast<T*>(p.out) + position * channels + first;
    i64 stride = static_cast<i64>(together) * channels;
    u32 mine = channels > first ? channels - first : 0;
    bool whole = channels == HELD * step;
    auto over_positions = [&](auto full, auto finish) {
        constexpr bool kFull = decltype(full)::value;
        for (u32 i = 0; i < walk; ++i, position += together, x += stride, out += stride) {
            // Lanes past the end join the shuffles and store nothing.
            u32 here = position < all ? mine : 0;
            // A position that fills its lanes has all accesses, or none past the end.
            auto each = [&](auto use) {
                if (kFull && here == 0) return;
#pragma unroll
                for (int h = 0; h < HELD; ++h)
                    if (kFull || h * step < here) use(h);
            };
            Pack<T, V> held[HELD];
            float sum = 0.0f;
            auto add = [&](const Pack<T, V>& pack) {
                float part = 0.0f, values[V];
                unpack(pack, values);
#pragma unroll
                for (int k = 0; k < V; ++k) part = fused(values[k], values[k], part);
                sum += part;
            };
            each([&](int h) { held[h] = load_streaming<T, V>(x + h * step); });
            each([&](int h) { add(held[h]); });
            for (u32 c = HELD * step; !kFull && c < here; c += step) add(load<T, V>(x + c));
            for (u32 apart = 1u << bits >> 1; apart > 0; apart >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
            float scale = inverse_root_mean_square<T>(p, sum, p.per_channel);
            auto emit = [&](const Pack<T, V>& pack, u32 c) {
                float values[V];
                unpack(pack, values);
                finish(values, scale, first + c);
                store_streaming<T, V>(out + c, rounded<T, V>(values));
            };
            each([&](int h) { emit(held[h], h * step); });
            for (u32 c = HELD * step; !kFull && c < here; c += step) emit(load<T, V>(x + c), c);
        }
    };
    auto weighted = [&](float (&values)[V], float scale, u32 c) {
        float weights[V];
        load_params(p.weight, p.weight_type, c, weights);
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] = silu<T>(values[k] * scale * weights[k]);
    };
    auto plain = [&](float (&values)[V], float scale, u32) {
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] = silu<T>(values[k] * scale);
    };
    if (p.weight) over_positions(Constant<false>{}, weighted);
    else if (whole) over_positions(Constant<true>{}, plain);
    else over_positions(Constant<false>{}, plain);
}

}  // namespace ltxk
