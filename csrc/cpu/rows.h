// Rows of the transformer on the CPU: operands that broadcast to x, and whole rows in fp32.
#pragma once

#include "cpu/typed.h"

LTXK_CPU_BEGIN

// That every index names a row of the tables is checked before the call.
#include "ltxkern/rows_parameters.cuh"

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

// 1 / sqrt(mean square + eps); short fp32 sums added up in fp64, so that narrow registers lose no more than wide ones.
template <class Values>
inline float inverse_rms(i64 width, double eps, const Values& values) {
    constexpr int kSums = 4;
    constexpr i64 kPart = 8 * kSums * kLanes;
    Floats sums[kSums];
    double total = 0.0;
    for (i64 first = 0; first < width; first += kPart) {
        i64 end = width - first < kPart ? width : first + kPart, i = first;
        for (int k = 0; k < kSums; ++k) sums[k] = Floats{};
        for (; i + kSums * kLanes <= end; i += kSums * kLanes) {
            for (int k = 0; k < kSums; ++k) {
                Floats v = values(i + k * kLanes, std::integral_constant<i64, kLanes>{});
                sums[k] += v * v;
            }
        }
        over_registers(end - i, [&](i64 at, auto n) {
            Floats v = values(i + at, n);
            sums[0] += v * v;
        });
        total += static_cast<double>(sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])));
    }
    return static_cast<float>(1.0 / __builtin_sqrt(total / static_cast<double>(width) + eps));
}

// run(kind), `kind` of the activation type of that code.
template <class Run>
inline void with_activation(i64 code, const Run& run) {
    code == kF32 ? run(float{}) : code == kF16 ? run(f16{}) : run(bf16{});
}

LTXK_CPU_END
