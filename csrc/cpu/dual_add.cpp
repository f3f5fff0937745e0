// Two sums that share an operand on the CPU: x + first and x + second, x read once; one of the outputs may be x.
#include "cpu/simd.h"

LTXK_CPU_BEGIN

#include "ltxkern/dual_add_parameters.cuh"

constexpr i64 kSpan = 4096, kPart = 4 * kLanes;

// Two sums of one span of elements, of which everything is read before it is written.
template <class T, bool kStreamFirst, bool kStreamSecond>
static void add_span(const T* x, const T* first, const T* second, T* out_first, T* out_second, i64 count) {
    i64 i = 0;
    for (; i + kPart <= count; i += kPart) {
        Floats shared[4], one[4], other[4];
        load_block(x + i, shared);
        load_block(first + i, one);
        load_block(second + i, other);
        for (int k = 0; k < 4; ++k) one[k] += shared[k], other[k] += shared[k];
        store_block<kStreamFirst>(out_first + i, one);
        store_block<kStreamSecond>(out_second + i, other);
    }
    over_registers(count - i, [&](i64 k, auto n) {
        i64 at = i + k;
        Floats shared = load_n(x + at, n), one = shared + load_n(first + at, n), other = shared + load_n(second + at, n);
        store_n(out_first + at, one, n);
        store_n(out_second + at, other, n);
    });
}

static void add_doubles(const double* x, const double* first, const double* second, double* out_first, double* out_second, i64 count) {
#pragma omp simd
    for (i64 i = 0; i < count; ++i) {
        double one = x[i] + first[i], other = x[i] + second[i];
        out_first[i] = one;
        out_second[i] = other;
    }
}

template <class T>
static void dual_add(const void* parameters, int threads) {
    const DualAdd& p = *static_cast<const DualAdd*>(parameters);
    const T *x = static_cast<const T*>(p.x), *first = static_cast<const T*>(p.first), *second = static_cast<const T*>(p.second);
    T *out_first = static_cast<T*>(p.out_first), *out_second = static_cast<T*>(p.out_second);
    // Lines of x are in the cache when a sum takes their place; others need not be read before they are written.
    bool past_caches = streams(5 * p.size * static_cast<i64>(sizeof(T)));
    auto streamed = [&](const void* out) {
        return past_caches && out != p.x && reinterpret_cast<std::uintptr_t>(out) % kStreamAlignment == 0;
    };
    bool one = streamed(out_first), other = streamed(out_second);
    void (*add)(const T*, const T*, const T*, T*, T*, i64);
    if constexpr (std::is_same_v<T, double>)
        add = add_doubles;
    else
        add = one ? other ? add_span<T, true, true> : add_span<T, true, false> : other ? add_span<T, false, true> : add_span<T, false, false>;
    i64 spans = (p.size + kSpan - 1) / kSpan;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (i64 span = 0; span < spans; ++span) {
            i64 at = span * kSpan, count = p.size - at < kSpan ? p.size - at : kSpan;
            add(x + at, first + at, second + at, out_first + at, out_second + at, count);
        }
        end_streaming();
    }
}

LTXK_CPU_END

LTXK_CPU_KERNEL("dual_add<f32>", dual_add<float>)
LTXK_CPU_KERNEL("dual_add<f16>", dual_add<f16>)
LTXK_CPU_KERNEL("dual_add<bf16>", dual_add<bf16>)
LTXK_CPU_KERNEL("dual_add<f64>", dual_add<double>)
