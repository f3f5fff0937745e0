// GroupNorm + SiLU on the CPU: statistics of chunks, merged by Chan's rule in double, then one apply sweep.
//
// Chunks and the order of their merging depend on the shape alone, so results do not depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/simd.h"

LTXK_CPU_BEGIN

#include "ltxkern/group_norm_silu_parameters.cuh"

struct Partial {
    double count, mean, m2;

    void merge(const Partial& other) {
        if (other.count == 0) return;
        double total = count + other.count, delta = other.mean - mean, share = other.count / total;
        mean += delta * share;
        m2 += other.m2 + delta * delta * count * share;
        count = total;
    }
};

// What one channel does to its elements: silu((v - mean) * scale + offset + residual).
struct Affine {
    float mean, scale, offset;
};

static Affine affine_of(const GroupNormSilu& p, i64 channel, double mean, double m2) {
    double variance = m2 / static_cast<double>(p.group_channels * p.positions);
    double rstd = 1.0 / __builtin_sqrt(variance + p.eps);
    double shift = load_param(p.conv_bias, p.conv_bias_type, channel, 0.0f);
    Affine affine;
    affine.mean = static_cast<float>(mean - shift);
    affine.scale = static_cast<float>(load_param(p.weight, p.weight_type, channel, 1.0f) * rstd);
    affine.offset = load_param(p.bias, p.bias_type, channel, 0.0f);
    return affine;
}

// Elements of a channel at a time: equal chunks, which stay in L1 and begin on a line where the channel does.
static i64 chunk_of(i64 positions) {
    constexpr i64 kMost = 4096, kLine = 64;
    i64 chunks = positions > kMost ? (positions + kMost - 1) / kMost : 1;
    return ((positions + chunks - 1) / chunks + kLine - 1) / kLine * kLine;
}

struct Sums {
    double plain, squared;
};

// Of x - pivot; four sums, so that additions do not wait for each other.
template <class T>
static Sums sums_about(const T* x, i64 count, float pivot) {
    constexpr int kSums = 4;
    Floats sums[kSums] = {}, squares[kSums] = {}, v[kSums];
    float sum = 0.0f, squared = 0.0f;
    i64 body = count / (kSums * kLanes) * (kSums * kLanes);
    for (i64 i = 0; i < body; i += kSums * kLanes) {
        load_block(x + i, v);
        for (int k = 0; k < kSums; ++k) {
            Floats d = v[k] - pivot;
            sums[k] += d;
            squares[k] += d * d;
        }
    }
    for (i64 i = body; i < count; ++i) {
        float d = to_float(x[i]) - pivot;
        sum += d;
        squared += d * d;
    }
    sum += sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    squared += sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
    return {sum, squared};
}

// One pass about a pivot, the mean of the chunk's beginning.
template <class T>
static Partial chunk_moments(const T* x, i64 count, double shift) {
    i64 beginning = count < 64 ? count : 64;
    double n = static_cast<double>(count);
    float pivot = to_float(x[0]);
    pivot += static_cast<float>(sums_about(x, beginning, pivot).plain / static_cast<double>(beginning));
    Sums sums = sums_about(x, count, pivot);
    // Further than the deviation from the mean a pivot costs digits of the squares: then once more, about the mean.
    if (!(sums.plain * sums.plain <= 0.5 * n * sums.squared)) {
        pivot += static_cast<float>(sums.plain / n);
        sums = sums_about(x, count, pivot);
    }
    double m2 = sums.squared - sums.plain * sums.plain / n;
    return {n, pivot + sums.plain / n + shift, not_negative(m2)};
}

// Whole blocks. Meanwhile the elements at `ahead` come into the cache: arithmetic alone would leave the memory idle.
template <class T, bool kStream, bool kResidual>
static void apply_body(const T* x, const T* residual, T* out, i64 body, Floats mean, Floats scale, Floats offset, const T* ahead) {
    for (i64 i = 0; i < body; i += kBlock) {
        Floats v[kVectors], added[kVectors];
        load_block(x + i, v);
        for (int k = 0; k < kVectors; ++k) v[k] = (v[k] - mean) * scale + offset;
        if constexpr (kResidual) {
            load_block(residual + i, added);
            for (int k = 0; k < kVectors; ++k) v[k] += added[k];
        }
        for (i64 k = 0; k < kBlock; k += 64 / static_cast<i64>(sizeof(T))) prefetch_line(ahead + i + k);
        silu_vectors(v);
        store_block<kStream>(out + i, v);
    }
}

