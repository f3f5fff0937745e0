// LoRA merge on tensor cores, for factors that are all fp16 or all bf16 and weights of any dtype; see merge_lora.cuh for the op.
//
// Block = 8 warps on a tile of 128 x 128 weights, a warp on 64 x 32 of them. The factors come through three stages of shared memory,
// 32 ranks each, by asynchronous copies of 16 bytes, or by elements where they do not lie so.
#pragma once

#include "ltxkern/merge_lora.cuh"

namespace ltxk {

constexpr int kMmaTile = 128, kMmaRanks = 32, kMmaStages = 3;
constexpr int kMmaThreads = 256;
constexpr int kWarpRows = 64, kWarpColumns = 32, kWarpsInRow = kMmaTile / kWarpColumns;
// Sums of a warp that are in shared memory at once; the padding keeps the rows of a fragment on different banks.
constexpr int kSumRows = 32;
constexpr int kSumPitch = kWarpColumns + 8;

// Chunks of eight elements lie where stage_b() and stage_a() say: permuted so that eight chunks which move at once fill all banks.
template <class Half>
struct alignas(16) MmaStage {
    Half b[kMmaTile][kMmaRanks];  // [row][rank]
    Half a[kMmaRanks][kMmaTile];  // [rank][column]
};

template <class Half>
union MmaMemory {
    MmaStage<Half> stages[kMmaStages];
    float sums[kMmaThreads / 32][kSumRows][kSumPitch];  // of each warp, on the way to their weights
};

template <class Half>
LTXK_DEVICE Half* stage_b(MmaStage<Half>& stage, int row, int chunk) {
    return &stage.b[row][(chunk ^ (row >> 1 & 3)) * 8];
}

template <class Half>
LTXK_DEVICE Half* stage_a(MmaStage<Half>& stage, int rank, int chunk) {
    return &stage.a[rank][(chunk ^ (rank & 7)) * 8];
}

// The ranks that come next: of one LoRA after the other.
struct RankStep {
    i64 lora, rank;

    LTXK_DEVICE void advance(const MergeLora& p) {
        rank += kMmaRanks;
        if (rank < p.lora[lora].rank) return;
        ++lora;
        rank = 0;
    }
};

// Eight elements of a factor into shared memory, of which `count` exist; zero in place of the others.
template <class Half>
LTXK_DEVICE void copy_chunk(const Half* factor, i64 count, bool whole, Half* shared) {
    if (whole) {
        copy_async(shared, factor, count > 0);
        return;
    }
    Pack<Half, 8> chunk;
#pragma unroll
    for (int k = 0; k < 8; ++k) chunk.value[k] = k < count ? factor[k] : Half{0};
    store<Half, 8>(shared, chunk);
}

// Whether rows of this length, one behind the other, consist of aligned chunks.
LTXK_DEVICE bool in_chunks(const void* factor, i64 length) { return length % 8 == 0 && reinterpret_cast<u64>(factor) % 16 == 0; }

template <class Half>
LTXK_DEVICE void load_stage(const MergeLora& p, const RankStep& step, i64 row, i64 column, MmaStage<Half>& stage) {
    const LoraFactors& lora = p.lora[step.lora];
    const Half *a = static_cast<const Half*>(lora.a), *b = static_cast<const Half*>(lora.b);
    bool a_whole = in_chunks(a, p.columns), b_whole = in_chunks(b, lora.rank);
    int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kMmaTile * kMmaRanks / 8 / kMmaThreads; ++i) {
        int r = thread / 4 + kMmaThreads / 4 * i, chunk = thread % 4;
        i64 count = row + r < p.rows ? lora.rank - step.rank - chunk * 8 : 0;
        copy_chunk(b + (row + r) * lora.rank + step.rank + chunk * 8, count, b_whole, stage_b(stage, r, chunk));
    }
#pragma unroll
    for (int i = 0; i < kMmaTile * kMmaRanks / 8 / kMmaThreads; ++i) {
        int k = thread / 16 + kMmaThreads / 16 * i, chunk = thread % 16;
        i64 count = step.rank + k < lora.rank ? p.columns - column - chunk * 8 : 0;
        copy_chunk(a + (step.rank + k) * p.columns + column + chunk * 8, count, a_whole, stage_a(stage, k, chunk));
    }
}

