// Rows of the transformer on the CPU: operands that broadcast to x, and whole rows in fp32.
#pragma once

#include "cpu/typed.h"

LTXK_CPU_BEGIN

// As in include/ltxkern/rows.cuh.
struct RowOperand {
    const void* data;
    i64 type, outer_stride, inner_stride;

    i64 row(i64 outer, i64 inner) const { return outer * outer_stride + inner * inner_stride; }
};

// A row of any length in fp32: a pointer to it where it is fp32 already, else into `buffer`.
inline const float* row_values(const void* base, i64 type, i64 at, i64 width, float* buffer) {
    if (type == kF32) return static_cast<const float*>(base) + at;
    for (i64 first = 0; first < width; first += kTypedChunk) {
        i64 count = width - first < kTypedChunk ? width - first : kTypedChunk;
        as_compute(base, type, at + first, count, buffer + first);
    }
    return buffer;
}

// An operand's rows one after another: a row that is broadcast is turned into fp32 once, not for every row of x.
class OperandRows {
public:
    OperandRows(const RowOperand& operand, i64 width, float* buffer) : operand_(operand), width_(width), buffer_(buffer) {}

    const float* at(i64 outer, i64 inner) {
        i64 row = operand_.row(outer, inner);
        if (row != row_ || !values_) values_ = row_values(operand_.data, operand_.type, row, width_, buffer_), row_ = row;
        return values_;
    }

private:
    const RowOperand& operand_;
    i64 width_, row_ = 0;
    float* buffer_;
    const float* values_ = nullptr;
};

inline void store_row(const float* values, void* base, i64 type, i64 at, i64 width) {
    for (i64 first = 0; first < width; first += kTypedChunk) {
        i64 count = width - first < kTypedChunk ? width - first : kTypedChunk;
        store_compute(values + first, base, type, at + first, count);
    }
}

inline void round_row(float* values, i64 type, i64 width) {
    for (i64 first = 0; first < width; first += kTypedChunk)
        round_values(values + first, type, width - first < kTypedChunk ? width - first : kTypedChunk);
}

// 1 / sqrt(mean square + eps); short fp32 sums added up in fp64, so that narrow vectors lose no more than wide ones.
inline float inverse_rms(const float* values, i64 width, double eps) {
    constexpr i64 kPart = 128;
    double total = 0.0;
    for (i64 first = 0; first < width; first += kPart) {
        i64 end = width - first < kPart ? width : first + kPart;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (i64 i = first; i < end; ++i) sum += values[i] * values[i];
        total += static_cast<double>(sum);
    }
    return static_cast<float>(1.0 / __builtin_sqrt(total / static_cast<double>(width) + eps));
}

LTXK_CPU_END
