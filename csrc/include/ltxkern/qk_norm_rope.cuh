// RMSNorm of queries and keys over all heads together, then rotation by position: q and k in one launch.
#pragma once

#include "ltxkern/rows.cuh"

namespace ltxk {

#include "ltxkern/qk_norm_rope_parameters.cuh"

// Whose token a block has: queries and keys in turn, neighbours that share the lines of a table, then what the longer one has left.
struct QkPlace {
    u32 tensor, row;
};
// What a launch of either kernel adds: tokens of the shorter tensor, twice that, and which one is the longer.
struct QkNormRopeLaunch : QkNormRope {
    i64 shared_rows, in_turn, longer;
};
LTXK_DEVICE QkPlace qk_place(const QkNormRopeLaunch& p) {
    u32 block = blockIdx.x;
    if (block < static_cast<u32>(p.in_turn)) return {block % 2, block / 2};
    return {static_cast<u32>(p.longer), block - static_cast<u32>(p.shared_rows)};
}

struct QkNormRopeRows : QkNormRopeLaunch {
    i64 by_pairs, by_axes;  // divide by `pairs` and `axes`
};

// V elements of q or k.
template <int V>
LTXK_DEVICE void store_values(void* base, i64 type, i64 index, const float (&values)[V]) {
    if (type == kF32) {
        Pack<float, V> pack;
#pragma unroll
        for (int k = 0; k < V; ++k) pack.value[k] = values[k];
        store(static_cast<float*>(base) + index, pack);
    } else if (type == kF16) {
        store(static_cast<f16*>(base) + index, rounded<f16>(values));
    } else {
        store(static_cast<bf16*>(base) + index, rounded<bf16>(values));
    }
}

// Cosines and sines of pairs [at, at + V) of a token, counted over all heads; NaN where its row is none of the table's.
template <int V>
LTXK_DEVICE void load_by_axis(const QkNormRopeRows& p, const QkTensor& t, i64 rows_at, u32 at, float (&cosine)[V], float (&sine)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
        u32 place = at + k + static_cast<u32>(p.lead), column = divide(place, p.by_axes);
        u32 axis = place - column * static_cast<u32>(p.axes);
        u32 row = static_cast<const u32*>(t.rows)[rows_at + axis * t.rows_axis];
        i64 from = row * t.table_token + column * t.table_pair;
        bool known = row < static_cast<u32>(t.table_rows);
        cosine[k] = load_param(known ? t.cos : nullptr, p.table_type, from, not_a_number());
        sine[k] = load_param(known ? t.sin : nullptr, p.table_type, from, not_a_number());
    }
}

// Block = one token of q or k. V pairs a thread; split layout only for V > 1. Dtypes are known at run time.
template <int V>
__global__ void __launch_bounds__(256, 4) qk_norm_rope(QkNormRopeRows p) {
    LTXK_SHARED(RowSum, scratch);
    QkPlace place = qk_place(p);
    const QkTensor& t = p.tensor[place.tensor];
    u32 batch = place.row / static_cast<u32>(t.tokens), token = place.row - batch * static_cast<u32>(t.tokens);
    u32 pairs = static_cast<u32>(p.pairs), half = static_cast<u32>(p.heads) * pairs, width = 2 * half, step = blockDim.x * V;
    i64 x_row = batch * t.batch_stride + token * t.token_stride;
    float sum = 0.0f;
    for (u32 i = threadIdx.x * V; i < width; i += step) {
        float values[V];
        load_params(t.x, p.type, x_row + i, values);
#pragma unroll
        for (int k = 0; k < V; ++k) sum += values[k] * values[k];
    }
    float rstd = inverse_rms(sum_row(sum, scratch), width, p.eps);
    i64 table_row = batch * t.table_batch + token * t.table_token, rows_at = batch * t.rows_batch + token * t.rows_token;
    i64 out_row = static_cast<i64>(place.row) * width;
    for (u32 i = threadIdx.x * V; i < half; i += step) {
        u32 head = divide(i, p.by_pairs), pair = i - head * pairs;
        u32 left = head * 2 * pairs + (p.interleaved ? 2 * pair : pair), right = left + (p.interleaved ? 1 : pairs);
        float first[V], second[V], weight[V], cosine[V], sine[V];
        // The tables first: their addresses need the registers that the elements take.
        if (t.rows) {
            load_by_axis(p, t, rows_at, i, cosine, sine);
        } else {
            i64 table = table_row + head * t.table_head + pair * t.table_pair;
            load_params(t.cos, p.table_type, table, cosine);
            load_params(t.sin, p.table_type, table, sine);
        }
        load_params(t.x, p.type, x_row + left, first);
        load_params(t.x, p.type, x_row + right, second);
        load_params(t.weight, t.weight_type, left, weight);
#pragma unroll
        for (int k = 0; k < V; ++k) first[k] *= rstd * weight[k];
        load_params(t.weight, t.weight_type, right, weight);
#pragma unroll
        for (int k = 0; k < V; ++k) {
            second[k] *= rstd * weight[k];
            float rotated = first[k] * cosine[k] - second[k] * sine[k];
            second[k] = second[k] * cosine[k] + first[k] * sine[k];
            first[k] = rotated;
        }
        store_values(t.out, p.type, out_row + left, first);
        store_values(t.out, p.type, out_row + right, second);
    }
}

