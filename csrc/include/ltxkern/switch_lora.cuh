// From one LoRA phase to another in one pass over a weight: the product is subtracted, what that leaves wrong is put right, another
// multiple of the product is added, and the result is summed up for its checksum.
#pragma once

#include "ltxkern/types.cuh"

namespace ltxk {

// A row of the checksum, and what the places of corrections count from.
constexpr int kSwitchTile = 4096, kSwitchGroup = 256, kSwitchGroups = kSwitchTile / kSwitchGroup, kSwitchThreads = 256;
constexpr int kEscape = -128;

struct SwitchLora {
    const void* weight;
    const void* delta;
    const void* bases;    // i32 (tiles + 1, 2): corrections and escapes before a tile of the whole weight; null: none are wrong
    const void* places;   // i16 (groups, 2): the same before a group, counted from its tile
    const void* offsets;  // u8: place of a correction in its group
    const void* codes;    // i8: what is added to the bits there; kEscape: the next escape is
    const void* escapes;  // i16
    void* out;
    void* sums;               // i64 (blocks, 2): of the words of 8 bytes, and the same times the odd number of their tile
    i64 size, first, walk;    // elements of whole tiles; the first tile's number in the whole weight; tiles of a block
    double subtract, add;     // powers of two, or 0
};

struct SwitchMemory {
    alignas(16) u16 bits[kSwitchThreads / 32][kSwitchGroup];
    u64 sums[kSwitchThreads / 32][2];
};

LTXK_DEVICE u32 ones(u32 mask) {
#if defined(LTXK_SHIM)
    return static_cast<u32>(__builtin_popcount(mask));
#else
    return static_cast<u32>(__popc(mask));
#endif
}

// The corrections of one group, by a warp, on the bits of its elements.
LTXK_DEVICE void correct_group(const SwitchLora& p, i64 tile, u32 group, u16* bits) {
    const int* bases = static_cast<const int*>(p.bases) + 2 * tile;
    const short* places = static_cast<const short*>(p.places) + 2 * (tile * kSwitchGroups + group);
    Pack<int, 2> base = load<int, 2>(bases);
    Pack<short, 2> place = load<short, 2>(places);
    u32 lane = threadIdx.x % 32, below = (1u << lane) - 1;
    int at = base.value[0] + place.value[0], escape = base.value[1] + place.value[1];
    int end = group + 1 == kSwitchGroups ? bases[2] : base.value[0] + places[2];
    const u8* offsets = static_cast<const u8*>(p.offsets);
    const signed char* codes = static_cast<const signed char*>(p.codes);
    const short* escapes = static_cast<const short*>(p.escapes);
#pragma unroll 1
    for (at += static_cast<int>(lane); at - static_cast<int>(lane) < end; at += 32) {
        int distance = at < end ? codes[at] : 0;
        u32 escaped = __ballot_sync(0xffffffffu, distance == kEscape);
        if (distance == kEscape) distance = escapes[escape + static_cast<int>(ones(escaped & below))];
        escape += static_cast<int>(ones(escaped));
        // No two corrections are of one element.
        if (at < end) bits[offsets[at]] += static_cast<u16>(distance);
    }
}

// values + scale * delta, each rounded.
template <class T>
LTXK_DEVICE void add_scaled(PackWords<T, 8>& words, const float (&delta)[8], float scale) {
    float values[8];
    unpack(words.pack, values);
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] += scale * delta[k];
    words.pack = rounded<T, 8>(values);
}

// Block = `walk` tiles of 4096 elements, one after the other; a warp has groups of 256, eight elements a lane.
template <class T>
__global__ void __launch_bounds__(kSwitchThreads, 4) switch_lora(SwitchLora p) {
    LTXK_SHARED(SwitchMemory, memory);
    constexpr int kPacks = kSwitchTile / kSwitchThreads / 8, kWarps = kSwitchThreads / 32;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float subtract = -static_cast<float>(p.subtract), add = static_cast<float>(p.add);
    bool subtracts = subtract != 0.0f, adds = add != 0.0f, corrects = p.bases != nullptr;
    T* mine = reinterpret_cast<T*>(memory.bits[warp]) + lane * 8;
    i64 tile = static_cast<i64>(blockIdx.x) * p.walk, left = p.size / kSwitchTile - tile;
    i64 at = tile * kSwitchTile + threadIdx.x * 8;
    const T *weight = static_cast<const T*>(p.weight) + at, *product = static_cast<const T*>(p.delta) + at;
    T* out = static_cast<T*>(p.out) + at;
    u32 tiles = static_cast<u32>(left < p.walk ? left : p.walk);
    u64 number = static_cast<u64>(p.first + tile), plain = 0, weighted = 0;
#pragma unroll 1
    for (u32 i = 0; i < tiles; ++i, weight += kSwitchTile, product += kSwitchTile, out += kSwitchTile, ++number) {
        PackWords<T, 8> packs[kPacks];
        Pack<T, 8> deltas[kPacks];
#pragma unroll
        for (int j = 0; j < kPacks; ++j) packs[j].pack = load_streaming<T, 8>(weight + j * kSwitchThreads * 8);
#pragma unroll
        for (int j = 0; j < kPacks; ++j) deltas[j] = load<T, 8>(product + j * kSwitchThreads * 8);
        u64 sum = 0;
#pragma unroll
        for (int j = 0; j < kPacks; ++j) {
            float delta[8];
            unpack(deltas[j], delta);
            if (subtracts) add_scaled(packs[j], delta, subtract);
            if (corrects) {
                store<T, 8>(mine, packs[j].pack);
                __syncwarp();
                correct_group(p, static_cast<i64>(number), j * kWarps + warp, memory.bits[warp]);
                __syncwarp();
                packs[j].pack = load<T, 8>(mine);
            }
            if (adds) add_scaled(packs[j], delta, add);
            store_streaming<T, 8>(out + j * kSwitchThreads * 8, packs[j].pack);
#pragma unroll
            for (int k = 0; k < 4; k += 2) sum += static_cast<u64>(packs[j].word[k + 1]) << 32 | packs[j].word[k];
        }
        plain += sum;
        weighted += sum * (2 * number + 1);
    }
#pragma unroll
    for (u32 apart = 16; apart > 0; apart >>= 1) {
        plain += __shfl_xor_sync(0xffffffffu, plain, apart);
        weighted += __shfl_xor_sync(0xffffffffu, weighted, apart);
    }
    if (lane == 0) {
        memory.sums[warp][0] = plain;
        memory.sums[warp][1] = weighted;
    }
    __syncthreads();
    if (threadIdx.x >= 2) return;
    u64 total = 0;
    for (int w = 0; w < kWarps; ++w) total += memory.sums[w][threadIdx.x];
    static_cast<u64*>(p.sums)[2 * static_cast<i64>(blockIdx.x) + threadIdx.x] = total;
}

}  // namespace ltxk
