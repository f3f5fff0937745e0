// RMSNorm of queries and keys over all heads together, then rotation by position, on the CPU.
#include <vector>

#include "cpu/rows.h"

LTXK_CPU_BEGIN

struct QkTensor {
    const void* x;
    const void* weight;
    void* out;
    i64 weight_type, batch_stride, token_stride;
};

// As in include/ltxkern/qk_norm_rope.cuh, with the number of samples.
struct QkNormRope {
    QkTensor tensor[2];
    const void* cos;
    const void* sin;
    i64 type, table_type;
    i64 table_batch, table_head, table_token, table_pair;
    i64 tokens, heads, pairs;
    i64 interleaved;
    double eps;
    i64 batch;
};

static float table_value(const void* base, i64 type, i64 at) {
    float one[1];
    return *as_compute(base, type, at, 1, one);
}

// cos and sin of all heads of one token, [head][pair].
static void load_tables(const QkNormRope& p, i64 at, float* cosine, float* sine) {
    for (i64 head = 0; head < p.heads; ++head, at += p.table_head, cosine += p.pairs, sine += p.pairs) {
        if (p.table_pair == 1 && p.pairs <= kTypedChunk) {
            const float* from = as_compute(p.cos, p.table_type, at, p.pairs, cosine);
            for (i64 i = 0; from != cosine && i < p.pairs; ++i) cosine[i] = from[i];
            from = as_compute(p.sin, p.table_type, at, p.pairs, sine);
            for (i64 i = 0; from != sine && i < p.pairs; ++i) sine[i] = from[i];
            continue;
        }
        for (i64 i = 0; i < p.pairs; ++i) {
            cosine[i] = table_value(p.cos, p.table_type, at + i * p.table_pair);
            sine[i] = table_value(p.sin, p.table_type, at + i * p.table_pair);
        }
    }
}

static void rotate(const QkNormRope& p, const float* x, const float* cosine, const float* sine, float* out) {
    for (i64 head = 0; head < p.heads; ++head, x += 2 * p.pairs, out += 2 * p.pairs, cosine += p.pairs, sine += p.pairs) {
        if (p.interleaved) {
            for (i64 i = 0; i < p.pairs; ++i) {
                out[2 * i] = x[2 * i] * cosine[i] - x[2 * i + 1] * sine[i];
                out[2 * i + 1] = x[2 * i + 1] * cosine[i] + x[2 * i] * sine[i];
            }
        } else {
            for (i64 i = 0; i < p.pairs; ++i) {
                out[i] = x[i] * cosine[i] - x[p.pairs + i] * sine[i];
                out[p.pairs + i] = x[p.pairs + i] * cosine[i] + x[i] * sine[i];
            }
        }
    }
}

static void qk_norm_rope(const void* parameters, int threads) {
    const QkNormRope& p = *static_cast<const QkNormRope*>(parameters);
    i64 width = 2 * p.heads * p.pairs;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> memory(static_cast<std::size_t>(6 * width));
        float* buffer = memory.data();
        float* normal = buffer + width;
        float* rotated = normal + width;
        float* cosine = rotated + width;
        float* sine = cosine + width / 2;
        float* weights[2] = {sine + width / 2, sine + width / 2 + width};
        const float* weight[2];
        for (int k = 0; k < 2; ++k) weight[k] = row_values(p.tensor[k].weight, p.tensor[k].weight_type, 0, width, weights[k]);
#pragma omp for schedule(static)
        for (i64 row = 0; row < p.batch * p.tokens; ++row) {
            i64 batch = row / p.tokens, token = row % p.tokens;
            load_tables(p, batch * p.table_batch + token * p.table_token, cosine, sine);
            for (int k = 0; k < 2; ++k) {
                const QkTensor& t = p.tensor[k];
                const float* x = row_values(t.x, p.type, batch * t.batch_stride + token * t.token_stride, width, buffer);
                float rstd = inverse_rms(x, width, p.eps);
                for (i64 i = 0; i < width; ++i) normal[i] = x[i] * rstd * weight[k][i];
                rotate(p, normal, cosine, sine, rotated);
                store_row(rotated, t.out, p.type, row * width, width);
            }
        }
    }
}

LTXK_CPU_END

LTXK_CPU_KERNEL("qk_norm_rope", qk_norm_rope)