// What a launch of whole packs adds: strides are counted in packs but for those of `rows`, `pairs` in packs of half a head, a power of
// two of at most 32.
struct QkNormRopePacks : QkNormRopeLaunch {
    i64 pairs_log2, width;
    i64 inverse_width, least;          // bits of two floats: 1 / elements of a token, and eps
    i64 by_q_tokens, by_k_tokens;      // divide a row by the tensor's tokens
    i64 q_table_step, k_table_step;    // from a thread's pack of pairs to its next one
};

// Tables by token, AXES 0, or by one coordinate of it: neighbouring pairs are neighbours in memory.
template <class M, int V, int AXES>
struct QkTables {
    static constexpr int kPart = kVector<M>;
    const void *cosines, *sines;
    u32 at, step;
    Raw<V> cosine, sine;

    // What to add to a sum of squares: nothing, or NaN where a row is none of the tables'.
    LTXK_DEVICE float find(const QkNormRopePacks& p, const QkTensor& t, u32 batch, u32 token, u32 pack, u32 head, char*) {
        float nothing = 0.0f;
        if constexpr (AXES == 0) {
            at = batch * static_cast<u32>(t.table_batch);
        } else {
            token = static_cast<const u32*>(t.rows)[batch * static_cast<u32>(t.rows_batch) + token * static_cast<u32>(t.rows_token)];
            bool here = token < static_cast<u32>(t.table_rows);
            nothing = here ? 0.0f : not_a_number();
            token = here ? token : 0;
            at = 0;
        }
        cosines = t.cos, sines = t.sin;
        at += token * static_cast<u32>(t.table_token) + head * static_cast<u32>(t.table_head) + (pack & (static_cast<u32>(p.pairs) - 1));
        step = static_cast<u32>(&t == p.tensor ? p.q_table_step : p.k_table_step);
        return nothing;
    }
    LTXK_DEVICE void begin(int) {}
    // Of a thread's j-th pack of pairs, element k; called in order, behind begin(j).
    LTXK_DEVICE void take(int j, int k, float& c, float& s) {
        if (k % kPart == 0) {
            cosine = load_part<V>(pack_address<M, V>(cosines, at + j * step), k / kPart);
            sine = load_part<V>(pack_address<M, V>(sines, at + j * step), k / kPart);
        }
        c = element<M>(cosine, k % kPart);
        s = element<M>(sine, k % kPart);
    }
};

// Tables by three coordinates, each sine behind its cosine: pairs take turns. A thread's own pairs lie on three rows, far from those of
// the next thread: a warp that loads its own touches ten lines at a time. So it copies its pairs to shared memory in their order, where
// 32 neighbours are a third from each row, and its threads find their own there.
template <class M, int V>
struct QkTables<M, V, 3> {
    static_assert(sizeof(M) == 4);
    static constexpr int kPair = 2 * sizeof(M);
    // Where the thread's first pair lies, and those one and two behind it: one of them shares its axis with any other.
    const char* pairs[3];
    char* own;  // the warp's part of shared memory, 32 V pairs
    Raw<4> two;

    LTXK_DEVICE float find(const QkNormRopePacks& p, const QkTensor& t, u32 batch, u32 token, u32 pack, u32, char* memory) {
        u32 lane = threadIdx.x % 32, place = (pack - lane) * V + lane + static_cast<u32>(p.lead), column = place / 3, axis = place - 3 * column;
        const u32* rows = static_cast<const u32*>(t.rows) + (batch * static_cast<u32>(t.rows_batch) + token * static_cast<u32>(t.rows_token));
        float nothing = 0.0f;
#pragma unroll
        for (int r = 0; r < 3; ++r) {
            u32 row = rows[axis * static_cast<u32>(t.rows_axis)];
            bool here = row < static_cast<u32>(t.table_rows);
            pairs[r] = pack_address<M, 2>(t.cos, (here ? row : 0) * static_cast<u32>(t.table_token) + column);
            nothing = here ? nothing : not_a_number();
            bool last = axis == 2;
            axis = last ? 0 : axis + 1;
            column += last;
        }
        own = memory + threadIdx.x / 32 * (32 * V * kPair);
        copy(0);
        return nothing;
    }
    // Those of the warp's j-th packs of pairs: a thread every 32nd. Pairs 2 n and 2 n + 1 are at n ^ n / 8 % 4 of 16 bytes each, so that
    // no two accesses of a quarter of the warp meet in a bank.
    LTXK_DEVICE void copy(int j) {
        u32 lane = threadIdx.x % 32, at = lane ^ lane / 16 * 2;
        char *even = own + at * kPair, *odd = own + (at ^ 4) * kPair;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            int away = 32 * (V * j + i);
            copy_async_eight(i % 2 ? odd : even, 32 * kPair * i, pairs[away % 3] + away / 3 * kPair);
        }
        commit_copies();
    }
    LTXK_DEVICE void begin(int j) {
        if (j > 0) {
            __syncwarp();
            copy(j);
        }
        wait_copies<0>();
        __syncwarp();
    }
    LTXK_DEVICE void take(int, int k, float& c, float& s) {
        u32 lane = threadIdx.x % 32;
        if (k % 2 == 0) load_words<4>(own + ((V / 2 * lane ^ lane * V / 16 % 4) ^ k / 2) * 16, two);
        c = bits_to_float(two.word[k % 2 * 2]);
        s = bits_to_float(two.word[k % 2 * 2 + 1]);
    }
};

