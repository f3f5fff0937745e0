// What device code may use, so that one kernel source compiles under nvcc, NVRTC and the CPU shim of the tests.
//
// No standard header is included: NVRTC has none. Shared memory, cluster and grid primitives go through the names below because
// the shim gives them another meaning (every CUDA thread is a fiber, every block has its own shared memory).
#pragma once

#if defined(LTXK_SHIM)
#include "shim.h"
#endif

namespace ltxk {

using i64 = long long;
using u64 = unsigned long long;
using u32 = unsigned int;
using u16 = unsigned short;
using u8 = unsigned char;

}  // namespace ltxk

#define LTXK_DEVICE __device__ __forceinline__

#if defined(LTXK_SHIM)

#define LTXK_SHARED(type, name) \
    static char name##_site; \
    type& name = *static_cast<type*>(ltxk::shim::shared_memory(&name##_site, sizeof(type)))
#define LTXK_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(ltxk::shim::dynamic_shared_memory())

#else

// A fixed-size object in shared memory; arrays are wrapped in a struct.
#define LTXK_SHARED(type, name) __shared__ type name
// The launch's dynamic shared memory, 16-byte aligned.
#define LTXK_DYNAMIC_SHARED(type, name) \
    extern __shared__ __align__(16) unsigned char ltxk_dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(ltxk_dynamic_shared)

namespace ltxk {

// Rank of this block within its cluster; 0 where the launch has no clusters.
LTXK_DEVICE u32 cluster_rank() {
#if __CUDA_ARCH__ >= 900
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

// Barrier over all threads of the cluster, ordering shared memory of its blocks.
LTXK_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// The same shared-memory object in the block of the given rank of this cluster.
template <class T>
LTXK_DEVICE T* cluster_peer(T* local, u32 rank) {
#if __CUDA_ARCH__ >= 900
    u64 address = reinterpret_cast<u64>(local), peer;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(address), "r"(rank));
    return reinterpret_cast<T*>(peer);
#else
    return local;
#endif
}

// Write to global memory that another block sees once it acquires the flag.
LTXK_DEVICE void signal_add(u32* flag) {
    __threadfence();
    atomicAdd(flag, 1u);
}

LTXK_DEVICE u32 acquire(const u32* flag) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

// Between two looks at a flag.
LTXK_DEVICE void spin_pause() { __nanosleep(20); }

}  // namespace ltxk

#endif