template <class T, bool kStream>
static void apply_chunk(const T* x, const T* residual, T* out, i64 count, const Affine& a, const T* ahead) {
    Floats mean = broadcast(a.mean), scale = broadcast(a.scale), offset = broadcast(a.offset);
    i64 body = count / kBlock * kBlock, whole = count / kLanes * kLanes, rest = count - whole;
    if (residual)
        apply_body<T, kStream, true>(x, residual, out, body, mean, scale, offset, ahead);
    else
        apply_body<T, kStream, false>(x, nullptr, out, body, mean, scale, offset, ahead);
    for (i64 i = body; i < whole; i += kLanes) {
        Floats v = (load_lanes(x + i) - mean) * scale + offset;
        store_lanes(out + i, silu_lanes(residual ? v + load_lanes(residual + i) : v));
    }
    if (rest == 0) return;
    Floats v = (load_part(x + whole, rest) - mean) * scale + offset;
    store_part(out + whole, silu_lanes(residual ? v + load_part(residual + whole, rest) : v), rest);
}

// A contiguous activation, group by group. Each thread measures its next group chunk by chunk between the chunks that it applies, so
// that memory is read and written at all times; the apply sweep reads what the statistics left in cache, forwards, as the hardware
// prefetches.
template <class T>
static void contiguous(const GroupNormSilu& p, int threads) {
    const T* x = static_cast<const T*>(p.x);
    const T* residual = static_cast<const T*>(p.residual);
    T* out = static_cast<T*>(p.out);
    i64 bytes = p.samples * p.channels * p.positions * static_cast<i64>(sizeof(T));
    bool stream = out != x && out != residual && streams(bytes * (residual ? 3 : 2));
    i64 chunk = chunk_of(p.positions), chunks = (p.positions + chunk - 1) / chunk, per_group = p.group_channels * chunks;
    i64 groups = p.samples * p.channels / p.group_channels;
    std::vector<Partial> partials(static_cast<std::size_t>(groups < threads ? groups * per_group : per_group * threads));

    auto span = [&](i64 group, i64 index, i64& start, i64& count, i64& channel) {
        i64 row = group * p.group_channels + index / chunks, first = index % chunks * chunk;
        start = row * p.positions + first;
        count = p.positions - first < chunk ? p.positions - first : chunk;
        channel = row % p.channels;
    };
    auto measure = [&](i64 group, i64 index, Partial* into) {
        i64 start, count, channel;
        span(group, index, start, count, channel);
        into[index] = chunk_moments(x + start, count, load_param(p.conv_bias, p.conv_bias_type, channel, 0.0f));
    };
    auto merged = [&](const Partial* from) {
        Partial total{0, 0, 0};
        for (i64 i = 0; i < per_group; ++i) total.merge(from[i]);
        return total;
    };
    auto apply = [&](i64 group, i64 index, const Partial& total, const T* ahead) {
        i64 start, count, channel;
        span(group, index, start, count, channel);
        Affine affine = affine_of(p, channel, total.mean, total.m2);
        const T* added = residual ? residual + start : nullptr;
        if (stream && reinterpret_cast<std::uintptr_t>(out + start) % kStreamAlignment == 0)
            apply_chunk<T, true>(x + start, added, out + start, count, affine, ahead);
        else
            apply_chunk<T, false>(x + start, added, out + start, count, affine, ahead);
    };

    if (groups >= threads) {
        std::atomic<i64> taken{0};
#pragma omp parallel num_threads(threads)
        {
#if defined(_OPENMP)
            Partial* mine = partials.data() + omp_get_thread_num() * per_group;
#else
            Partial* mine = partials.data();
#endif
            i64 group = taken++;
            for (i64 i = 0; group < groups && i < per_group; ++i) measure(group, i, mine);
            for (i64 next = group; group < groups; group = next) {
                next = taken++;
                Partial total = merged(mine);
                for (i64 i = 0; i < per_group; ++i) {
                    i64 ahead = 0, count, channel;
                    if (next < groups) span(next, i, ahead, count, channel);
                    apply(group, i, total, x + ahead);
                    if (next < groups) measure(next, i, mine);
                }
            }
            end_streaming();
        }
        return;
    }
    for (i64 group = 0; group < groups; ++group) {
        Partial* mine = partials.data() + group * per_group;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (i64 i = 0; i < per_group; ++i) measure(group, i, mine);
        Partial total = merged(mine);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static) nowait
            for (i64 i = 0; i < per_group; ++i) apply(group, i, total, x);
            end_streaming();
        }
    }
}

