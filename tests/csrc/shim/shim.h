// A CUDA thread block on the CPU: what device code sees when it is compiled with LTXK_SHIM.
//
// Every CUDA thread is a fiber; the scheduler runs them in a random order and checks barriers and shuffles. Blocks run one after
// the other, except those of a cooperative grid, which run together. See scheduler.cpp for what is checked.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace ltxk::shim {

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// This block's memory of one LTXK_SHARED site, and its dynamic shared memory; poisoned before the block starts.
void* shared_memory(const void* site, std::size_t bytes);
void* dynamic_shared_memory();

void sync_block(const void* site);
void sync_warp(unsigned mask, const void* site);
// Publishes `value` and waits for all lanes of `mask`; returns what lane `source` published.
std::uint64_t exchange(unsigned mask, std::uint64_t value, unsigned source, const void* site);
unsigned vote(unsigned mask, bool value, const void* site);
// What all lanes of the warp published, by lane.
void gather(std::uint64_t value, std::uint64_t (&values)[32], const void* site);
unsigned lane();
void yield();

// Asynchronous copies of one thread. Each lands at once or, as late as may be, in the wait for its group: a coin decides, so that both
// a missing wait and a copy into memory that is still being read show as wrong values.
struct AsyncCopies {
    struct Copy {
        void* shared;
        const void* global;
        std::size_t bytes;
        bool exists;
    };
    std::vector<std::vector<Copy>> groups = {{}};
};
AsyncCopies& async_copies();
bool lands_at_once();
// Fail unless an address is a multiple of `bytes`, and that many bytes there are in this block's shared memory.
void require_aligned(const void* address, std::size_t bytes);
void require_shared(const void* address, std::size_t bytes);

template <class T>
inline T shuffle(unsigned mask, T value, unsigned source, const void* site) {
    static_assert(sizeof(T) <= 8);
    std::uint64_t raw = 0;
    std::memcpy(&raw, &value, sizeof(T));
    raw = exchange(mask, raw, source, site);
    std::memcpy(&value, &raw, sizeof(T));
    return value;
}

}  // namespace ltxk::shim

// One static object per call site is the site's name: two barriers on two lines are two barriers.
#define LTXK_SITE ([]() -> const void* { static char site; return &site; }())

#define __syncthreads() ltxk::shim::sync_block(LTXK_SITE)
#define __syncwarp(...) ltxk::shim::sync_warp(0xffffffffu, LTXK_SITE)
#define __shfl_xor_sync(mask, value, bits) \
    ltxk::shim::shuffle(mask, value, ltxk::shim::lane() ^ static_cast<unsigned>(bits), LTXK_SITE)
#define __shfl_sync(mask, value, source) ltxk::shim::shuffle(mask, value, static_cast<unsigned>(source) % 32u, LTXK_SITE)
#define __shfl_down_sync(mask, value, delta) \
    ltxk::shim::shuffle(mask, value, \
                        ltxk::shim::lane() + (delta) < 32u ? ltxk::shim::lane() + (delta) : ltxk::shim::lane(), LTXK_SITE)
#define __ballot_sync(mask, value) ltxk::shim::vote(mask, static_cast<bool>(value), LTXK_SITE)

inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
    unsigned old = *address;
    *address = old + value;
    return old;
}

namespace ltxk {
inline void signal_add(unsigned* flag) { atomicAdd(flag, 1u); }
inline unsigned acquire(const unsigned* flag) { return *static_cast<const volatile unsigned*>(flag); }
inline void spin_pause() { shim::yield(); }
}  // namespace ltxk

#include "warp_matrix.h"
