// Sums about a pivot that is one of the values: fp64 loses at most log2(count) bits to cancellation, and no element needs a division.
#pragma once

#include "ltxkern/moments.cuh"

namespace ltxk {

struct ShiftedSums {
    double count = 0.0, sum = 0.0, squares = 0.0;

    template <class C, int V>
    LTXK_DEVICE void add(const C (&values)[V], C pivot) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
            double d = static_cast<double>(values[k] - pivot);
            sum += d;
            squares += d * d;
        }
        count += V;
    }

    LTXK_DEVICE Moments<double> moments(double pivot) const {
        Moments<double> result;
        if (count == 0.0) return result;
        double m2 = squares - sum * (sum / count);
        result.count = count;
        result.mean = pivot + sum / count;
        result.m2 = m2 < 0.0 ? 0.0 : m2;
        return result;
    }
};

}  // namespace ltxk
