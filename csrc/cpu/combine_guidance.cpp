// Guidance on x0 predictions on the CPU: moments of cond and of the combination per chunk, then rescale and combination.
#include <vector>

#include "cpu/typed.h"

LTXK_CPU_BEGIN

#include "ltxkern/combine_guidance_parameters.cuh"

constexpr i64 kChunk = kTypedChunk;

template <class C>
static void add_branch(const void* branch, const CombineGuidance& p, double factor, i64 first, i64 count, const C* cond, C* total) {
    if (!branch) return;
    alignas(64) C buffer[kChunk];
    const C* values = as_compute(branch, p.type, first, count, buffer);
    C scale = static_cast<C>(factor);
    for (i64 i = 0; i < count; ++i) total[i] += scale * (cond[i] - values[i]);
}

// Returns cond of the chunk; the combination goes to `total`.
template <class C>
static const C* combine(const CombineGuidance& p, i64 first, i64 count, C* buffer, C* total) {
    const C* cond = as_compute(p.cond, p.type, first, count, buffer);
    for (i64 i = 0; i < count; ++i) total[i] = cond[i];
    add_branch(p.uncond, p, p.cfg, first, count, cond, total);
    add_branch(p.perturbed, p, p.stg, first, count, cond, total);
    add_branch(p.isolated, p, p.modality, first, count, cond, total);
    return cond;
}

// About the first value, so that a mean far from zero costs no digits.
template <class C>
static void moments(const C* values, i64 count, double& mean, double& m2) {
    double pivot = static_cast<double>(values[0]), sum = 0.0, squares = 0.0;
#pragma omp simd reduction(+ : sum)
    for (i64 i = 0; i < count; ++i) sum += static_cast<double>(values[i]) - pivot;
    double offset = sum / static_cast<double>(count);
#pragma omp simd reduction(+ : squares)
    for (i64 i = 0; i < count; ++i) {
        double d = static_cast<double>(values[i]) - pivot - offset;
        squares += d * d;
    }
    mean = pivot + offset;
    m2 = squares;
}

static double deviation_ratio(const std::vector<GuidancePartial>& partials, i64 size) {
    double count = 0, cond_mean = 0, cond_m2 = 0, mean = 0, m2 = 0;
    for (const GuidancePartial& partial : partials) {
        double more = static_cast<double>(size) - count < kChunk ? static_cast<double>(size) - count : kChunk;
        double share = more / (count + more), cond_delta = partial.cond_mean - cond_mean, delta = partial.mean - mean;
        cond_mean += cond_delta * share;
        mean += delta * share;
        cond_m2 += partial.cond_m2 + cond_delta * cond_delta * count * share;
        m2 += partial.m2 + delta * delta * count * share;
        count += more;
    }
    double degrees = static_cast<double>(size - 1);
    return __builtin_sqrt(cond_m2 / degrees) / __builtin_sqrt(m2 / degrees);
}

template <class C>
static void combine_guidance(const void* parameters, int threads) {
    const CombineGuidance& p = *static_cast<const CombineGuidance*>(parameters);
    i64 chunks = (p.size + kChunk - 1) / kChunk;
    auto size = [&](i64 index) { return p.size - index * kChunk < kChunk ? p.size - index * kChunk : kChunk; };
    C factor = 1;
    if (p.rescale != 0.0) {
        std::vector<GuidancePartial> partials(static_cast<std::size_t>(chunks));
#pragma omp parallel for schedule(static) num_threads(threads)
        for (i64 index = 0; index < chunks; ++index) {
            alignas(64) C buffer[kChunk], total[kChunk];
            const C* cond = combine(p, index * kChunk, size(index), buffer, total);
            GuidancePartial& into = partials[index];
            moments(cond, size(index), into.cond_mean, into.cond_m2);
            moments(total, size(index), into.mean, into.m2);
        }
        factor = static_cast<C>(p.rescale * deviation_ratio(partials, p.size) + (1.0 - p.rescale));
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 index = 0; index < chunks; ++index) {
        alignas(64) C buffer[kChunk], total[kChunk];
        combine(p, index * kChunk, size(index), buffer, total);
        if (p.rescale != 0.0)
            for (i64 i = 0; i < size(index); ++i) total[i] *= factor;
        store_compute(total, p.out, p.type, index * kChunk, size(index));
    }
}

LTXK_CPU_END

LTXK_CPU_KERNEL("combine_guidance<f64>", combine_guidance<double>)
LTXK_CPU_KERNEL("combine_guidance<f32>", combine_guidance<float>)
