// LoRA merge on tensor cores, for factors that are all fp16 or all bf16 and weights of any dtype; see merge_lora.cuh for the op.
//
// Block = 8 warps on tiles of 256 rows, two warps side by side; it walks along such a strip of rows. The factors come in steps of 32 ranks
// by asynchronous copies: A through a ring of three stages, B into slots that keep as much of the strip as fits, so that each tile asks
// for its columns of A alone. Two columns of A move at once, to where the lane that multiplies them ends with eight neighbouring weights:
// they are changed in its registers, 16 bytes at a time, without a detour through shared memory.
#pragma once

#include "ltxkern/merge_lora.cuh"

namespace ltxk {

constexpr int kMmaRows = 256, kMmaRanks = 32, kMmaStages = 3, kMmaThreads = 256;
constexpr int kWarpRows = 64, kWarpsInRow = 2;
constexpr int kSlot = kMmaRows * kMmaRanks;  // elements of B of one step
// Columns of a tile: fp32 weights have totals beside their sums.
template <bool SUM_STEPS>
constexpr int kMmaColumns = SUM_STEPS ? 64 : 128;
// Where weights do not lie in eights: rows of a warp that are in shared memory at once, and what keeps them on different banks.
constexpr int kBounceRows = 8, kBouncePad = 4;

struct MergeLoraTiles : MergeLora {
    i64 tiles, walk;   // of the weight; of a block, one behind the other
    i64 held, slots;   // steps of B that stay in shared memory; their slots, which hold them more than once where they are few
    i64 bounce;        // where in shared memory sums pass by that are added one by one; 0: weights are changed in eights
};

// The step that is asked for next: 32 ranks of one LoRA, for one tile.
struct RankStep {
    u32 tile, end, strip, column_tile;
    int lora, rank, index, first_slot;
    bool fresh;  // B of this strip is not here yet

    LTXK_DEVICE void advance(const MergeLoraTiles& p) {
        ++index;
        rank += kMmaRanks;
        if (rank < p.lora[lora].rank) return;
        rank = 0;
        if (++lora < p.count) return;
        lora = index = 0;
        ++tile;
        fresh = ++column_tile == static_cast<u32>(p.column_tiles);
        if (!fresh) return;
        column_tile = 0;
        ++strip;
        first_slot += static_cast<int>(p.held);
        if (first_slot == p.slots) first_slot = 0;
    }
};

// Shared memory: the stages of A, the slots of B, and stages of B where it has steps that do not stay.
template <class Half, int COLUMNS>
struct MmaMemory {
    Half* first;

