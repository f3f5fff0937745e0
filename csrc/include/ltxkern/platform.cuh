// What device code may use, so that one kernel source compiles under nvcc, NVRTC and the CPU shim of the tests.
//
// No standard header is included: NVRTC has none. Shared memory and what blocks tell one another go through the names below because
// the shim gives them another meaning (every CUDA thread is a fiber, every block has its own shared memory). So do the tensor cores
// and the asynchronous copies.
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

struct f16;
struct bf16;

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

// d += a * b by the whole warp: a 16 x 16, b 16 x 8, d 16 x 8, products exact, sums in fp32. With g = lane / 4, t = lane % 4 a lane holds
// of a the columns 2t, 2t + 1 in rows g and g + 8, then 2t + 8, 2t + 9 in these rows; of b the rows 2t, 2t + 1, then 2t + 8, 2t + 9 in
// column g; of d the columns 2t, 2t + 1 in row g, then in row g + 8. Source: PTX ISA, mma.m16n8k16.
template <class Half>
LTXK_DEVICE void warp_mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);

#define LTXK_WARP_MMA(Half, name) \
    template <> \
    LTXK_DEVICE void warp_mma<Half>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
    }
LTXK_WARP_MMA(f16, "f16")
LTXK_WARP_MMA(bf16, "bf16")
#undef LTXK_WARP_MMA

LTXK_DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// Four 8 x 8 matrices of 16-bit elements from shared memory by the whole warp: lanes 8 j to 8 j + 7 name the rows of matrix j, 16 bytes
// each and aligned so. Lane i gets the columns 2t, 2t + 1 of row i / 4 of each; transposed, the rows 2t, 2t + 1 of column i / 4.
LTXK_DEVICE void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
LTXK_DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// 16 bytes from global to shared memory, both aligned so, past the registers; zeros, and nothing read, where they do not exist.
LTXK_DEVICE void copy_async(void* shared, const void* global, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(exists ? 16 : 0)
                 : "memory");
}
// The same of 8 bytes that exist, to `offset` bytes behind an address: a sum of 32 bits, which the instruction takes.
LTXK_DEVICE void copy_async_eight(void* shared, u32 offset, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(shared) + offset), "l"(global) : "memory");
}
// Ends a group of this thread's copies.
LTXK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until this thread's copies have landed, those of its N last groups excepted.
template <int N>
LTXK_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Asks for the 128 bytes around an address of global memory to be brought into the L2 cache.
LTXK_DEVICE void prefetch_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

}  // namespace ltxk

#endif