// Positions per chunk of a channels-last activation: few enough for fp32 sums, and for a chunk of all channels to stay in L2.
static i64 column_chunk(i64 channels) {
    i64 positions = 32768 / channels;
    return positions < 8 ? 8 : positions > 128 ? 128 : positions;
}

// Per-channel moments of `count` positions, merged into `mean` and `m2`, which hold `before` positions. A first pass, about the first
// position, finds a centre; the second takes sums and squares about it: they keep the digits that a mean far from zero needs, and give
// back those that a far value in the first position has cost the centre. `sums`: three rows.
template <class T>
static void merge_columns(const T* x, i64 count, i64 channels, float* sums, double before, double* mean, double* m2) {
    float *centre = sums, *sum = sums + channels, *squared = sum + channels;
    over_registers(channels, [&](i64 c, auto n) {
        store_n(centre + c, load_n(x + c, n), n);
        store_n(sum + c, Floats{}, n);
        store_n(squared + c, Floats{}, n);
    });
    for (i64 i = 0; i < count; ++i) {
        const T* row = x + i * channels;
        over_registers(channels, [&](i64 c, auto n) { store_n(sum + c, load_n(sum + c, n) + (load_n(row + c, n) - load_n(centre + c, n)), n); });
    }
    double weight = static_cast<double>(count) / (before + static_cast<double>(count)), share = 1.0 / static_cast<double>(count);
    for (i64 c = 0; c < channels; ++c) {
        centre[c] = static_cast<float>(centre[c] + sum[c] * share);
        sum[c] = 0.0f;
    }
    for (i64 i = 0; i < count; ++i) {
        const T* row = x + i * channels;
        over_registers(channels, [&](i64 c, auto n) {
            Floats d = load_n(row + c, n) - load_n(centre + c, n);
            store_n(sum + c, load_n(sum + c, n) + d, n);
            store_n(squared + c, load_n(squared + c, n) + d * d, n);
        });
    }
    for (i64 c = 0; c < channels; ++c) {
        double offset = sum[c] * share, delta = centre[c] + offset - mean[c], own = squared[c] - sum[c] * offset;
        mean[c] += delta * weight;
        m2[c] += not_negative(own) + delta * delta * before * weight;
    }
}

template <class T>
static void apply_columns(const T* x, const T* residual, T* out, i64 count, i64 channels, const float* mean, const float* scale,
                          const float* offset) {
    for (i64 i = 0; i < count; ++i, x += channels, out += channels, residual = residual ? residual + channels : nullptr) {
        store_silu(out, channels, [&](i64 c, auto n) {
            Floats v = (load_n(x + c, n) - load_n(mean + c, n)) * load_n(scale + c, n) + load_n(offset + c, n);
            return residual ? v + load_n(residual + c, n) : v;
        });
    }
}

// Channels-last: statistics of fixed stripes of positions in parallel, merged in order; then all stripes are applied in parallel.
template <class T>
static void channels_last(const GroupNormSilu& p, int threads) {
    const T* x = static_cast<const T*>(p.x);
    const T* residual = static_cast<const T*>(p.residual);
    T* out = static_cast<T*>(p.out);
    i64 channels = p.channels, chunk = column_chunk(channels), chunks = (p.positions + chunk - 1) / chunk;
    i64 stripes = chunks < 64 ? chunks : 64, per_stripe = (chunks + stripes - 1) / stripes * chunk;
    stripes = (p.positions + per_stripe - 1) / per_stripe;
    std::vector<double> moments(static_cast<std::size_t>(2 * stripes * channels));
    std::vector<float> affine(static_cast<std::size_t>(3 * channels));
    float *mean = affine.data(), *scale = mean + channels, *offset = scale + channels;

    for (i64 sample = 0; sample < p.samples; ++sample) {
        i64 base = sample * p.positions * channels;
        auto length = [&](i64 stripe) {
            i64 rest = p.positions - stripe * per_stripe;
            return rest < per_stripe ? rest : per_stripe;
        };
#pragma omp parallel num_threads(threads)
        {
            std::vector<float> sums(static_cast<std::size_t>(3 * channels));
#pragma omp for schedule(static)
            for (i64 stripe = 0; stripe < stripes; ++stripe) {
                double *stripe_mean = moments.data() + 2 * stripe * channels, *stripe_m2 = stripe_mean + channels;
                for (i64 c = 0; c < 2 * channels; ++c) stripe_mean[c] = 0.0;
                i64 first = stripe * per_stripe, count = length(stripe);
                for (i64 i = 0; i < count; i += chunk)
                    merge_columns(x + base + (first + i) * channels, count - i < chunk ? count - i : chunk, channels, sums.data(),
                                  static_cast<double>(i), stripe_mean, stripe_m2);
            }
        }
        for (i64 group = 0; group < channels / p.group_channels; ++group) {
            Partial total{0, 0, 0};
            for (i64 c = group * p.group_channels; c < (group + 1) * p.group_channels; ++c) {
                double shift = load_param(p.conv_bias, p.conv_bias_type, c, 0.0f);
                for (i64 stripe = 0; stripe < stripes; ++stripe) {
                    const double* at = moments.data() + 2 * stripe * channels;
                    total.merge({static_cast<double>(length(stripe)), at[c] + shift, at[channels + c]});
                }
            }
            for (i64 c = group * p.group_channels; c < (group + 1) * p.group_channels; ++c) {
                Affine a = affine_of(p, c, total.mean, total.m2);
                mean[c] = a.mean, scale[c] = a.scale, offset[c] = a.offset;
            }
        }
#pragma omp parallel for schedule(static) num_threads(threads)
        for (i64 stripe = 0; stripe < stripes; ++stripe) {
            i64 at = base + stripe * per_stripe * channels;
            apply_columns(x + at, residual ? residual + at : nullptr, out + at, length(stripe), channels, mean, scale, offset);
        }
    }
}