// sums[i][j] is the fragment of rows 16 i and columns 8 j of the warp.
using WarpSums = float[kWarpRows / 16][kWarpColumns / 8][4];

template <class Half>
LTXK_DEVICE void multiply_stage(MmaStage<Half>& stage, WarpSums& sums) {
    int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    int row = warp / kWarpsInRow * kWarpRows + lane % 16, chunk = warp % kWarpsInRow * (kWarpColumns / 8) + lane / 16;
#pragma unroll
    for (int k = 0; k < kMmaRanks / 16; ++k) {
        u32 right[kWarpColumns / 16][4];
#pragma unroll
        for (int j = 0; j < kWarpColumns / 16; ++j) load_matrices_transposed(right[j], stage_a(stage, 16 * k + lane % 16, chunk + 2 * j));
#pragma unroll
        for (int i = 0; i < kWarpRows / 16; ++i) {
            u32 left[4];
            load_matrices(left, stage_b(stage, row + 16 * i, 2 * k + lane / 16));
#pragma unroll
            for (int j = 0; j < kWarpColumns / 8; ++j) {
                u32 two[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
                warp_mma<Half>(sums[i][j], left, two);
            }
        }
    }
}

LTXK_DEVICE i64 weight_bytes(const MergeLora& p) { return p.type == kE4M3 ? 1 : type_bytes(p.type); }

// The tile's weights are on their way to the L2 cache while the products are made.
LTXK_DEVICE void prefetch_weights(const MergeLora& p, i64 row, i64 column) {
    int thread = static_cast<int>(threadIdx.x);
    row += thread / 2;
    column += thread % 2 * (kMmaTile / 2);
    if (p.column_stride != 1 || row >= p.rows || column >= p.columns) return;
    const char* address = static_cast<const char*>(p.weight) + (row * p.row_stride + column) * weight_bytes(p);
    prefetch_l2(address);
    if (p.type == kF32 && column + 32 < p.columns) prefetch_l2(address + 128);
}

// Four weights of WORDS words in all, changed by four sums.
template <int WORDS>
LTXK_DEVICE void change_four(const MergeLora& p, i64 row, i64 column, Words<WORDS>& weights, const Pack<float, 4>& delta) {
    if constexpr (WORDS == 1) {
        weights.word[0] = merged_four_e4m3(p, row, column, weights.word[0], delta.value);
    } else {
        Raw<4> raw;
        float values[4];
#pragma unroll
        for (int k = 0; k < WORDS; ++k) raw.word[k] = weights.word[k];
        i64 type = WORDS == 4 ? static_cast<i64>(kF32) : p.type == kF16 ? static_cast<i64>(kF16) : static_cast<i64>(kBF16);
        convert(raw, type, values);
#pragma unroll
        for (int k = 0; k < 4; ++k) values[k] += delta.value[k];
        store_typed<float, 4>(&weights, type, 0, values);
    }
}

// Adds kSumRows rows of sums to the weights from (row, column) on. Four neighbours in a row move at once, of WORDS words in all, eight
// lanes to a row; with WORDS = 0 each weight by itself, a row by all lanes.
template <int WORDS>
LTXK_DEVICE void merge_rows(const MergeLora& p, i64 row, i64 column, const float (&sums)[kSumRows][kSumPitch]) {
    int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (WORDS == 0) {
#pragma unroll 1
        for (int r = 0; r < kSumRows; ++r)
            if (row + r < p.rows && column + lane < p.columns) merge_one(p, row + r, column + lane, sums[r][lane]);
    } else {
        constexpr int kPasses = 4;
        int x = lane % 8 * 4, y = lane / 8;
        if (column + x >= p.columns) return;
        u8* weights = static_cast<u8*>(p.weight) + ((row + y) * p.row_stride + column + x) * WORDS;
#pragma unroll 1
        for (int first = 0; first < kSumRows; first += 4 * kPasses) {
            Words<WORDS> kept[kPasses];
            // All loads before the first store: the compiler may not move one over the other.
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                i64 r = first + 4 * pass;
                if (row + y + r < p.rows) kept[pass] = *reinterpret_cast<const Words<WORDS>*>(weights + r * p.row_stride * WORDS);
            }
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                i64 r = first + 4 * pass;
                if (row + y + r >= p.rows) continue;
                change_four(p, row + y + r, column + x, kept[pass], load<float, 4>(&sums[r + y][x]));
                *reinterpret_cast<Words<WORDS>*>(weights + r * p.row_stride * WORDS) = kept[pass];
            }
        }
    }
}

