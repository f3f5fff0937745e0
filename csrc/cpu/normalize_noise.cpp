// Standardisation of noise, and its statistics, on the CPU: fp64, one pass over chunks, merged in a fixed order.
//
// Chunks depend on the sizes alone, so results do not depend on the number of threads.
#include <vector>

#include "cpu/typed.h"

LTXK_CPU_BEGIN

#include "ltxkern/normalize_noise_parameters.cuh"

constexpr i64 kChunk = kTypedChunk;

// Means are relative to the slice's first value, its origin: of a mean of many deviations one double holds too few digits.
struct NoiseSlice {
    double origin;  // kept, as the values may be written over while others still need them
    NoisePartial moments;
};

struct NoiseSums {
    double plain, squared;
};

// Of v - pivot; several sums, so that additions do not wait for each other.
static NoiseSums sums_about(const double* v, i64 count, double pivot) {
    using Doubles = Wide<double>;
    constexpr int kSums = 8;
    constexpr i64 kStep = kSums * kWide<double>;
    Doubles sums[kSums] = {}, squares[kSums] = {};
    double sum = 0.0, squared = 0.0;
    i64 body = count / kStep * kStep;
    for (i64 i = 0; i < body; i += kStep) {
        for (int k = 0; k < kSums; ++k) {
            Doubles d = take<Doubles>(v + i + k * kWide<double>) - pivot;
            sums[k] += d;
            squares[k] += d * d;
        }
    }
    for (i64 i = body; i < count; ++i) {
        double d = v[i] - pivot;
        sum += d;
        squared += d * d;
    }
    for (int k = 1; k < kSums; ++k) sums[0] += sums[k], squares[0] += squares[k];
    for (i64 lane = 0; lane < kWide<double>; ++lane) sum += sums[0][lane], squared += squares[0][lane];
    return {sum, squared};
}

// One pass, about the first value. That costs 1 + (distance / deviation)^2 roundings of the squares: where the first value lies more
// than eight deviations from the mean, the sums are taken once more, about the mean.
static NoisePartial chunk_moments(const void* x, i64 type, i64 first, i64 count, double origin) {
    alignas(64) double buffer[kChunk];
    buffer[0] = 0.0;
    const double* v = as_compute(x, type, first, count, buffer);
    double n = static_cast<double>(count), pivot = v[0];
    NoiseSums sums = sums_about(v, count, pivot);
    if (!(sums.plain * sums.plain * 65.0 <= 64.0 * n * sums.squared)) {
        pivot += sums.plain / n;
        sums = sums_about(v, count, pivot);
    }
    double offset = sums.plain / n, m2 = sums.squared - sums.plain * offset;
    return {(pivot - origin) + offset, not_negative(m2)};
}

static double element(const void* x, i64 type, i64 at) {
    double one[1];
    return *as_compute(x, type, at, 1, one);
}

static NoisePartial slice_moments(const NoisePartial* partials, i64 chunks, i64 length) {
    auto size = [&](i64 i) { return static_cast<double>(length - i * kChunk < kChunk ? length - i * kChunk : kChunk); };
    double pivot = partials[0].mean, shifted = 0.0, m2 = 0.0;
    for (i64 i = 0; i < chunks; ++i) shifted += (partials[i].mean - pivot) * size(i);
    double offset = shifted / static_cast<double>(length);
    for (i64 i = 0; i < chunks; ++i) {
        double delta = (partials[i].mean - pivot) - offset;
        m2 += partials[i].m2 + delta * delta * size(i);
    }
    return {pivot + offset, m2};
}

static void standardise_chunk(const NormalizeNoise& p, i64 first, i64 count, const NoiseSlice& slice, double factor) {
    alignas(64) double buffer[kChunk], values[kChunk];
    double origin = slice.origin, mean = slice.moments.mean;
    const double* v = as_compute(p.x, p.type, first, count, buffer);
    if (p.type == kF64) {
        double* out = static_cast<double*>(p.out) + first;
        for (i64 i = 0; i < count; ++i) out[i] = ((v[i] - origin) - mean) * factor;
        return;
    }
    for (i64 i = 0; i < count; ++i) values[i] = ((v[i] - origin) - mean) * factor;
    store_compute(values, p.out, p.type, first, count);
}

static void normalize_noise(const void* parameters, int threads) {
    const NormalizeNoise& p = *static_cast<const NormalizeNoise*>(parameters);
    i64 chunks = (p.length + kChunk - 1) / kChunk, tasks = p.slices * chunks;
    std::vector<NoisePartial> partials(static_cast<std::size_t>(tasks));
    std::vector<NoiseSlice> slices(static_cast<std::size_t>(p.slices));
    auto locate = [&](i64 task, i64& first, i64& count) {
        i64 inside = task % chunks * kChunk;
        first = task / chunks * p.length + inside;
        count = p.length - inside < kChunk ? p.length - inside : kChunk;
    };
    bool finite = true;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (i64 task = 0; task < tasks; ++task) {
            i64 first, count;
            locate(task, first, count);
            partials[task] = chunk_moments(p.x, p.type, first, count, element(p.x, p.type, task / chunks * p.length));
        }
#pragma omp for schedule(static) reduction(&& : finite)
        for (i64 s = 0; s < p.slices; ++s) {
            NoisePartial all = slice_moments(partials.data() + s * chunks, chunks, p.length);
            slices[s] = {element(p.x, p.type, s * p.length), all};
            finite = finite && all.m2 - all.m2 == 0.0;
            if (p.stats) {
                p.stats[3 * s] = static_cast<double>(p.length);
                p.stats[3 * s + 1] = slices[s].origin + all.mean;
                p.stats[3 * s + 2] = all.m2;
            }
        }
        if (p.out) {
            // The last chunks first: they are still in the cache.
#pragma omp for schedule(static)
            for (i64 task = 0; task < tasks; ++task) {
                i64 first, count;
                locate(tasks - 1 - task, first, count);
                const NoiseSlice& slice = slices[first / p.length];
                double factor = 1.0 / __builtin_sqrt(slice.moments.m2 / static_cast<double>(p.length - 1));
                if (p.whole && !finite) factor = __builtin_nan("");
                standardise_chunk(p, first, count, slice, factor);
            }
        }
    }
}

LTXK_CPU_END

LTXK_CPU_KERNEL("normalize_noise", normalize_noise)
