// PixelNorm + SiLU on the CPU: tiles of positions that stay in cache between the sum of squares and the scaling.
#include <vector>

#include "cpu/cpu.h"

LTXK_CPU_BEGIN

struct PixelNormSilu {
    const void* x;
    void* out;
    const void* weight;
    i64 weight_type;
    i64 samples, channels, positions, channels_last;
    double eps;
};

// Channels summed in fp32 before they join the double total of their position, and the type of a row's partial sums. Without fused
// multiply-add each square is rounded too, which sums of fp32 would show.
#if defined(__FMA__)
constexpr i64 kFold = 16;
using PartialSum = float;
#else
constexpr i64 kFold = 4;
using PartialSum = double;
#endif

template <class T>
static void contiguous_tile(const PixelNormSilu& p, const T* x, T* out, i64 count, const float* weight, float* row, float* squares,
                            double* total) {
    for (i64 i = 0; i < count; ++i) total[i] = 0.0;
    for (i64 c0 = 0; c0 < p.channels; c0 += kFold) {
        i64 end = c0 + kFold < p.channels ? c0 + kFold : p.channels;
        for (i64 i = 0; i < count; ++i) squares[i] = 0.0f;
        for (i64 c = c0; c < end; ++c) {
            widen(x + c * p.positions, row, count);
#pragma omp simd
            for (i64 i = 0; i < count; ++i) squares[i] += row[i] * row[i];
        }
        for (i64 i = 0; i < count; ++i) total[i] += squares[i];
    }
    for (i64 i = 0; i < count; ++i)
        squares[i] = static_cast<float>(1.0 / __builtin_sqrt(total[i] / static_cast<double>(p.channels) + p.eps));
    for (i64 c = 0; c < p.channels; ++c) {
        widen(x + c * p.positions, row, count);
        float scale = weight[c];
#pragma omp simd
        for (i64 i = 0; i < count; ++i) row[i] = silu(row[i] * squares[i] * scale);
        narrow(row, out + c * p.positions, count);
    }
}

template <class T>
static void channels_last_row(const PixelNormSilu& p, const T* x, T* out, const float* weight, float* row) {
    widen(x, row, p.channels);
    double total = 0.0;
    for (i64 c0 = 0; c0 < p.channels; c0 += 256) {
        i64 count = p.channels - c0 < 256 ? p.channels - c0 : 256;
        const float* v = row + c0;
        PartialSum sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 c = 0; c < count; ++c) sum += static_cast<PartialSum>(v[c]) * v[c];
        total += sum;
    }
    float scale = static_cast<float>(1.0 / __builtin_sqrt(total / static_cast<double>(p.channels) + p.eps));
#pragma omp simd
    for (i64 c = 0; c < p.channels; ++c) row[c] = silu(row[c] * scale * weight[c]);
    narrow(row, out, p.channels);
}

template <class T>
static void pixel_norm_silu(const void* parameters, int threads) {
    const PixelNormSilu& p = *static_cast<const PixelNormSilu*>(parameters);
    const T* x = static_cast<const T*>(p.x);
    T* out = static_cast<T*>(p.out);
    std::vector<float> weights(static_cast<std::size_t>(p.channels));
    for (i64 c = 0; c < p.channels; ++c) weights[c] = load_param(p.weight, p.weight_type, c, 1.0f);
    const float* weight = weights.data();
    i64 tile = 65536 / p.channels;
    tile = tile < 64 ? 64 : tile > 2048 ? 2048 : tile;
    i64 tiles = (p.positions + tile - 1) / tile;

#pragma omp parallel num_threads(threads)
    {
        i64 width = p.channels_last ? p.channels : tile;
        std::vector<float> floats(static_cast<std::size_t>(2 * width));
        std::vector<double> total(static_cast<std::size_t>(p.channels_last ? 0 : tile));
        if (p.channels_last) {
#pragma omp for schedule(static)
            for (i64 i = 0; i < p.samples * p.positions; ++i)
                channels_last_row(p, x + i * p.channels, out + i * p.channels, weight, floats.data());
        } else {
#pragma omp for schedule(static)
            for (i64 i = 0; i < p.samples * tiles; ++i) {
                i64 first = i % tiles * tile, base = i / tiles * p.channels * p.positions + first;
                i64 count = p.positions - first < tile ? p.positions - first : tile;
                contiguous_tile(p, x + base, out + base, count, weight, floats.data(), floats.data() + tile, total.data());
            }
        }
    }
}

LTXK_CPU_END

LTXK_CPU_KERNEL("pixel_norm_silu<f32>", pixel_norm_silu<float>)
LTXK_CPU_KERNEL("pixel_norm_silu<f16>", pixel_norm_silu<f16>)
LTXK_CPU_KERNEL("pixel_norm_silu<bf16>", pixel_norm_silu<bf16>)