    LTXK_DEVICE Half* a(int stage) const { return first + stage * (kMmaRanks * COLUMNS); }
    LTXK_DEVICE Half* b(const MergeLoraTiles& p, int first_slot, int index, int stage) const {
        int slot = index < p.held ? first_slot + index : static_cast<int>(p.slots) + stage;
        return first + kMmaStages * kMmaRanks * COLUMNS + slot * kSlot;
    }
};

// Chunks of eight elements are permuted so that eight which move at once fill all banks.
template <class Half>
LTXK_DEVICE Half* chunk_of_b(Half* slot, int row, int chunk) {
    return slot + row * kMmaRanks + (chunk ^ (row >> 1 & 3)) * 8;
}

template <class Half, int COLUMNS>
LTXK_DEVICE Half* chunk_of_a(Half* stage, int rank, int chunk) {
    return stage + rank * COLUMNS + (chunk ^ (rank & 7)) * 8;
}

// N elements of a factor into shared memory, of which `count` exist; zero in place of the others.
template <int N, class Half>
LTXK_DEVICE void copy_elements(const Half* factor, int count, Half* shared) {
    Pack<Half, N> elements;
#pragma unroll
    for (int k = 0; k < N; ++k) elements.value[k] = k < count ? factor[k] : Half{0};
    store<Half, N>(shared, elements);
}

// Whether rows of this length, one behind the other, consist of aligned groups of N elements of 16 bits.
template <int N>
LTXK_DEVICE bool in_groups(const void* factor, i64 length) {
    return length % N == 0 && reinterpret_cast<u64>(factor) % (2 * N) == 0;
}

// How many are left of what may be more than an int holds; a tile needs no more than 256.
LTXK_DEVICE int left_of(i64 count) { return static_cast<int>(count < 256 ? count : 256); }

template <class Half>
LTXK_DEVICE void load_b(const MergeLora& p, const RankStep& step, Half* slot) {
    constexpr int kRows = kMmaThreads / 4;
    const LoraFactors& lora = p.lora[step.lora];
    int thread = static_cast<int>(threadIdx.x), rank = step.rank + thread % 4 * 8;
    i64 row = static_cast<i64>(step.strip) * kMmaRows + thread / 4;
    int rows = left_of(p.rows - row), ranks = left_of(lora.rank - rank);
    const Half* b = static_cast<const Half*>(lora.b) + row * lora.rank + rank;
    Half* target = chunk_of_b(slot, thread / 4, thread % 4);
    if (in_groups<8>(lora.b, lora.rank)) {
#pragma unroll
        for (int r = 0; r < kMmaRows; r += kRows) copy_async<16>(target + r * kMmaRanks, b + r * lora.rank, r < rows && ranks > 0);
    } else {
#pragma unroll 1
        for (int r = 0; r < kMmaRows; r += kRows) copy_elements<8>(b + r * lora.rank, r < rows ? ranks : 0, target + r * kMmaRanks);
    }
}

// Pair 4 t + j of the columns of a group of 32 goes to word t of chunk j, which is column 2 t of the j-th product: lane t of four then has
// of four products the columns 8 t to 8 t + 7.
template <class Half, int COLUMNS>
LTXK_DEVICE void load_a(const MergeLora& p, const RankStep& step, Half* stage) {
    constexpr int kRanks = kMmaThreads / 32;
    const LoraFactors& lora = p.lora[step.lora];
    int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    i64 column = static_cast<i64>(step.column_tile) * COLUMNS + 2 * lane, pitch = kRanks * p.columns;
    int columns = left_of(p.columns - column), ranks = left_of(lora.rank - step.rank - warp);
    const Half* a = static_cast<const Half*>(lora.a) + (step.rank + warp) * p.columns + column;
    Half* target = chunk_of_a<Half, COLUMNS>(stage, warp, lane / 16 * 4 + lane % 4) + lane % 16 / 4 * 2;
    if (in_groups<2>(lora.a, p.columns)) {
#pragma unroll
        for (int k = 0; k < kMmaRanks; k += kRanks, a += pitch)
#pragma unroll
            for (int c = 0; c < COLUMNS; c += 64) copy_async<4>(target + k * COLUMNS + c, a + c, k < ranks && c < columns);
    } else {
#pragma unroll 1
        for (int k = 0; k < kMmaRanks; k += kRanks, a += pitch)
            for (int c = 0; c < COLUMNS; c += 64) copy_elements<2>(a + c, k < ranks ? columns - c : 0, target + k * COLUMNS + c);
    }
}

// sums[i][j] is the fragment of rows 16 i and of the j-th product of the warp.
template <int COLUMNS>
using WarpSums = float[kWarpRows / 16][COLUMNS / kWarpsInRow / 8][4];

template <class Half, int COLUMNS>
LTXK_DEVICE void multiply_step(Half* a, Half* b, WarpSums<COLUMNS>& sums) {
    constexpr int kChunks = COLUMNS / kWarpsInRow / 8;
    int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    int row = warp / kWarpsInRow * kWarpRows + lane % 16, chunk = warp % kWarpsInRow * kChunks + lane / 16;
#pragma unroll
    for (int k = 0; k < kMmaRanks / 16; ++k) {
        u32 right[kChunks / 2][4];
#pragma unroll
        for (int j = 0; j < kChunks / 2; ++j)
            load_matrices_transposed(right[j], chunk_of_a<Half, COLUMNS>(a, 16 * k + lane % 16, chunk + 2 * j));
#pragma unroll
        for (int i = 0; i < kWarpRows / 16; ++i) {
            u32 left[4];
            load_matrices(left, chunk_of_b(b, row + 16 * i, 2 * k + lane / 16));
#pragma unroll
            for (int j = 0; j < kChunks; ++j) {
                u32 two[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
                warp_mma<Half>(sums[i][j], left, two);
            }
        }
    }
}

LTXK_DEVICE i64 weight_bytes(const MergeLora& p) { return p.type == kE4M3 ? 1 : type_bytes(p.type); }

// The tile's weights are on their way to the L2 cache while the products are made.
template <int COLUMNS>
LTXK_DEVICE void prefetch_weights(const MergeLora& p, const RankStep& step) {
    i64 row = static_cast<i64>(step.strip) * kMmaRows + threadIdx.x, column = static_cast<i64>(step.column_tile) * COLUMNS, bytes = weight_bytes(p);
    if (p.column_stride != 1 || row >= p.rows) return;
    i64 left = p.columns - column, length = (left < COLUMNS ? left : COLUMNS) * bytes;
    const char* address = static_cast<const char*>(p.weight) + (row * p.row_stride + column) * bytes;
    for (i64 at = 0; at < length; at += 128) prefetch_l2(address + at);
}

struct e4m3 {
    u8 bits;
};

// Eight neighbouring weights, changed by scale times eight sums.
template <class Weight>
struct Eight {
    static constexpr int kBytes = sizeof(Weight);
    Words<2 * kBytes> words;

    LTXK_DEVICE void change(float scale, const float (&sums)[8]) {
        if constexpr (kSame<Weight, e4m3>) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u32 pairs[2];
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    float values[2];
                    from_e4m3_pair(words.word[i] >> 16 * k & 0xffffu, values);
#pragma unroll
                    for (int e = 0; e < 2; ++e) values[e] = fused(scale, sums[4 * i + 2 * k + e], values[e]);
                    pairs[k] = to_e4m3_pair(values);
                }
                words.word[i] = pairs[0] | pairs[1] << 16;
            }
        } else {
            PackWords<Weight, 8> both;
            float values[8];
#pragma unroll
            for (int k = 0; k < 2 * kBytes; ++k) both.word[k] = words.word[k];
            unpack<Weight, 8>(both.pack, values);
#pragma unroll
            for (int k = 0; k < 8; ++k) values[k] = fused(scale, sums[k], values[k]);
            both.pack = rounded<Weight, 8>(values);
#pragma unroll
            for (int k = 0; k < 2 * kBytes; ++k) words.word[k] = both.word[k];
        }
    }
};

