// The res2s sampler between two model calls on the CPU: SDE step and both half-steps, one loop each over a piece of a latent.
//
// Operands of the compute dtype are read and written where they lie, others pass through a piece in L1. Every element is read
// before it is written: outputs may be inputs.
#include "cpu/typed.h"

LTXK_CPU_BEGIN

#include "ltxkern/res2s_parameters.cuh"

constexpr i64 kChunk = 256;

// A piece of one modality that shares a row of statistics: elements [first, first + count).
struct Piece {
    i64 modality, first, count;
};

static i64 pieces_of(const Extent& e) { return e.size == 0 ? 0 : e.size / e.slice * ((e.slice + kChunk - 1) / kChunk); }

static Piece piece_at(const Extent& e, i64 modality, i64 index) {
    i64 per_slice = (e.slice + kChunk - 1) / kChunk, inside = index % per_slice * kChunk;
    i64 count = e.slice - inside < kChunk ? e.slice - inside : kChunk;
    return {modality, index / per_slice * e.slice + inside, count};
}

// mask of each element's token and clean * (1 - mask), in fp32 as torch has them.
struct Keep {
    alignas(64) float mask[kChunk];
    alignas(64) float clean[kChunk];

    void load(const float* masks, const void* from, i64 type, const Extent& e, const Piece& piece) {
        i64 token = piece.first / e.channels, inside = piece.first % e.channels;
        for (i64 i = 0; i < piece.count; ++token, inside = 0) {
            i64 end = i + e.channels - inside < piece.count ? i + e.channels - inside : piece.count;
            for (; i < end; ++i) mask[i] = masks[token];
        }
        const float* values = as_compute(from, type, piece.first, piece.count, clean);
        for (i64 i = 0; i < piece.count; ++i) clean[i] = values[i] * (1.0f - mask[i]);
    }
    template <class V>
    V apply(V value, i64 i) const {
        return value * take_float<V>(mask + i) + take_float<V>(clean + i);
    }
};

// x0 masked in fp32 (fp64 for fp64 predictions) and rounded to its own dtype, as the official order has it.
template <class C>
static const C* masked_prediction(const void* x0, i64 type, const Piece& piece, const Keep* keep, C* buffer) {
    const C* values = as_compute(x0, type, piece.first, piece.count, buffer);
    if (!keep) return values;
    if (type == kF64) {
        for (i64 i = 0; i < piece.count; ++i) buffer[i] = values[i] * static_cast<C>(keep->mask[i]) + static_cast<C>(keep->clean[i]);
        return buffer;
    }
    alignas(64) float products[kChunk];
    const float* narrow_values = as_compute(x0, type, piece.first, piece.count, products);
    over_registers(piece.count, [&](i64 i, auto n) {
        store_n(products + i, rounded(load_n(narrow_values + i, n) * load_n(keep->mask + i, n)) + load_n(keep->clean + i, n), n);
    });
    round_values(products, type, piece.count);
    for (i64 i = 0; i < piece.count; ++i) buffer[i] = static_cast<C>(products[i]);
    return buffer;
}

// Noise of mean 0 and deviation 1: (values - mean) * factor.
template <class C>
struct Noise {
    const C* values;
    C mean, factor;

    template <class V>
    V at(i64 i) const {
        return (take<V>(values + i) - mean) * factor;
    }
};

// Ready noise, or raw noise with the statistics (count, mean, M2) of its slice.
template <class C>
static Noise<C> noise_of(const void* noise, i64 type, const double* stats, const Extent& e, const Piece& piece, C* buffer) {
    if (!stats) return {as_compute(noise, type, piece.first, piece.count, buffer), C(0), C(1)};
    const double* row = stats + 3 * (piece.first / e.slice);
    double mean = row[1], factor = 1.0 / __builtin_sqrt(row[2] / (row[0] - 1.0));
    if constexpr (sizeof(C) == 8) {
        return {as_compute(noise, type, piece.first, piece.count, buffer), mean, factor};
    } else {
        alignas(64) double wide[kChunk];
        const double* values = as_compute(noise, type, piece.first, piece.count, wide);
        for (i64 i = 0; i < piece.count; ++i) buffer[i] = static_cast<C>((values[i] - mean) * factor);
        return {buffer, C(0), C(1)};
    }
}

