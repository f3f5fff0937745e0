// The res2s sampler between two model calls: SDE step and both half-steps, up to four modalities in one launch.
//
// Each thread owns V neighbouring elements, reads all operands before it writes, and touches no other element: outputs may be inputs.
#pragma once

#include "ltxkern/typed.cuh"

namespace ltxk {

#include "ltxkern/res2s_parameters.cuh"

template <class C>
constexpr i64 kComputeType = kF32;
template <>
constexpr i64 kComputeType<double> = kF64;

// Index of the modality that this block works on.
template <class P>
LTXK_DEVICE int modality_of_block(const P& p) {
    int index = 0;
#pragma unroll
    for (int i = 1; i < kModalities; ++i)
        if (i < p.count && static_cast<i64>(blockIdx.x) >= p.modality[i].extent.first_block) index = i;
    return index;
}

LTXK_DEVICE i64 first_element(const Extent& extent, int vector) {
    return ((static_cast<i64>(blockIdx.x) - extent.first_block) * blockDim.x + threadIdx.x) * vector;
}

// mask of the token and clean * (1 - mask), in fp32 as torch has them.
template <int V>
struct Keep {
    float mask, clean[V];
};

template <int V>
LTXK_DEVICE Keep<V> load_keep(const float* mask, const void* clean, i64 clean_type, const Extent& extent, i64 i) {
    Keep<V> keep;
    keep.mask = mask[i / extent.channels];
    load_typed(clean, clean_type, i, keep.clean);
    float rest = 1.0f - keep.mask;
#pragma unroll
    for (int k = 0; k < V; ++k) keep.clean[k] = product(keep.clean[k], rest);
    return keep;
}

// x0 masked in fp32 (fp64 for fp64 predictions) and rounded to its own dtype, as the official order has it.
template <class C, int V>
LTXK_DEVICE void mask_prediction(C (&x0)[V], i64 type, const Keep<V>& keep) {
    if (type == kF64) {
#pragma unroll
        for (int k = 0; k < V; ++k) x0[k] = product(x0[k], static_cast<C>(keep.mask)) + static_cast<C>(keep.clean[k]);
        return;
    }
#pragma unroll
    for (int k = 0; k < V; ++k)
        x0[k] = round_through(static_cast<C>(product(static_cast<float>(x0[k]), keep.mask) + keep.clean[k]), type);
}

// Ready noise, or raw noise brought to mean 0 and deviation 1 by the statistics (count, mean, M2) of its slice.
template <class C, int V>
LTXK_DEVICE void convert_noise(const Raw<V>& raw, i64 type, const double* stats, const Extent& extent, i64 i, C (&noise)[V]) {
    if (stats == nullptr) {
        convert(raw, type, noise);
        return;
    }
    const double* row = stats + (extent.slice == extent.size ? 0 : 3 * (i / extent.slice));
    double mean = row[1], factor = 1.0 / square_root(row[2] / (row[0] - 1.0)), values[V];
    convert(raw, type, values);
#pragma unroll
    for (int k = 0; k < V; ++k) noise[k] = static_cast<C>((values[k] - mean) * factor);
}

template <class C, int V>
__global__ void __launch_bounds__(256) res2s_midpoint(Res2sMidpoint p) {
    const MidpointModality& m = p.modality[modality_of_block(p)];
    i64 i = first_element(m.extent, V);
    if (i >= m.extent.size) return;
    Raw<V> raw_state = load_raw<V>(m.latent, m.latent_type, i), raw_x0 = load_raw<V>(m.x0, m.x0_type, i);
    Raw<V> raw_noise = load_raw<V>(m.noise, m.noise_type, i);
    Keep<V> keep;
    if (m.mask) keep = load_keep<V>(m.mask, m.clean, m.clean_type, m.extent, i);
    C state[V], x0[V], noise[V], middle[V];
    convert(raw_state, m.latent_type, state);
    convert(raw_x0, m.x0_type, x0);
    if (m.mask) mask_prediction(x0, m.x0_type, keep);
    convert_noise(raw_noise, m.noise_type, m.stats, m.extent, i, noise);
    C c = static_cast<C>(p.c), a = static_cast<C>(p.a), b = static_cast<C>(p.b), s = static_cast<C>(p.s);
#pragma unroll
    for (int k = 0; k < V; ++k) {
        C moved = state[k] + c * (x0[k] - state[k]);
        middle[k] = a * state[k] + b * moved + s * noise[k];
        if (m.mask) middle[k] = middle[k] * static_cast<C>(keep.mask) + static_cast<C>(keep.clean[k]);
    }
    store_typed(m.middle, m.latent_type, i, middle);
    if (p.gain != 0.0) {
#pragma unroll
        for (int k = 0; k < V; ++k) state[k] = (middle[k] - c * x0[k]) * static_cast<C>(p.gain);
    }
    store_typed(m.anchor, kComputeType<C>, i, state);
}

template <class C, int V>
__global__ void __launch_bounds__(256) res2s_advance(Res2sAdvance p) {
    const AdvanceModality& m = p.modality[modality_of_block(p)];
    i64 i = first_element(m.extent, V);
    if (i >= m.extent.size) return;
    Raw<V> raw_anchor = load_raw<V>(m.anchor, kComputeType<C>, i), raw_noise = load_raw<V>(m.noise, m.noise_type, i);
    Raw<V> raw_first = load_raw<V>(m.x0, m.x0_type, i), raw_second = load_raw<V>(m.x0_mid, m.x0_mid_type, i);
    Keep<V> keep;
    if (m.mask) keep = load_keep<V>(m.mask, m.clean, m.clean_type, m.extent, i);
    C anchor[V], first[V], second[V], noise[V], result[V];
    convert(raw_anchor, kComputeType<C>, anchor);
    convert(raw_first, m.x0_type, first);
    convert(raw_second, m.x0_mid_type, second);
    if (m.mask) {
        mask_prediction(first, m.x0_type, keep);
        mask_prediction(second, m.x0_mid_type, keep);
    }
    convert_noise(raw_noise, m.noise_type, m.stats, m.extent, i, noise);
    C hb1 = static_cast<C>(p.hb1), hb2 = static_cast<C>(p.hb2);
    C a = static_cast<C>(p.a), b = static_cast<C>(p.b), s = static_cast<C>(p.s);
#pragma unroll
    for (int k = 0; k < V; ++k) {
        C moved = anchor[k] + (hb1 * (first[k] - anchor[k]) + hb2 * (second[k] - anchor[k]));
        result[k] = a * anchor[k] + b * moved + s * noise[k];
        if (m.mask) result[k] = result[k] * static_cast<C>(keep.mask) + static_cast<C>(keep.clean[k]);
    }
    store_typed(m.out, m.out_type, i, result);
}

template <class C, int V>
__global__ void __launch_bounds__(256) res2s_sde_step(Res2sSdeStep p) {
    i64 i = first_element(p.extent, V);
    if (i >= p.extent.size) return;
    Raw<V> raw_sample = load_raw<V>(p.sample, p.sample_type, i), raw_denoised = load_raw<V>(p.denoised, p.denoised_type, i);
    Raw<V> raw_noise = load_raw<V>(p.noise, p.noise_type, i);
    C sample[V], denoised[V], noise[V];
    convert(raw_sample, p.sample_type, sample);
    convert(raw_denoised, p.denoised_type, denoised);
    convert_noise(raw_noise, p.noise_type, p.stats, p.extent, i, noise);
    C a = static_cast<C>(p.a), b = static_cast<C>(p.b), s = static_cast<C>(p.s);
#pragma unroll
    for (int k = 0; k < V; ++k) sample[k] = a * sample[k] + b * denoised[k] + s * noise[k];
    store_typed(p.out, p.denoised_type, i, sample);
}

}  // namespace ltxk