// Sums of row 8 r of the warp and of its g-th group of 32 columns: those of the eight neighbours that the lane has there.
template <int COLUMNS>
LTXK_DEVICE void eight_sums(const WarpSums<COLUMNS>& sums, int r, int g, float (&eight)[8]) {
#pragma unroll
    for (int k = 0; k < 8; ++k) eight[k] = sums[r / 2][4 * g + k / 2][r % 2 * 2 + k % 2];
}

// Adds scale * sums to the warp's weights, whose first is at (row, column).
template <class Weight, int COLUMNS>
LTXK_DEVICE void merge_eights(const MergeLora& p, i64 row, i64 column, float scale, const WarpSums<COLUMNS>& sums) {
    using Weights = Eight<Weight>;
    constexpr int kGroups = COLUMNS / kWarpsInRow / 32, kRows = 2;
    int lane = static_cast<int>(threadIdx.x) % 32;
    row += lane / 4;
    column += lane % 4 * 8;
    char* first = static_cast<char*>(p.weight) + (row * p.row_stride + column) * Weights::kBytes;
    i64 pitch = 8 * p.row_stride * Weights::kBytes;
#pragma unroll
    for (int top = 0; top < kWarpRows / 8; top += kRows) {
        decltype(Weights::words) kept[kRows][kGroups];
        // All loads before the first store: the compiler may not move one over the other.
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                const char* address = first + (top + r) * pitch + 32 * g * Weights::kBytes;
                if (row + 8 * (top + r) < p.rows && column + 32 * g < p.columns)
                    kept[r][g] = *reinterpret_cast<const decltype(Weights::words)*>(address);
            }
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                char* address = first + (top + r) * pitch + 32 * g * Weights::kBytes;
                if (row + 8 * (top + r) >= p.rows || column + 32 * g >= p.columns) continue;
                float eight[8];
                eight_sums<COLUMNS>(sums, top + r, g, eight);
                Weights weights = {kept[r][g]};
                weights.change(scale, eight);
                *reinterpret_cast<decltype(Weights::words)*>(address) = weights.words;
            }
    }
}