// Where the results of a piece go: to the tensor itself where it has the compute dtype, else to a buffer that finish() converts.
template <class C>
struct Target {
    void* base;
    i64 type, first;
    C* values;
    bool stream;  // past the caches

    Target(void* base, i64 type, i64 first, C* buffer, bool stream) : base(base), type(type), first(first), values(buffer), stream(false) {
        if (type != kComputeType<C>) return;
        values = static_cast<C*>(base) + first;
        this->stream = stream && reinterpret_cast<std::uintptr_t>(values) % kStreamAlignment == 0;
    }
    template <class V>
    void put(i64 i, V v) const {
        stream ? put_value<true>(values + i, v) : put_value<false>(values + i, v);
    }
    void finish(i64 count) const {
        if (type != kComputeType<C>) store_compute(values, base, type, first, count);
    }
};

template <class C>
static void midpoint_piece(const Res2sMidpoint& p, const Piece& piece, bool stream) {
    const MidpointModality& m = p.modality[piece.modality];
    alignas(64) C buffers[4][kChunk];
    Keep keep;
    if (m.mask) keep.load(m.mask, m.clean, m.clean_type, m.extent, piece);
    const C* state = as_compute(m.latent, m.latent_type, piece.first, piece.count, buffers[0]);
    const C* x0 = masked_prediction(m.x0, m.x0_type, piece, m.mask ? &keep : nullptr, buffers[1]);
    Noise<C> noise = noise_of(m.noise, m.noise_type, m.stats, m.extent, piece, buffers[2]);
    Target<C> middle(m.middle, m.latent_type, piece.first, buffers[3], stream && m.middle != m.latent);
    Target<C> anchor(m.anchor, kComputeType<C>, piece.first, nullptr, stream);
    C c = static_cast<C>(p.c), a = static_cast<C>(p.a), b = static_cast<C>(p.b), s = static_cast<C>(p.s), gain = static_cast<C>(p.gain);
    bool refine = p.gain != 0.0;
    over_lanes<C>(piece.count, [&](i64 i, auto kind) {
        using V = decltype(kind);
        V start = take<V>(state + i), target = take<V>(x0 + i);
        V moved = a * start + b * (start + c * (target - start)) + s * noise.template at<V>(i);
        if (m.mask) moved = keep.apply(moved, i);
        anchor.put(i, refine ? (moved - c * target) * gain : start);
        middle.put(i, moved);
    });
    middle.finish(piece.count);
}

template <class C>
static void advance_piece(const Res2sAdvance& p, const Piece& piece, bool stream) {
    const AdvanceModality& m = p.modality[piece.modality];
    alignas(64) C buffers[4][kChunk];
    Keep keep;
    if (m.mask) keep.load(m.mask, m.clean, m.clean_type, m.extent, piece);
    const Keep* kept = m.mask ? &keep : nullptr;
    const C* anchors = static_cast<const C*>(m.anchor) + piece.first;
    const C* first = masked_prediction(m.x0, m.x0_type, piece, kept, buffers[0]);
    const C* second = masked_prediction(m.x0_mid, m.x0_mid_type, piece, kept, buffers[1]);
    Noise<C> noise = noise_of(m.noise, m.noise_type, m.stats, m.extent, piece, buffers[2]);
    Target<C> out(m.out, m.out_type, piece.first, buffers[3], stream && m.out != m.anchor);
    C hb1 = static_cast<C>(p.hb1), hb2 = static_cast<C>(p.hb2);
    C a = static_cast<C>(p.a), b = static_cast<C>(p.b), s = static_cast<C>(p.s);
    over_lanes<C>(piece.count, [&](i64 i, auto kind) {
        using V = decltype(kind);
        V anchor = take<V>(anchors + i);
        V moved = anchor + (hb1 * (take<V>(first + i) - anchor) + hb2 * (take<V>(second + i) - anchor));
        V result = a * anchor + b * moved + s * noise.template at<V>(i);
        out.put(i, m.mask ? keep.apply(result, i) : result);
    });
    out.finish(piece.count);
}

