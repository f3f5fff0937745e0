// RMSNorm + modulation of rows, alone and behind a gated residual, once or twice. The second look at a row comes from the L1 cache.
#pragma once

#include "ltxkern/rows.cuh"

namespace ltxk {

#include "ltxkern/rms_norm_modulate_parameters.cuh"

// Blocks of a multiprocessor for which the compilers do not spill: of rows, and of packs behind a gated residual.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kRowBlocks = 4, kGatedBlocks = 3;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 12
constexpr int kRowBlocks = 3, kGatedBlocks = 3;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 10 && __CUDACC_VER_MAJOR__ < 13
constexpr int kRowBlocks = 3, kGatedBlocks = 4;
#else
constexpr int kRowBlocks = 4, kGatedBlocks = 4;
#endif

// x + y gate, rounded to x's dtype: what is stored is what is normalised.
template <int V>
LTXK_DEVICE void gated_sum(const RmsNormModulate& p, i64 x_row, i64 y_row, i64 gate_row, i64 column, float (&values)[V]) {
    Raw<V> raw_x = load_raw<V>(p.x.data, p.x.type, x_row + column), raw_y = load_raw<V>(p.y.data, p.y.type, y_row + column);
    Raw<V> raw_gate = load_raw<V>(p.gate.data, p.gate.type, gate_row + column);
    float y[V], gate[V];
    convert(raw_x, p.x.type, values);
    convert(raw_y, p.y.type, y);
    convert(raw_gate, p.gate.type, gate);
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = round_through(values[k] + product(y[k], gate[k]), p.x.type);
}

// One modulation of a row whose inverse RMS is known. A thread reads back only what it wrote itself.
template <int V>
LTXK_DEVICE void modulate_row(const RmsNormModulate& p, i64 dense, i64 x_row, float rstd, const RowOperand& scales, i64 scale_row,
                              const RowOperand& shifts, i64 shift_row, void* out) {
    bool gated = p.y.data != nullptr;
    i64 step = static_cast<i64>(blockDim.x) * V;
    for (i64 column = static_cast<i64>(threadIdx.x) * V; column < p.width; column += step) {
        Raw<V> raw = gated ? load_raw<V>(p.summed, p.x.type, dense + column) : load_raw<V>(p.x.data, p.x.type, x_row + column);
        Raw<V> raw_scale = load_raw<V>(scales.data, scales.type, scale_row + column);
        Raw<V> raw_shift = load_raw<V>(shifts.data, shifts.type, shift_row + column);
        float values[V], scale[V], shift[V];
        convert(raw, p.x.type, values);
        convert(raw_scale, scales.type, scale);
        convert(raw_shift, shifts.type, shift);
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] *= rstd;
        if (p.weight) {
            float weight[V];
            load_typed(p.weight, p.weight_type, column, weight);
#pragma unroll
            for (int k = 0; k < V; ++k) values[k] *= weight[k];
        }
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] = values[k] * (1.0f + scale[k]) + shift[k];
        store_typed(out, p.x.type, dense + column, values);
    }
}

// Block = one row; a thread meets the same columns in all passes.
template <int V>
__global__ void __launch_bounds__(256, kRowBlocks) rms_norm_modulate_rows(RmsNormModulate p) {
    LTXK_SHARED(RowSum, scratch);
    i64 row = blockIdx.x, outer = row / p.inner, inner = row - outer * p.inner, dense = row * p.width;
    i64 x_row = p.x.row(outer, inner), step = static_cast<i64>(blockDim.x) * V, start = static_cast<i64>(threadIdx.x) * V;
    bool gated = p.y.data != nullptr;
    i64 y_row = gated ? p.y.row(outer, inner) : 0;
    if (!p.index.find(outer, inner)) {
        for (i64 column = start; column < p.width; column += step) {
            if (gated) store_nan<V>(p.summed, p.x.type, dense + column);
            if (p.out2) store_nan<V>(p.out2, p.x.type, dense + column);
            store_nan<V>(p.out, p.x.type, dense + column);
        }
        return;
    }
    float sum = 0.0f;
    for (i64 column = start; column < p.width; column += step) {
        float values[V];
        if (gated) {
            gated_sum(p, x_row, y_row, p.gate.row(outer, inner), column, values);
            store_typed(p.summed, p.x.type, dense + column, values);
        } else {
            load_row(p.x, x_row + column, values);
        }
#pragma unroll
        for (int k = 0; k < V; ++k) sum += values[k] * values[k];
    }
    float rstd = inverse_rms(sum_row(sum, scratch), p.width, p.eps);
#pragma unroll 1
    for (int second = 0; second < (p.out2 ? 2 : 1); ++second) {
        const RowOperand &scale = second ? p.scale2 : p.scale, &shift = second ? p.shift2 : p.shift;
        modulate_row<V>(p, dense, x_row, rstd, scale, scale.row(outer, inner), shift, shift.row(outer, inner), second ? p.out2 : p.out);
    }
}

// What a launch of whole packs adds: all strides and the width are counted in packs.
struct RmsNormModulatePacks : RmsNormModulate {
    i64 by_inner;              // divides a row by `inner`
    i64 inverse_width, least;  // bits of two floats: 1 / elements of a row, and eps
};

// The same numbers, for which the compiler keeps no register.
#if defined(__CUDA_ARCH__)
LTXK_DEVICE u32 block_again() {
    u32 number;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(number));
    return number;
}
LTXK_DEVICE u32 thread_again() {
    u32 number;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
    return number;
}
#else
LTXK_DEVICE u32 block_again() { return blockIdx.x; }
LTXK_DEVICE u32 thread_again() { return threadIdx.x; }
#endif

