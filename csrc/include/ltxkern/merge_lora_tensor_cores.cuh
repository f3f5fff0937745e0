// LoRA merge on tensor cores, for factors that are all fp16 or all bf16 and weights of any dtype; see merge_lora.cuh for the op.
//
// Block = 8 warps on tiles of 256 rows, two warps side by side; it walks along such a strip of rows. The factors come in steps of 64 ranks
// by asynchronous copies, one step ahead: A through two stages, B into slots that keep as much of the strip as fits, so that each tile asks
// for its columns of A alone. Two columns of A move at once, to where the lane that multiplies them ends with eight neighbouring weights:
// they are changed in its registers, 16 bytes at a time, without a detour through shared memory.
#pragma once

#include "ltxkern/merge_lora.cuh"

namespace ltxk {

constexpr int kMmaRows = 256, kMmaRanks = 64, kMmaThreads = 256;
constexpr int kWarpRows = 64, kWarpsInRow = 2;
// Ranks of which tensor cores take the sum before fp32 totals do.
constexpr int kSummed = 32;
constexpr int kSlot = kMmaRows * kMmaRanks;  // elements of B of one step
// Columns of a tile: fp32 weights have totals beside their sums.
template <bool SUM_STEPS>
constexpr int kMmaColumns = SUM_STEPS ? 64 : 128;

struct MergeLoraTiles : MergeLora {
    i64 tiles, walk;  // of the weight; of a block, one behind the other
    i64 held, slots;  // steps of B that stay in shared memory; their slots, two for a single step
    i64 in_eights;    // whether eight weights lie side by side, and are rounded to nearest
};

#ifndef LTXK_SHIM
// As copy_async(), of 4 bytes.
LTXK_DEVICE void copy_async_word(void* shared, const void* global, bool exists) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(exists ? 4 : 0) : "memory");
}
#endif

// The step that is asked for next: 64 ranks of one LoRA, for one tile.
struct RankStep {
    u32 tile, end, strip, column_tile;
    int lora, rank, index, first_slot;
    bool fresh;  // B of this strip is not here yet

    LTXK_DEVICE void advance(const MergeLoraTiles& p) {
        ++index;
        rank += kMmaRanks;
        if (rank < static_cast<int>(p.lora[lora].rank)) return;
        rank = 0;
        if (++lora < static_cast<int>(p.count)) return;
        lora = index = 0;
        ++tile;
        fresh = ++column_tile == static_cast<u32>(p.column_tiles);
        if (!fresh) return;
        column_tile = 0;
        ++strip;
        first_slot += static_cast<int>(p.held);
        if (first_slot == static_cast<int>(p.slots)) first_slot = 0;
    }
};

// Shared memory: both stages of A, the slots of B, and two stages of B where it has steps that do not stay.
template <class Half, int COLUMNS>
struct MmaMemory {
    Half* first;

    LTXK_DEVICE Half* a(int stage) const { return first + stage * (kMmaRanks * COLUMNS); }
    LTXK_DEVICE Half* b(const MergeLoraTiles& p, int first_slot, int index, int stage) const {
        int slot = index < static_cast<int>(p.held) ? first_slot + index : static_cast<int>(p.slots) + stage;
        return first + 2 * kMmaRanks * COLUMNS + slot * kSlot;
    }
};

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

// Chunks of eight ranks of a row are permuted so that those of eight rows fill all banks.
template <class Half>
LTXK_DEVICE void load_b(const MergeLora& p, const RankStep& step, Half* slot) {
    constexpr int kRows = kMmaThreads / 8;
    const LoraFactors& lora = p.lora[step.lora];
    u32 chunk = threadIdx.x % 8, y = threadIdx.x / 8;
    int rank = step.rank + static_cast<int>(chunk) * 8;
    i64 row = static_cast<i64>(step.strip) * kMmaRows + y;
    int rows = left_of(p.rows - row), ranks = static_cast<int>(lora.rank) - rank;
    const Half* b = static_cast<const Half*>(lora.b) + row * lora.rank + rank;
    Half* target = slot + y * kMmaRanks + (chunk ^ (y & 7)) * 8;
    if (in_groups<8>(lora.b, lora.rank)) {
#pragma unroll
        for (int r = 0; r < kMmaRows; r += kRows) copy_async(target + r * kMmaRanks, b + r * lora.rank, r < rows && ranks > 0);
    } else {
#pragma unroll 1
        for (int r = 0; r < kMmaRows; r += kRows) copy_elements<8>(b + r * lora.rank, r < rows ? ranks : 0, target + r * kMmaRanks);
    }
}