// The same for weights that lie in any way, and for stochastic rounding, by way of the warp's part of shared memory.
template <int COLUMNS>
LTXK_DEVICE void merge_any(const MergeLora& p, i64 row, i64 column, float scale, const WarpSums<COLUMNS>& sums, float* shared) {
    constexpr int kColumns = COLUMNS / kWarpsInRow, kPitch = kColumns + kBouncePad;
    int lane = static_cast<int>(threadIdx.x) % 32;
    bool vectors = p.column_stride == 1 && in_fours(p.weight, p.row_stride, weight_bytes(p));
#pragma unroll 1
    for (int step = 0; step < kWarpRows / 8; ++step) {
        __syncwarp();
#pragma unroll
        for (int r = 0; r < kWarpRows / 8; ++r) {
            if (r != step) continue;
#pragma unroll
            for (int g = 0; g < kColumns / 32; ++g) {
                Pack<float, 8> eight;
                eight_sums<COLUMNS>(sums, r, g, eight.value);
#pragma unroll
                for (int k = 0; k < 8; ++k) eight.value[k] *= scale;
                store<float, 8>(shared + lane / 4 * kPitch + 32 * g + lane % 4 * 8, eight);
            }
        }
        __syncwarp();
        for (int at = lane; at < kBounceRows * kColumns / 4; at += 32) {
            int r = at / (kColumns / 4), c = at % (kColumns / 4) * 4;
            i64 y = row + 8 * step + r, x = column + c;
            if (y < p.rows) merge_four(p, y, x, p.columns - x, vectors, load<float, 4>(shared + r * kPitch + c).value);
        }
    }
}

template <class Half, bool SUM_STEPS>
LTXK_DEVICE void merge_tile(const MergeLoraTiles& p, i64 row, i64 column, const WarpSums<kMmaColumns<SUM_STEPS>>& sums, void* memory) {
    constexpr int kColumns = kMmaColumns<SUM_STEPS>;
    int warp = static_cast<int>(threadIdx.x) / 32;
    row += warp / kWarpsInRow * kWarpRows;
    column += warp % kWarpsInRow * (kColumns / kWarpsInRow);
    float scale = static_cast<float>(p.lora[p.count - 1].scale);
    if (p.bounce) {
        float* shared = reinterpret_cast<float*>(static_cast<char*>(memory) + p.bounce);
        merge_any<kColumns>(p, row, column, scale, sums, shared + warp * kBounceRows * (kColumns / kWarpsInRow + kBouncePad));
    } else if constexpr (SUM_STEPS) {
        merge_eights<float, kColumns>(p, row, column, scale, sums);
    } else if (p.type == kBF16) {
        merge_eights<bf16, kColumns>(p, row, column, scale, sums);
    } else if (p.type == kF16) {
        merge_eights<f16, kColumns>(p, row, column, scale, sums);
    } else {
        merge_eights<e4m3, kColumns>(p, row, column, scale, sums);
    }
}

