// Two sums that share an operand: x + first and x + second, x read once; one of the outputs may be x.
#pragma once

#include "ltxkern/types.cuh"

namespace ltxk {

#include "ltxkern/dual_add_parameters.cuh"

template <class T>
LTXK_DEVICE T rounded_sum(T a, T b) {
    return round_to<T>(to_float(a) + to_float(b));
}
LTXK_DEVICE double rounded_sum(double a, double b) { return a + b; }

// A thread has one pack of each tensor, and reads all three before it writes. The addends were usually just computed and may still be
// in the L2 cache; x and the sums pass it by.
template <class T, int V>
__global__ void __launch_bounds__(256) dual_add(DualAdd p) {
    i64 at = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    if (at >= p.size) return;
    Pack<T, V> x = load_streaming<T, V>(static_cast<const T*>(p.x) + at);
    Pack<T, V> first = load<T, V>(static_cast<const T*>(p.first) + at), second = load<T, V>(static_cast<const T*>(p.second) + at);
#pragma unroll
    for (int k = 0; k < V; ++k) {
        first.value[k] = rounded_sum(x.value[k], first.value[k]);
        second.value[k] = rounded_sum(x.value[k], second.value[k]);
    }
    store_streaming<T, V>(static_cast<T*>(p.out_first) + at, first);
    store_streaming<T, V>(static_cast<T*>(p.out_second) + at, second);
}

}  // namespace ltxk