// Few positions a channel, down to the one of a 2-D input: a group is one run of memory, and each of its elements has the scale of
// its channel from a row that is spread over the positions once. From about 256 positions on, sweeps channel by channel are faster.
constexpr i64 kFewPositions = 256;

template <class T>
static void few_positions(const GroupNormSilu& p, int threads) {
    constexpr i64 kPart = 4096;
    const T* x = static_cast<const T*>(p.x);
    const T* residual = static_cast<const T*>(p.residual);
    T* out = static_cast<T*>(p.out);
    i64 length = p.group_channels * p.positions, row = p.channels * p.positions, per_sample = p.channels / p.group_channels;
    std::vector<float> spread(static_cast<std::size_t>(3 * row));
    float *weights = spread.data(), *biases = weights + row, *shifts = biases + row;
    for (i64 c = 0; c < p.channels; ++c) {
        std::fill_n(weights + c * p.positions, p.positions, load_param(p.weight, p.weight_type, c, 1.0f));
        std::fill_n(biases + c * p.positions, p.positions, load_param(p.bias, p.bias_type, c, 0.0f));
        std::fill_n(shifts + c * p.positions, p.positions, load_param(p.conv_bias, p.conv_bias_type, c, 0.0f));
    }
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float shifted[kPart];
#pragma omp for schedule(static)
        for (i64 group = 0; group < p.samples * per_sample; ++group) {
            i64 start = group * length, at = group % per_sample * length;
            Partial total{0, 0, 0};
            for (i64 i = 0; i < length; i += kPart) {
                i64 count = length - i < kPart ? length - i : kPart;
                if (p.conv_bias)
                    over_registers(count, [&](i64 k, auto n) { store_n(shifted + k, load_n(x + start + i + k, n) + load_n(shifts + at + i + k, n), n); });
                total.merge(p.conv_bias ? chunk_moments(shifted, count, 0.0) : chunk_moments(x + start + i, count, 0.0));
            }
            float rstd = static_cast<float>(1.0 / __builtin_sqrt(total.m2 / static_cast<double>(length) + p.eps));
            float mean = static_cast<float>(total.mean);
            store_silu(out + start, length, [&](i64 i, auto n) {
                Floats v = load_n(x + start + i, n);
                if (p.conv_bias) v += load_n(shifts + at + i, n);
                v = (v - mean) * (load_n(weights + at + i, n) * rstd) + load_n(biases + at + i, n);
                return residual ? v + load_n(residual + start + i, n) : v;
            });
        }
    }
}

template <class T>
static void group_norm_silu(const void* parameters, int threads) {
    const GroupNormSilu& p = *static_cast<const GroupNormSilu*>(parameters);
    if (p.channels_last)
        channels_last<T>(p, threads);
    else if (p.positions < kFewPositions)
        few_positions<T>(p, threads);
    else
        contiguous<T>(p, threads);
}

LTXK_CPU_END

LTXK_CPU_KERNEL("group_norm_silu<f32>", group_norm_silu<float>)
LTXK_CPU_KERNEL("group_norm_silu<f16>", group_norm_silu<f16>)
LTXK_CPU_KERNEL("group_norm_silu<bf16>", group_norm_silu<bf16>)