// Adds scale * sums to the warp's weights, whose first is at (row, column), by way of the warp's shared memory.
template <int WORDS>
LTXK_DEVICE void merge_sums(const MergeLora& p, i64 row, i64 column, const WarpSums& sums, float scale, float (&shared)[kSumRows][kSumPitch]) {
    int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int first = 0; first < kWarpRows; first += kSumRows) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kSumRows / 8; ++i) {
#pragma unroll
            for (int j = 0; j < kWarpColumns / 8; ++j) {
                const float* two = &sums[first / 16 + i / 2][j][i % 2 * 2];
                Pack<float, 2> scaled = {{scale * two[0], scale * two[1]}};
                store<float, 2>(&shared[8 * i + lane / 4][8 * j + lane % 4 * 2], scaled);
            }
        }
        __syncwarp();
        merge_rows<WORDS>(p, row + first, column, shared);
    }
}

// SUM_STEPS: the products of 32 ranks are scaled and added to fp32 totals, each sum rounded to nearest. Several LoRAs need it for their
// scales, fp32 weights because tensor cores cut their sums off. Otherwise one LoRA adds up in the tensor cores, and two blocks fit.
template <class Half, bool SUM_STEPS>
__global__ void __launch_bounds__(kMmaThreads, SUM_STEPS ? 1 : 2) merge_lora_tensor_cores(MergeLora p) {
    LTXK_SHARED(MmaMemory<Half>, memory);
    i64 row = static_cast<i64>(blockIdx.x) / p.column_tiles * kMmaTile, column = static_cast<i64>(blockIdx.x) % p.column_tiles * kMmaTile;
    prefetch_weights(p, row, column);
    WarpSums sums = {};
    [[maybe_unused]] WarpSums total = {};
    RankStep ahead = {0, 0}, now = {0, 0};
#pragma unroll 1
    for (int s = 0; s < kMmaStages - 1; ++s) {
        if (ahead.lora < p.count) {
            load_stage(p, ahead, row, column, memory.stages[s]);
            ahead.advance(p);
        }
        commit_copies();
    }
    for (int stage = 0; now.lora < p.count; stage = stage + 1 == kMmaStages ? 0 : stage + 1) {
        wait_copies<kMmaStages - 2>();
        __syncthreads();
        // Every warp is past the stage before this one.
        if (ahead.lora < p.count) {
            load_stage(p, ahead, row, column, memory.stages[stage == 0 ? kMmaStages - 1 : stage - 1]);
            ahead.advance(p);
        }
        commit_copies();
        multiply_stage(memory.stages[stage], sums);
        if constexpr (SUM_STEPS) {
            float scale = static_cast<float>(p.lora[now.lora].scale);
#pragma unroll
            for (int i = 0; i < kWarpRows / 16; ++i)
#pragma unroll
                for (int j = 0; j < kWarpColumns / 8; ++j)
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        total[i][j][k] += scale * sums[i][j][k];
                        sums[i][j][k] = 0.0f;
                    }
        }
        now.advance(p);
    }
    wait_copies<0>();
    __syncthreads();
    int warp = static_cast<int>(threadIdx.x) / 32;
    float scale = SUM_STEPS ? 1.0f : static_cast<float>(p.lora[0].scale);
    const WarpSums& all = [&]() -> const WarpSums& {
        if constexpr (SUM_STEPS) return total;
        else return sums;
    }();
    row += warp / kWarpsInRow * kWarpRows;
    column += warp % kWarpsInRow * kWarpColumns;
    i64 bytes = weight_bytes(p);
    bool fours = p.column_stride == 1 && in_fours(p.weight, p.row_stride, bytes) && p.columns % 4 == 0;
    if (!fours) merge_sums<0>(p, row, column, all, scale, memory.sums[warp]);
    else if (bytes == 1) merge_sums<1>(p, row, column, all, scale, memory.sums[warp]);
    else if (bytes == 2) merge_sums<2>(p, row, column, all, scale, memory.sums[warp]);
    else merge_sums<4>(p, row, column, all, scale, memory.sums[warp]);
}

}  // namespace ltxk