// Pair 4 t + j of the columns of a group of 32 goes to word t of chunk j, which is column 2 t of the j-th product: lane t of four then has
// of four products the columns 8 t to 8 t + 7. Chunks of eight columns are permuted so that those of eight ranks fill all banks.
template <class Half, int COLUMNS>
LTXK_DEVICE void load_a(const MergeLora& p, const RankStep& step, Half* stage) {
    constexpr int kRanks = kMmaThreads / 32;
    const LoraFactors& lora = p.lora[step.lora];
    u32 lane = threadIdx.x % 32, chunk = lane / 16 * 4 + lane % 4;
    int y = static_cast<int>(threadIdx.x / 32);
    i64 column = static_cast<i64>(step.column_tile) * COLUMNS + 2 * lane, pitch = kRanks * p.columns;
    int columns = left_of(p.columns - column), ranks = static_cast<int>(lora.rank) - step.rank - y;
    const Half* a = static_cast<const Half*>(lora.a) + (step.rank + y) * p.columns + column;
    Half* target = stage + y * COLUMNS + (chunk ^ threadIdx.x / 32) * 8 + lane % 16 / 4 * 2;
    if (in_groups<2>(lora.a, p.columns)) {
#pragma unroll
        for (int k = 0; k < kMmaRanks; k += kRanks, a += pitch)
#pragma unroll
            for (int c = 0; c < COLUMNS; c += 64) copy_async_word(target + k * COLUMNS + c, a + c, k < ranks && c < columns);
    } else {
#pragma unroll 1
        for (int k = 0; k < kMmaRanks; k += kRanks, a += pitch)
            for (int c = 0; c < COLUMNS; c += 64) copy_elements<2>(a + c, k < ranks ? columns - c : 0, target + k * COLUMNS + c);
    }
}

// sums[i][j] is the fragment of rows 16 i and of the j-th product of the warp.
template <int COLUMNS>
using WarpSums = float[kWarpRows / 16][COLUMNS / kWarpsInRow / 8][4];

template <int COLUMNS>
LTXK_DEVICE void scale_sums(WarpSums<COLUMNS>& sums, float scale) {
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS / kWarpsInRow / 8; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[i][j][k] *= scale;
}

// Adds the products of a step's ranks [first, first + kSummed).
template <class Half, int COLUMNS>
LTXK_DEVICE void multiply_ranks(const Half* a, const Half* b, u32 first, WarpSums<COLUMNS>& sums) {
    constexpr int kChunks = COLUMNS / kWarpsInRow / 8;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Where the lane's row of the first matrices begins; the others are a row or bits of the chunk away.
    u32 right = lane % 16 * COLUMNS + (warp % kWarpsInRow * kChunks ^ lane / 16 ^ lane % 8) * 8;
    u32 left = (warp / kWarpsInRow * kWarpRows + lane % 16) * kMmaRanks + (lane / 16 ^ lane % 8) * 8;
#pragma unroll
    for (u32 k = first; k < first + kSummed; k += 16) {
        u32 columns[kChunks / 2][4];
#pragma unroll
        for (u32 j = 0; j < kChunks / 2; ++j) load_matrices_transposed(columns[j], a + (right ^ 16 * j) + k * COLUMNS);
#pragma unroll
        for (int i = 0; i < kWarpRows / 16; ++i) {
            u32 rows[4];
            load_matrices(rows, b + (left ^ k) + 16 * i * kMmaRanks);
#pragma unroll
            for (int j = 0; j < kChunks; ++j) {
                u32 two[2] = {columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1]};
                warp_mma<Half>(sums[i][j], rows, two);
            }
        }
    }
}

LTXK_DEVICE i64 weight_bytes(const MergeLora& p) { return p.type == kE4M3 ? 1 : type_bytes(p.type); }

// The tile's weights are on their way to the L2 cache while the products are made.
template <int COLUMNS>
LTXK_DEVICE void prefetch_weights(const MergeLora& p, const RankStep& step) {
    i64 row = static_cast<i64>(step.strip) * kMmaRows + threadIdx.x, column = static_cast<i64>(step.column_tile) * COLUMNS;
    i64 bytes = weight_bytes(p);
    if (p.column_stride != 1 || row >= p.rows) return;
    int length = left_of(p.columns - column < COLUMNS ? p.columns - column : COLUMNS) * static_cast<int>(bytes);
    const char* address = static_cast<const char*>(p.weight) + (row * p.row_stride + column) * bytes;
#pragma unroll 1
    for (int at = 0; at < length; at += 128) prefetch_l2(address + at);
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
    constexpr int kGroups = COLUMNS / kWarpsInRow / 32, kRows = 4;
    int lane = static_cast<int>(threadIdx.x % 32);
    row += lane / 4;
    column += lane % 4 * 8;
    char* first = static_cast<char*>(p.weight) + (row * p.row_stride + column) * Weights::kBytes;
    i64 pitch = 8 * p.row_stride * Weights::kBytes;
    int rows = left_of(p.rows - row), columns = left_of(p.columns - column);
#pragma unroll
    for (int top = 0; top < kWarpRows / 8; top += kRows) {
        // Zeros, or what a lane does not load would be that of the rows before, in registers all the time.
        decltype(Weights::words) kept[kRows][kGroups] = {};
        // All loads before the first store: the compiler may not move one over the other.
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                const char* address = first + (top + r) * pitch + 32 * g * Weights::kBytes;
                if (8 * (top + r) < rows && 32 * g < columns) kept[r][g] = *reinterpret_cast<const decltype(Weights::words)*>(address);
            }
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                char* address = first + (top + r) * pitch + 32 * g * Weights::kBytes;
                if (8 * (top + r) >= rows || 32 * g >= columns) continue;
                float eight[8];
                eight_sums<COLUMNS>(sums, top + r, g, eight);
                Weights weights = {kept[r][g]};
                weights.change(scale, eight);
                *reinterpret_cast<decltype(Weights::words)*>(address) = weights.words;
            }
    }
}