template <class M, int V, int kAhead>
LTXK_DEVICE void load_ahead(int first, Raw<V> (&scale)[kPacks], Raw<V> (&shift)[kPacks], const char* scale_at, const char* shift_at) {
#pragma unroll
    for (int j = first; j < first + kAhead; ++j) {
        scale[j] = load_pack<M, V>(scale_at, j);
        shift[j] = load_pack<M, V>(shift_at, j);
    }
}

// One modulation of a row in registers; the first packs of scale and shift are there already.
template <class T, class M>
LTXK_DEVICE void modulate_packs(const Raw<kVector<T>> (&x)[kPacks], float rstd, Raw<kVector<T>> (&scale)[kPacks], Raw<kVector<T>> (&shift)[kPacks],
                                const char* scale_at, const char* shift_at, char* out) {
    constexpr int V = kVector<T>, kAhead = kAtOnce<T, M> / 2;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
        if (j >= kAhead && j % kAhead == 0) load_ahead<M, V, kAhead>(j, scale, shift, scale_at, shift_at);
        float values[V];
#pragma unroll
        for (int k = 0; k < V; ++k)
            values[k] = element<T>(x[j], k) * rstd * (1.0f + element<M>(scale[j], k)) + element<M>(shift[j], k);
        store_pack<T>(out, j, rounded_pack<T>(values));
    }
}

// Block = one row, whole in its registers, so that x is read once. Activations are T, all modulation is M.
template <class T, class M, bool kGated>
__global__ void __launch_bounds__(256, !kGated ? 4 : sizeof(M) > sizeof(T) ? 3 : kGatedBlocks) rms_norm_modulate_packs(RmsNormModulatePacks p) {
    constexpr int V = kVector<T>, kAhead = kAtOnce<T, M> / 2;
    LTXK_SHARED(RowSum, scratch);
    u32 row = blockIdx.x, outer = divide(row, p.by_inner), inner = row - outer * static_cast<u32>(p.inner);
    u32 column = threadIdx.x + 3 * (threadIdx.x & ~31u), dense = row * static_cast<u32>(p.width) + column;
    // Kept along, a row's place costs registers that its values need.
    auto find_again = [&] {
        row = block_again(), outer = divide(row, p.by_inner), inner = row - outer * static_cast<u32>(p.inner);
        column = thread_again() + 3 * (thread_again() & ~31u), dense = row * static_cast<u32>(p.width) + column;
        find_row(p.index, outer, inner);
    };
    const char* x_at = pack_address<T, V>(p.x.data, packed_row(p.x, outer, inner) + column);
    char *out = pack_address<T, V>(p.out, dense), *summed = kGated ? pack_address<T, V>(p.summed, dense) : nullptr;
    Raw<V> x[kPacks], y[kPacks];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) x[j] = load_pack<T, V>(x_at, j);
    if constexpr (kGated) {
        const char* y_at = pack_address<T, V>(p.y.data, packed_row(p.y, outer, inner) + column);
#pragma unroll
        for (int j = 0; j < kPacks; ++j) y[j] = load_pack<T, V>(y_at, j);
    }
    if (!find_row(p.index, outer, inner)) {
#pragma unroll
        for (int j = 0; j < kPacks; ++j) {
            if constexpr (kGated) store_pack<T>(summed, j, nan_pack<T, V>());
            if (kGated && p.out2) store_pack<T>(pack_address<T, V>(p.out2, dense), j, nan_pack<T, V>());
            store_pack<T>(out, j, nan_pack<T, V>());
        }
        return;
    }
    if constexpr (kGated) {
        const char* gate_at = pack_address<M, V>(p.gate.data, packed_row(p.gate, outer, inner) + column);
        // What is stored is what is normalised.
        each_gated<T, M>(x, y, gate_at, [&](int j, const Raw<V>& total) { store_pack<T>(summed, j, x[j] = total); });
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
#pragma unroll
        for (int k = 0; k < V; ++k) sum += element<T>(x[j], k) * element<T>(x[j], k);
    }
    if constexpr (kGated) find_again();
    const char* scale_at = pack_address<M, V>(p.scale.data, packed_row(p.scale, outer, inner) + column);
    const char* shift_at = pack_address<M, V>(p.shift.data, packed_row(p.shift, outer, inner) + column);
    Raw<V> scale[kPacks], shift[kPacks];
    // The first of them are on their way while the block sums.
    load_ahead<M, V, kAhead>(0, scale, shift, scale_at, shift_at);
    sum = sum_short_row(sum, scratch);
    float rstd = inverse_root(sum * float_of(p.inverse_width) + float_of(p.least));
    modulate_packs<T, M>(x, rstd, scale, shift, scale_at, shift_at, kGated ? pack_address<T, V>(p.out, dense) : out);
    if constexpr (kGated) {
        if (p.out2 == nullptr) return;
        find_again();
        scale_at = pack_address<M, V>(p.scale2.data, packed_row(p.scale2, outer, inner) + column);
        shift_at = pack_address<M, V>(p.shift2.data, packed_row(p.shift2, outer, inner) + column);
        load_ahead<M, V, kAhead>(0, scale, shift, scale_at, shift_at);
        modulate_packs<T, M>(x, rstd, scale, shift, scale_at, shift_at, pack_address<T, V>(p.out2, dense));
    }
}

}  // namespace ltxk
