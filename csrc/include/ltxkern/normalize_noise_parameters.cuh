// Parameters of noise standardisation and its statistics, on every device. Included within a namespace that has i64.
#pragma once

struct NormalizeNoise {
    const void* x;
    void* out;      // null: only statistics
    double* stats;  // [slice]: count, mean, M2; null: only the standardised values
    i64 type;
    i64 slices, length;  // elements of a slice
    i64 whole;           // 1: one value anywhere that is not finite makes everything NaN
};

// Mean and M2 of one chunk of one slice.
struct NoisePartial {
    double mean, m2;
};
