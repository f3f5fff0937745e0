// From one LoRA phase to another in one pass over a weight: the product is subtracted, what that leaves wrong is put right, another
// multiple of the product is added, and the result is summed up for its checksum.
#pragma once

#include "ltxkern/types.cuh"

namespace ltxk {

// A row of the checksum, and what the places of corrections count from.
constexpr int kSwitchTile = 4096, kSwitchGroup = 256, kSwitchThreads = 256;
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
    i64 size, first, walk;    // elements; the first tile's number in the whole weight; tiles of a block
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
    const int* base = static_cast<const int*>(p.bases) + 2 * tile;
    const short* place = static_cast<const short*>(p.places) + 2 * (tile * (kSwitchTile / kSwitchGroup) + group);
    bool last = group + 1 == kSwitchTile / kSwitchGroup;
    i64 at = static_cast<i64>(base[0]) + place[0], end = last ? base[2] : static_cast<i64>(base[0]) + place[2];
    i64 escape = static_cast<i64>(base[1]) + place[1];
    u32 lane = threadIdx.x % 32;
    for (; at < end; at += 32) {
        bool mine = at + lane < end;
        int distance = mine ? static_cast<const signed char*>(p.codes)[at + lane] : 0;
        u32 escaped = __ballot_sync(0xffffffffu, distance == kEscape);
        if (distance == kEscape) distance = static_cast<const short*>(p.escapes)[escape + ones(escaped & ((1u << lane) - 1))];
        escape += ones(escaped);
        // No two corrections are of one element.
        if (mine) bits[static_cast<const u8*>(p.offsets)[at + lane]] += static_cast<u16>(distance);
    }
}

// Block = `walk` tiles of 4096 elements, one after the other; a warp has groups of 256, eight elements a lane.
template <class T>
__global__ void __launch_bounds__(kSwitchThreads, 4) switch_lora(SwitchLora p) {
    LTXK_SHARED(SwitchMemory, memory);
    constexpr int kGroups = kSwitchTile / kSwitchGroup / (kSwitchThreads / 32);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float subtract = static_cast<float>(p.subtract), add = static_cast<float>(p.add);
    u64 plain = 0, weighted = 0;
    for (i64 i = 0; i < p.walk; ++i) {
        i64 tile = static_cast<i64>(blockIdx.x) * p.walk + i;
        if (tile * kSwitchTile >= p.size) break;
        PackWords<T, 8> packs[kGroups], deltas[kGroups];
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
            i64 at = tile * kSwitchTile + (j * kSwitchThreads + threadIdx.x) * 8;
            packs[j] = deltas[j] = {};
            if (at >= p.size) continue;
            packs[j].pack = load_streaming<T, 8>(static_cast<const T*>(p.weight) + at);
            deltas[j].pack = load<T, 8>(static_cast<const T*>(p.delta) + at);
        }
        u64 sum = 0;
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
            u32 group = j * (kSwitchThreads / 32) + warp;
            i64 at = tile * kSwitchTile + group * kSwitchGroup + lane * 8;
            float values[8], delta[8];
            unpack(deltas[j].pack, delta);
            if (p.subtract != 0.0) {
                unpack(packs[j].pack, values);
#pragma unroll
                for (int k = 0; k < 8; ++k) values[k] -= subtract * delta[k];
                packs[j].pack = rounded<T, 8>(values);
            }
            if (p.bases) {
                T* mine = reinterpret_cast<T*>(memory.bits[warp]) + lane * 8;
                store<T, 8>(mine, packs[j].pack);
                __syncwarp();
                correct_group(p, p.first + tile, group, memory.bits[warp]);
                __syncwarp();
                packs[j].pack = load<T, 8>(mine);
            }
            if (p.add != 0.0) {
                unpack(packs[j].pack, values);
#pragma unroll
                for (int k = 0; k < 8; ++k) values[k] += add * delta[k];
                packs[j].pack = rounded<T, 8>(values);
            }
            if (at >= p.size) continue;
            store_streaming<T, 8>(static_cast<T*>(p.out) + at, packs[j].pack);
#pragma unroll
            for (int k = 0; k < 4; k += 2) sum += static_cast<u64>(packs[j].word[k + 1]) << 32 | packs[j].word[k];
        }
        plain += sum;
        weighted += sum * static_cast<u64>(2 * (p.first + tile) + 1);
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
    for (int w = 0; w < kSwitchThreads / 32; ++w) total += memory.sums[w][threadIdx.x];
    static_cast<u64*>(p.sums)[2 * static_cast<i64>(blockIdx.x) + threadIdx.x] = total;
}

}  // namespace ltxk
