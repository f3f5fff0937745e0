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

// Tokens [first, first + count) of one batch item.
struct Block {
    i64 batch, first, count;
};

// A thread's fp32 copy of a block's tables, and which rows of tables by coordinate it has: neighbouring tokens share most of theirs.
struct Copied {
    float* values;
    std::vector<i64> rows;
    const QkTensor* of;
};

// The tables of a block by token, in fp32.
static Tables<float> converted(const QkNormRope& p, const QkTensor& t, const Block& block, Copied& copied) {
    float* into = copied.values;
    for (const void* table : {t.cos, t.sin}) {
        for (i64 token = 0; token < block.count; ++token) {
            for (i64 head = 0; head < p.heads; ++head) {
                i64 from = block.batch * t.table_batch + (block.first + token) * t.table_token + head * t.table_head;
                float one[1];
                for (i64 i = 0; i < p.pairs; ++i) *into++ = *as_compute(table, p.table_type, from + i * t.table_pair, 1, one);
            }
        }
    }
    i64 half = p.heads * p.pairs;
    return {copied.values, copied.values + block.count * half, half, p.pairs};
}

// The tables of a block by coordinate, in fp32.
static Tables<float> gathered(const QkNormRope& p, const QkTensor& t, const Block& block, Copied& copied) {
    i64 half = p.heads * p.pairs;
    if (copied.of != &t) {
        copied.rows.assign(static_cast<std::size_t>(kTokens * p.axes), -1);
        copied.of = &t;
    }
    for (i64 token = 0; token < block.count; ++token) {
        i64 at = block.batch * t.rows_batch + (block.first + token) * t.rows_token;
        for (i64 axis = 0; axis < p.axes; ++axis) {
            i64 row = static_cast<const int*>(t.rows)[at + axis * t.rows_axis];
            i64& held = copied.rows[static_cast<std::size_t>(token * p.axes + axis)];
            if (held == row) continue;
            held = row;
            float* into = copied.values + token * half;
            for (const void* table : {t.cos, t.sin}) {
                i64 from = row * t.table_token + (axis < p.lead ? t.table_pair : 0);
                float one[1];
                for (i64 i = axis < p.lead ? axis + p.axes - p.lead : axis - p.lead; i < half; i += p.axes, from += t.table_pair)
                    into[i] = *as_compute(table, p.table_type, from, 1, one);
                into += kTokens * half;
            }
        }
    }
    return {copied.values, copied.values + kTokens * half, half, p.pairs};
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

static bool same_tables(const QkTensor& q, const QkTensor& k) {
    bool dense = q.cos == k.cos && q.sin == k.sin && q.table_batch == k.table_batch && q.table_head == k.table_head &&
                 q.table_token == k.table_token && q.table_pair == k.table_pair;
    bool rows = q.rows == k.rows && q.rows_batch == k.rows_batch && q.rows_axis == k.rows_axis && q.rows_token == k.rows_token;
    return dense && rows && q.tokens == k.tokens;
}

// Queries or keys of every token, or both where they share their tables; tables_of(tensor, block, copied) gives those of a block.
template <class T, class TablesOf>
static void rotate_rows(const QkNormRope& p, int threads, const TablesOf& tables_of) {
    const QkTensor &q = p.tensor[0], &k = p.tensor[1];
    bool together = same_tables(q, k);
    i64 span = 2 * p.pairs, width = p.heads * span;
    i64 q_blocks = (q.tokens + kTokens - 1) / kTokens, k_blocks = (k.tokens + kTokens - 1) / kTokens;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> memory(static_cast<std::size_t>((2 + kTokens) * width + span));
        float *weights = memory.data(), *head_row = weights + (2 + kTokens) * width;
        Copied copied{weights + 2 * width, {}, nullptr};
        const float* weight[2];
        for (i64 i = 0; i < 2; ++i) weight[i] = row_values(p.tensor[i].weight, p.tensor[i].weight_type, 0, width, weights + i * width);
#pragma omp for schedule(static)
        for (i64 item = 0; item < p.batch * (together ? q_blocks : q_blocks + k_blocks); ++item) {
            bool of_q = item < p.batch * q_blocks;
            i64 place = of_q ? item : item - p.batch * q_blocks, blocks = of_q ? q_blocks : k_blocks;
            const int from = of_q ? 0 : 1, to = of_q && !together ? 1 : 2;
            i64 first = place % blocks * kTokens, left = p.tensor[from].tokens - first;
            Block block{place / blocks, first, left < kTokens ? left : kTokens};
            auto tables = tables_of(p.tensor[from], block, copied);
            const T* x[2];
            T* out[2];
            float rstd[2][kTokens];
            for (int i = from; i < to; ++i) {
                const QkTensor& t = p.tensor[i];
                x[i] = static_cast<const T*>(t.x) + block.batch * t.batch_stride + first * t.token_stride;
                out[i] = static_cast<T*>(t.out) + (block.batch * t.tokens + first) * width;
                for (i64 token = 0; token < block.count; ++token) {
                    const T* row = x[i] + token * t.token_stride;
                    rstd[i][token] = inverse_rms(width, p.eps, [&](i64 at, auto n) { return load_n(row + at, n); });
                }
            }
            for (i64 head = 0; head < p.heads; ++head) {
                for (i64 token = 0; token < block.count; ++token) {
                    i64 at = token * tables.token_stride + head * tables.head_stride;
                    for (int i = from; i < to; ++i) {
                        const T* read = x[i] + token * p.tensor[i].token_stride + head * span;
                        T* write = out[i] + token * width + head * span;
                        const float* scale = weight[i] + head * span;
                        if (p.interleaved)
                            rotate_interleaved(p.pairs, read, rstd[i][token], scale, tables.cosine + at, tables.sine + at, write, head_row);
                        else
                            rotate_split(p.pairs, read, rstd[i][token], scale, tables.cosine + at, tables.sine + at, write);
                    }
                }
            }
        }
    }
}

template <class T, class Table>
static void rotate_by_table(const QkNormRope& p, int threads) {
    rotate_rows<T>(p, threads, [](const QkTensor& t, const Block& block, Copied&) -> Tables<Table> {
        i64 at = block.batch * t.table_batch + block.first * t.table_token;
        return {static_cast<const Table*>(t.cos) + at, static_cast<const Table*>(t.sin) + at, t.table_token, t.table_head};
    });
}

// Tables by token of fp32 and of x's dtype are read where they lie, others copied block by block.
template <class T>
static void rotate_activations(const QkNormRope& p, int threads) {
    bool dense = p.tensor[0].table_pair == 1 && p.tensor[1].table_pair == 1;
    if (p.axes == 0 && dense && p.table_type == kF32) return rotate_by_table<T, float>(p, threads);
    if (p.axes == 0 && dense && p.table_type == p.type) return rotate_by_table<T, T>(p, threads);
    rotate_rows<T>(p, threads, [&](const QkTensor& t, const Block& block, Copied& copied) {
        return p.axes == 0 ? converted(p, t, block, copied) : gathered(p, t, block, copied);
    });
}

static void qk_norm_rope(const void* parameters, int threads) {
    const QkNormRope& p = *static_cast<const QkNormRope*>(parameters);
    with_activation(p.type, [&](auto kind) { rotate_activations<decltype(kind)>(p, threads); });
}

LTXK_CPU_END

LTXK_CPU_KERNEL("qk_norm_rope", qk_norm_rope)