template <class C>
static void sde_step_piece(const Res2sSdeStep& p, const Piece& piece) {
    alignas(64) C buffers[4][kChunk];
    const C* sample = as_compute(p.sample, p.sample_type, piece.first, piece.count, buffers[0]);
    const C* denoised = as_compute(p.denoised, p.denoised_type, piece.first, piece.count, buffers[1]);
    Noise<C> noise = noise_of(p.noise, p.noise_type, p.stats, p.extent, piece, buffers[2]);
    Target<C> out(p.out, p.denoised_type, piece.first, buffers[3], false);
    C a = static_cast<C>(p.a), b = static_cast<C>(p.b), s = static_cast<C>(p.s);
    over_lanes<C>(piece.count, [&](i64 i, auto kind) {
        using V = decltype(kind);
        out.put(i, a * take<V>(sample + i) + b * take<V>(denoised + i) + s * noise.template at<V>(i));
    });
    out.finish(piece.count);
}

template <class C>
static i64 bytes_of(const MidpointModality& m) {
    i64 each = 2 * type_bytes(m.latent_type) + type_bytes(m.x0_type) + type_bytes(m.noise_type) + static_cast<i64>(sizeof(C));
    return m.extent.size * each;
}
template <class C>
static i64 bytes_of(const AdvanceModality& m) {
    i64 each = type_bytes(m.x0_type) + type_bytes(m.x0_mid_type) + type_bytes(m.noise_type) + type_bytes(m.out_type);
    return m.extent.size * (each + static_cast<i64>(sizeof(C)));
}

// All modalities as one run of pieces, shared evenly among the threads; `work` is told whether to write past the caches.
template <class C, class P, class Work>
static void over_modalities(const P& p, int threads, const Work& work) {
    i64 starts[kModalities + 1] = {0}, bytes = 0;
    for (i64 k = 0; k < p.count; ++k) {
        starts[k + 1] = starts[k] + pieces_of(p.modality[k].extent);
        bytes += bytes_of<C>(p.modality[k]);
    }
    i64 total = starts[p.count];
    bool stream = streams(bytes);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
        for (i64 index = 0; index < total; ++index) {
            i64 k = 0;
            while (index >= starts[k + 1]) ++k;
            work(piece_at(p.modality[k].extent, k, index - starts[k]), stream);
        }
        if (stream) end_streaming();
    }
}

template <class C>
static void res2s_midpoint(const void* parameters, int threads) {
    const auto& p = *static_cast<const Res2sMidpoint*>(parameters);
    over_modalities<C>(p, threads, [&](const Piece& piece, bool stream) { midpoint_piece<C>(p, piece, stream); });
}

template <class C>
static void res2s_advance(const void* parameters, int threads) {
    const auto& p = *static_cast<const Res2sAdvance*>(parameters);
    over_modalities<C>(p, threads, [&](const Piece& piece, bool stream) { advance_piece<C>(p, piece, stream); });
}

template <class C>
static void res2s_sde_step(const void* parameters, int threads) {
    const auto& p = *static_cast<const Res2sSdeStep*>(parameters);
    i64 total = pieces_of(p.extent);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 index = 0; index < total; ++index) sde_step_piece<C>(p, piece_at(p.extent, 0, index));
}

LTXK_CPU_END

LTXK_CPU_KERNEL("res2s_midpoint<f64>", res2s_midpoint<double>)
LTXK_CPU_KERNEL("res2s_midpoint<f32>", res2s_midpoint<float>)
LTXK_CPU_KERNEL("res2s_advance<f64>", res2s_advance<double>)
LTXK_CPU_KERNEL("res2s_advance<f32>", res2s_advance<float>)
LTXK_CPU_KERNEL("res2s_sde_step<f64>", res2s_sde_step<double>)
LTXK_CPU_KERNEL("res2s_sde_step<f32>", res2s_sde_step<float>)