// The same for weights that lie in any way, and for stochastic rounding, by way of the warp's part of shared memory: eight rows at a time.
template <int COLUMNS>
LTXK_DEVICE void merge_any(const MergeLora& p, i64 row, i64 column, float scale, const WarpSums<COLUMNS>& sums, float* shared) {
    constexpr int kColumns = COLUMNS / kWarpsInRow;
    int lane = static_cast<int>(threadIdx.x % 32);
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
                store<float, 8>(shared + lane / 4 * kColumns + 32 * g + lane % 4 * 8, eight);
            }
        }
        __syncwarp();
#pragma unroll 1
        for (int at = lane; at < 8 * kColumns / 4; at += 32) {
            int r = at / (kColumns / 4), c = at % (kColumns / 4) * 4;
            i64 y = row + 8 * step + r, x = column + c;
            if (y < p.rows) merge_four(p, y, x, p.columns - x, vectors, load<float, 4>(shared + r * kColumns + c).value);
        }
    }
}

// `shared`: the stage of A that was multiplied last, which fits the sums of eight rows of every warp.
template <class Half, bool SUM_STEPS>
LTXK_DEVICE void merge_tile(const MergeLoraTiles& p, i64 row, i64 column, const WarpSums<kMmaColumns<SUM_STEPS>>& sums, Half* shared) {
    constexpr int kColumns = kMmaColumns<SUM_STEPS>, kWarpColumns = kColumns / kWarpsInRow;
    static_assert(kMmaThreads / 32 * 8 * kWarpColumns * sizeof(float) <= kMmaRanks * kColumns * sizeof(Half));
    u32 warp = threadIdx.x / 32;
    row += warp / kWarpsInRow * kWarpRows;
    column += warp % kWarpsInRow * kWarpColumns;
    float scale = static_cast<float>(p.lora[p.count - 1].scale);
    if (!p.in_eights) {
        __syncthreads();
        merge_any<kColumns>(p, row, column, scale, sums, reinterpret_cast<float*>(shared) + warp * 8 * kWarpColumns);
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
// SUM_STEPS, for fp32 weights: tensor cores cut sums off where they hold no more bits, so that the products of kSummed ranks are added to
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
    int stage = 1, first_slot = 0;
    auto ask = [&]() {
        stage ^= 1;
        if (ahead.tile < ahead.end) {
            if (ahead.index == 0) prefetch_weights<kColumns>(p, ahead);
            load_a<Half, kColumns>(p, ahead, memory.a(stage));
            if (ahead.fresh || ahead.index >= static_cast<int>(p.held)) load_b(p, ahead, memory.b(p, ahead.first_slot, ahead.index, stage));
            ahead.advance(p);
        }
        commit_copies();
    };
    ask();
#pragma unroll 1
    for (; tile < end; ++tile) {
        // CUDA 12.8's compiler breaks down where the alias gets kColumns here.
        WarpSums<kMmaColumns<SUM_STEPS>> sums = {};
        [[maybe_unused]] WarpSums<kMmaColumns<SUM_STEPS>> total = {};
        int index = 0;
#pragma unroll 1
        for (int lora = 0; lora < static_cast<int>(p.count); ++lora) {
            int ranks = static_cast<int>(p.lora[lora].rank);
#pragma unroll 1
            for (int rank = 0; rank < ranks; rank += kMmaRanks, ++index) {
                wait_copies<0>();
                __syncthreads();
                Half *a = memory.a(stage), *b = memory.b(p, first_slot, index, stage);
                // Every warp is past the step before this one.
                ask();
#pragma unroll
                for (int first = 0; first < kMmaRanks; first += kSummed) {
                    if (first && rank + first >= ranks) break;
                    multiply_ranks<Half, kColumns>(a, b, first, sums);
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
                }
            }
            if (lora + 1 == static_cast<int>(p.count)) break;
            scale_sums<kColumns>(SUM_STEPS ? total : sums, static_cast<float>(p.lora[lora].scale));
        }
        i64 row = static_cast<i64>(strip) * kMmaRows, column = static_cast<i64>(column_tile) * kColumns;
        // The stage that is not asked for.
        merge_tile<Half, SUM_STEPS>(p, row, column, SUM_STEPS ? total : sums, memory.a(stage ^ 1));
        if (++column_tile < tiles_in_row) continue;
        column_tile = 0;
        ++strip;
        first_slot += static_cast<int>(p.held);
        if (first_slot == static_cast<int>(p.slots)) first_slot = 0;
    }
}

}  // namespace ltxk
