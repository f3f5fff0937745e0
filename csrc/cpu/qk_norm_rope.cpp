// RMSNorm of queries and keys over all heads together, then rotation by position, on the CPU.
#include <vector>

#include "cpu/rows.h"

LTXK_CPU_BEGIN

#include "ltxkern/qk_norm_rope_parameters.cuh"

// Tokens at a time. Tables may lie head by head, each far from the next: a block reads several tokens of one head in a row, where a
// walk along one token would touch as many distant lines as there are heads, at strides that share the sets of a cache.
constexpr i64 kTokens = 16;

// cos and sin of a block: element [token * token_stride + head * head_stride + pair], of the table's dtype or converted.
template <class Table>
struct Tables {
    const Table *cosine, *sine;
    i64 token_stride, head_stride;
};

// `count` tokens from element `at` on, in fp32.
static Tables<float> converted(const QkNormRope& p, i64 at, i64 count, float* buffer) {
    float* into = buffer;
    for (const void* table : {p.cos, p.sin}) {
        for (i64 token = 0; token < count; ++token) {
            for (i64 head = 0; head < p.heads; ++head) {
                i64 from = at + token * p.table_token + head * p.table_head;
                float one[1];
                for (i64 i = 0; i < p.pairs; ++i) *into++ = *as_compute(table, p.table_type, from + i * p.table_pair, 1, one);
            }
        }
    }
    i64 half = p.heads * p.pairs;
    return {buffer, buffer + count * half, half, p.pairs};
}

// One head: pairs (i, pairs + i).
template <class T, class Table>
static void rotate_split(i64 pairs, const T* x, float rstd, const float* weight, const Table* cosine, const Table* sine, T* out) {
    over_registers(pairs, [&](i64 i, auto n) {
        Floats a = load_n(x + i, n) * rstd * load_n(weight + i, n);
        Floats b = load_n(x + pairs + i, n) * rstd * load_n(weight + pairs + i, n);
        Floats c = load_n(cosine + i, n), s = load_n(sine + i, n);
        store_n(out + i, a * c - b * s, n);
        store_n(out + pairs + i, b * c + a * s, n);
    });
}

// One head: pairs (2i, 2i + 1), by way of `row` in fp32.
template <class T, class Table>
static void rotate_interleaved(i64 pairs, const T* x, float rstd, const float* weight, const Table* cosine, const Table* sine, T* out,
                               float* row) {
    over_registers(2 * pairs, [&](i64 i, auto n) { store_n(row + i, load_n(x + i, n) * rstd * load_n(weight + i, n), n); });
    for (i64 i = 0; i < pairs; ++i) {
        float a = row[2 * i], b = row[2 * i + 1], c = to_float(cosine[i]), s = to_float(sine[i]);
        row[2 * i] = a * c - b * s;
        row[2 * i + 1] = b * c + a * s;
    }
    over_registers(2 * pairs, [&](i64 i, auto n) { store_n(out + i, load_n(row + i, n), n); });
}

// Queries and keys of every token; tables_of(at, count, buffer) gives the tables of `count` tokens from element `at` on.
template <class T, class TablesOf>
static void rotate_rows(const QkNormRope& p, int threads, const TablesOf& tables_of) {
    i64 span = 2 * p.pairs, width = p.heads * span, blocks = (p.tokens + kTokens - 1) / kTokens;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> memory(static_cast<std::size_t>((2 + kTokens) * width + span));
        float *weights = memory.data(), *tables_buffer = weights + 2 * width, *head_row = tables_buffer + kTokens * width;
        const float* weight[2];
        for (i64 k = 0; k < 2; ++k) weight[k] = row_values(p.tensor[k].weight, p.tensor[k].weight_type, 0, width, weights + k * width);
#pragma omp for schedule(static)
        for (i64 block = 0; block < p.batch * blocks; ++block) {
            i64 batch = block / blocks, first = block % blocks * kTokens, count = p.tokens - first < kTokens ? p.tokens - first : kTokens;
            auto tables = tables_of(batch * p.table_batch + first * p.table_token, count, tables_buffer);
            const T* x[2];
            T* out[2];
            float rstd[2][kTokens];
            for (int k = 0; k < 2; ++k) {
                const QkTensor& t = p.tensor[k];
                x[k] = static_cast<const T*>(t.x) + batch * t.batch_stride + first * t.token_stride;
                out[k] = static_cast<T*>(t.out) + (batch * p.tokens + first) * width;
                for (i64 token = 0; token < count; ++token) {
                    const T* row = x[k] + token * t.token_stride;
                    rstd[k][token] = inverse_rms(width, p.eps, [&](i64 i, auto n) { return load_n(row + i, n); });
                }
            }
            for (i64 head = 0; head < p.heads; ++head) {
                for (i64 token = 0; token < count; ++token) {
                    i64 at = token * tables.token_stride + head * tables.head_stride;
                    for (int k = 0; k < 2; ++k) {
                        const T* from = x[k] + token * p.tensor[k].token_stride + head * span;
                        T* to = out[k] + token * width + head * span;
                        const float* scale = weight[k] + head * span;
                        if (p.interleaved)
                            rotate_interleaved(p.pairs, from, rstd[k][token], scale, tables.cosine + at, tables.sine + at, to, head_row);
                        else
                            rotate_split(p.pairs, from, rstd[k][token], scale, tables.cosine + at, tables.sine + at, to);
                    }
                }
            }
        }
    }
}

template <class T, class Table>
static void rotate_by_table(const QkNormRope& p, int threads) {
    rotate_rows<T>(p, threads, [&](i64 at, i64, float*) -> Tables<Table> {
        return {static_cast<const Table*>(p.cos) + at, static_cast<const Table*>(p.sin) + at, p.table_token, p.table_head};
    });
}

// Tables of fp32 and of x's dtype are read where they lie, others converted block by block.
template <class T>
static void rotate_activations(const QkNormRope& p, int threads) {
    if (p.table_pair == 1 && p.table_type == kF32) return rotate_by_table<T, float>(p, threads);
    if (p.table_pair == 1 && p.table_type == p.type) return rotate_by_table<T, T>(p, threads);
    rotate_rows<T>(p, threads, [&](i64 at, i64 count, float* buffer) { return converted(p, at, count, buffer); });
}

static void qk_norm_rope(const void* parameters, int threads) {
    const QkNormRope& p = *static_cast<const QkNormRope*>(parameters);
    with_activation(p.type, [&](auto kind) { rotate_activations<decltype(kind)>(p, threads); });
}

LTXK_CPU_END

LTXK_CPU_KERNEL("qk_norm_rope", qk_norm_rope)
