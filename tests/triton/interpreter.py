"""Mends Triton's interpreter where it is wrong about bfloat16, so that kernels can be held to their numerical contract on a CPU.

The stock interpreter truncates fp32 to bf16, garbles fp64 to bf16, and does arithmetic and dot products on the raw bits.
It also sums over a leading axis one value after another, and reduces by other functions so, where the device makes a tree.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widen(data: np.ndarray) -> np.ndarray:
    """fp32 values of bf16 bits."""
    return (data.astype(np.uint32) << 16).view(np.float32)


def _narrow(data: np.ndarray) -> np.ndarray:
    """bf16 bits of fp32 values, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: object) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def mend() -> None:
    """Replace the casts, the binary arithmetic, the dot product and the sums of the interpreter."""
    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    stock_cast, stock_binary, stock_dot = builder.cast_impl, builder.binary_op, builder.create_dot

    def cast(self, src, dst_type):
        if _is_bf16(src):
            wide = handle(_widen(src.data), tl.float32)
            return wide if dst_type.scalar == tl.float32 else stock_cast(self, wide, dst_type)
        if dst_type.scalar == tl.bfloat16:
            with np.errstate(over="ignore"):
                return handle(_narrow(src.data.astype(np.float32)), tl.bfloat16)
        with np.errstate(over="ignore", invalid="ignore"):
            return stock_cast(self, src, dst_type)

    def binary(self, lhs, rhs, op):
        if _is_bf16(lhs):
            wide = op(_widen(lhs.data), _widen(rhs.data))
            return handle(wide, tl.int1) if wide.dtype == np.bool_ else handle(_narrow(wide), tl.bfloat16)
        with np.errstate(all="ignore"):
            return stock_binary(self, lhs, rhs, op)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if _is_bf16(a):
            a, b = handle(_widen(a.data), tl.float32), handle(_widen(b.data), tl.float32)
        return stock_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    builder.cast_impl = cast
    builder.binary_op = binary
    builder.create_dot = dot

    def tree_sum(self, value):
        data = value.handle.data.reshape(-1) if self.axis is None else value.handle.data
        axis = -1 if self.axis is None else self.axis
        total = np.ascontiguousarray(np.moveaxis(data, axis, -1)).sum(-1)
        if self.keep_dims:
            whole = (1,) * value.handle.data.ndim
            total = total.reshape(whole) if self.axis is None else np.expand_dims(total, axis)
        return self.to_tensor(total, value.dtype)

    def tree(self, given):
        data = [np.moveaxis(each.handle.data, self.axis, 0) for each in given]
        while (half := len(data[0]) // 2) > 0:
            sides = [[self.to_tensor(each[part], each_of.dtype) for each, each_of in zip(data, given, strict=True)]
                     for part in (slice(half), slice(half, None))]  # fmt: skip
            data = [each.handle.data for each in self.combine_fn.fn(*sides[0], *sides[1])]
        return [self.to_tensor(each[0], each_of.dtype) for each, each_of in zip(data, given, strict=True)]

    interpreter.ReduceOps.sum = tree_sum
    interpreter.ReduceOps.generic_reduce = tree
    for name in (
        "create_si_to_fp",
        "create_ui_to_fp",
        "create_fp_to_si",
        "create_fp_to_ui",
        "create_fp_ext",
        "create_fp_trunc",
    ):
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