// One block of the kernel below.
template <class T, class M, int AXES>
LTXK_DEVICE void qk_packs(const QkNormRopePacks& p, const QkTensor& t, i64 by_tokens, QkPlace place, RowSum& scratch, char* memory) {
    constexpr int V = kVector<T>, kPairs = kPacks / 2;
    u32 batch = divide(place.row, by_tokens), token = place.row - batch * static_cast<u32>(t.tokens);
    u32 half = static_cast<u32>(p.pairs), pack = threadIdx.x / 32 * (32 * kPairs) + threadIdx.x % 32;
    u32 head = pack >> static_cast<u32>(p.pairs_log2), left = pack + head * half, width = static_cast<u32>(p.width);
    u32 x_row = batch * static_cast<u32>(t.batch_stride) + token * static_cast<u32>(t.token_stride) + left;
    // 32 packs of pairs on, a thread is at the same place of a later head.
    const char *x_left = pack_address<T, V>(t.x, x_row), *x_right = pack_address<T, V>(t.x, x_row + half);
    Raw<V> first[kPairs], second[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
        first[j] = load_pack<T, V>(x_left, 2 * j);
        second[j] = load_pack<T, V>(x_right, 2 * j);
    }
    QkTables<M, V, AXES> tables;
    float sum = tables.find(p, t, batch, token, pack, head, memory);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
            sum += element<T>(first[j], k) * element<T>(first[j], k);
            sum += element<T>(second[j], k) * element<T>(second[j], k);
        }
    }
    sum = sum_short_row(sum, scratch);
    float rstd = inverse_root(sum * float_of(p.inverse_width) + float_of(p.least));
    u32 out = place.row * width + left;
    char *out_left = pack_address<T, V>(t.out, out), *out_right = pack_address<T, V>(t.out, out + half);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
        Raw<V> first_weight = load_pack<T, V>(pack_address<T, V>(t.weight, left), 2 * j);
        Raw<V> second_weight = load_pack<T, V>(pack_address<T, V>(t.weight, left + half), 2 * j);
        tables.begin(j);
        float lefts[V], rights[V];
#pragma unroll
        for (int k = 0; k < V; ++k) {
            float c, s;
            tables.take(j, k, c, s);
            float a = element<T>(first[j], k) * (rstd * element<T>(first_weight, k));
            float b = element<T>(second[j], k) * (rstd * element<T>(second_weight, k));
            lefts[k] = a * c - b * s;
            rights[k] = b * c + a * s;
        }
        store_pack<T>(out_left, 2 * j, rounded_pack<T>(lefts));
        store_pack<T>(out_right, 2 * j, rounded_pack<T>(rights));
    }
}

// The kernel above for split pairs, a token whole in its block's registers: x is read once. Activations and weights are T, tables M;
// AXES is 0 for tables by token; with those by three coordinates table_token counts elements. Written out for q and for k, so that
// what differs between them is a constant of the launch and no load.
template <class T, class M, int AXES>
__global__ void __launch_bounds__(256, 4) qk_norm_rope_packs(QkNormRopePacks p) {
    LTXK_SHARED(RowSum, scratch);
    QkPlace place = qk_place(p);
    char* memory = nullptr;
    if constexpr (AXES == 3) {
        LTXK_DYNAMIC_SHARED(char, pairs);
        memory = pairs;
    }
    if (place.tensor == 0) qk_packs<T, M, AXES>(p, p.tensor[0], p.by_q_tokens, place, scratch, memory);
    else qk_packs<T, M, AXES>(p, p.tensor[1], p.by_k_tokens, place, scratch, memory);
}

}  // namespace ltxk