// The scale of a LoRA is over that of the next one: what is summed up so far is multiplied by it before the next one's products are added.
//
// SUM_STEPS, for fp32 weights: tensor cores cut sums off where they hold no more bits, so that the products of 32 ranks are added to
// fp32 totals outside of them, each sum rounded to nearest.
template <class Half, bool SUM_STEPS>
__global__ void __launch_bounds__(kMmaThreads, 1) merge_lora_tensor_cores(MergeLoraTiles p) {
    constexpr int kColumns = kMmaColumns<SUM_STEPS>;
    LTXK_DYNAMIC_SHARED(Half, shared);
    MmaMemory<Half, kColumns> memory = {shared};
    u32 tile = blockIdx.x * static_cast<u32>(p.walk), left = static_cast<u32>(p.tiles) - tile;
    u32 end = tile + (left < p.walk ? left : static_cast<u32>(p.walk));
    u32 tiles_in_row = static_cast<u32>(p.column_tiles);
    RankStep ahead = {tile, end, tile / tiles_in_row, tile % tiles_in_row, 0, 0, 0, 0, true};
    u32 strip = ahead.strip, column_tile = ahead.column_tile;
    auto ask = [&](int stage) {
        if (ahead.tile < ahead.end) {
            if (ahead.index == 0) prefetch_weights<kColumns>(p, ahead);
            load_a<Half, kColumns>(p, ahead, memory.a(stage));
            if (ahead.fresh || ahead.index >= p.held) load_b(p, ahead, memory.b(p, ahead.first_slot, ahead.index, stage));
            ahead.advance(p);
        }
        commit_copies();
    };
#pragma unroll 1
    for (int stage = 0; stage < kMmaStages - 1; ++stage) ask(stage);
    int stage = 0, first_slot = 0;
#pragma unroll 1
    for (; tile < end; ++tile) {
        WarpSums<kColumns> sums = {};
        [[maybe_unused]] WarpSums<kColumns> total = {};
        int index = 0;
#pragma unroll 1
        for (int lora = 0; lora < p.count; ++lora) {
#pragma unroll 1
            for (int rank = 0; rank < p.lora[lora].rank; rank += kMmaRanks, ++index) {
                wait_copies<kMmaStages - 2>();
                __syncthreads();
                // Every warp is past the step before this one.
                ask(stage == 0 ? kMmaStages - 1 : stage - 1);
                multiply_step<Half, kColumns>(memory.a(stage), memory.b(p, first_slot, index, stage), sums);
                if constexpr (SUM_STEPS) {
#pragma unroll
                    for (int i = 0; i < kWarpRows / 16; ++i)
#pragma unroll
                        for (int j = 0; j < kColumns / kWarpsInRow / 8; ++j)
#pragma unroll
                            for (int k = 0; k < 4; ++k) {
                                total[i][j][k] += sums[i][j][k];
                                sums[i][j][k] = 0.0f;
                            }
                }
                stage = stage + 1 == kMmaStages ? 0 : stage + 1;
            }
            if (lora + 1 < p.count) {
                float scale = static_cast<float>(p.lora[lora].scale);
#pragma unroll
                for (int i = 0; i < kWarpRows / 16; ++i)
#pragma unroll
                    for (int j = 0; j < kColumns / kWarpsInRow / 8; ++j)
#pragma unroll
                        for (int k = 0; k < 4; ++k) (SUM_STEPS ? total : sums)[i][j][k] *= scale;
            }
        }
        merge_tile<Half, SUM_STEPS>(p, static_cast<i64>(strip) * kMmaRows, static_cast<i64>(column_tile) * kColumns, SUM_STEPS ? total : sums, shared);
        if (++column_tile < tiles_in_row) continue;
        column_tile = 0;
        ++strip;
        first_slot += static_cast<int>(p.held);
        if (first_slot == p.slots) first_slot = 0;
    }
}

}  // namespace ltxk
