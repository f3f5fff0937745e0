// PixelNorm + SiLU on the CPU: tiles of positions that stay in cache between the sum of squares and the scaling.
#include <vector>

#include "cpu/rows.h"

LTXK_CPU_BEGIN

#include "ltxkern/pixel_norm_silu_parameters.cuh"

// Channels summed in fp32 before they join the double total of their position. Without fused multiply-add each square is rounded too,
// which long sums would show.
#if defined(__FMA__)
constexpr i64 kFold = 16;
#else
constexpr i64 kFold = 4;
#endif
// Channels ahead of the one that is read: the next one lies too far away for the hardware to foresee.
constexpr i64 kAhead = 8;

// Positions of a tile: its channels stay in the second-level cache between the two sweeps.
template <class T>
static i64 tile_of(i64 channels) {
    i64 tile = (i64{384} << 10) / (channels * static_cast<i64>(sizeof(T))) / kBlock * kBlock;
    return tile < kBlock ? kBlock : tile > 2048 ? 2048 : tile;
}

// `count` positions of all channels. Sums and factors lie in the order of load_block.
template <class T, bool kStream>
static void contiguous_tile(const PixelNormSilu& p, const T* x, T* out, i64 count, const float* weight, float* squares, double* total) {
    i64 body = count / kBlock * kBlock;
    for (i64 i = 0; i < count; ++i) total[i] = 0.0;
    for (i64 c0 = 0; c0 < p.channels; c0 += kFold) {
        i64 end = c0 + kFold < p.channels ? c0 + kFold : p.channels;
        for (i64 i = 0; i < count; ++i) squares[i] = 0.0f;
        for (i64 c = c0; c < end; ++c) {
            const T* row = x + c * p.positions;
            for (i64 i = 0; i < body; i += kBlock) {
                Floats v[kVectors];
                for (i64 k = 0; k < kBlock; k += 64 / static_cast<i64>(sizeof(T))) prefetch_line(row + kAhead * p.positions + i + k);
                load_block(row + i, v);
                for (int k = 0; k < kVectors; ++k) {
                    float* sums = squares + i + k * kLanes;
                    store_lanes(sums, load_lanes(sums) + v[k] * v[k]);
                }
            }
            over_registers(count - body, [&](i64 i, auto n) {
                Floats v = load_n(row + body + i, n);
                store_n(squares + body + i, load_n(squares + body + i, n) + v * v, n);
            });
        }
        for (i64 i = 0; i < count; ++i) total[i] += squares[i];
    }
    for (i64 i = 0; i < count; ++i)
        squares[i] = static_cast<float>(1.0 / __builtin_sqrt(total[i] / static_cast<double>(p.channels) + p.eps));
    for (i64 c = 0; c < p.channels; ++c) {
        const T* row = x + c * p.positions;
        T* to = out + c * p.out_channel;
        bool stream = kStream && reinterpret_cast<std::uintptr_t>(to) % kStreamAlignment == 0;
        for (i64 i = 0; i < body; i += kBlock) {
            Floats v[kVectors];
            load_block(row + i, v);
            for (int k = 0; k < kVectors; ++k) v[k] *= load_lanes(squares + i + k * kLanes) * weight[c];
            silu_vectors(v);
            stream ? store_block<kStream>(to + i, v) : store_block<false>(to + i, v);
        }
        over_registers(count - body, [&](i64 i, auto n) {
            store_n(to + body + i, silu_lanes(load_n(row + body + i, n) * load_n(squares + body + i, n) * weight[c]), n);
        });
    }
}

// All channels of one position.
template <class T>
static void channels_last_row(const PixelNormSilu& p, const T* x, T* out, const float* weight) {
    float factor = inverse_rms(p.channels, p.eps, [&](i64 i, auto n) { return load_n(x + i, n); });
    store_silu(out, p.channels, [&](i64 i, auto n) { return load_n(x + i, n) * factor * load_n(weight + i, n); });
}

template <class T>
static void pixel_norm_silu(const void* parameters, int threads) {
    const PixelNormSilu& p = *static_cast<const PixelNormSilu*>(parameters);
    const T* x = static_cast<const T*>(p.x);
    T* out = static_cast<T*>(p.out);
    std::vector<float> weights(static_cast<std::size_t>(p.channels));
    for (i64 c = 0; c < p.channels; ++c) weights[c] = load_param(p.weight, p.weight_type, c, 1.0f);
    const float* weight = weights.data();
    i64 tile = tile_of<T>(p.channels), tiles = (p.positions + tile - 1) / tile;
    bool stream = out != x && streams(2 * p.samples * p.channels * p.positions * static_cast<i64>(sizeof(T)));

#pragma omp parallel num_threads(threads)
    {
        if (p.channels_last) {
#pragma omp for schedule(static)
            for (i64 i = 0; i < p.samples * p.positions; ++i) channels_last_row(p, x + i * p.channels, out + i * p.channels, weight);
        } else {
            std::vector<float> squares(static_cast<std::size_t>(tile));
            std::vector<double> total(static_cast<std::size_t>(tile));
#pragma omp for schedule(static)
            for (i64 i = 0; i < p.samples * tiles; ++i) {
                i64 sample = i / tiles, first = i % tiles * tile;
                const T* from = x + sample * p.channels * p.positions + first;
                T* to = out + sample * p.out_sample + first;
                i64 count = p.positions - first < tile ? p.positions - first : tile;
                auto run = stream ? contiguous_tile<T, true> : contiguous_tile<T, false>;
                run(p, from, to, count, weight, squares.data(), total.data());
            }
            end_streaming();
        }
    }
}

LTXK_CPU_END

LTXK_CPU_KERNEL("pixel_norm_silu<f32>", pixel_norm_silu<float>)
LTXK_CPU_KERNEL("pixel_norm_silu<f16>", pixel_norm_silu<f16>)
LTXK_CPU_KERNEL("pixel_norm_silu<bf16>", pixel_norm_silu<bf16>)
