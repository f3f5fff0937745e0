"""The steps of a call as data: kernel launches, zeroed memory and CPU calls, with their parameters by address or by value.

The launch modules make them from shapes, every tier turns them into a program.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Argument:
    """The address of the call's `index`-th tensor, plus `offset` bytes; null where that tensor is None."""

    index: int
    offset: int = 0


Parameter = Argument | int | float | None


@dataclass(frozen=True)
class Launch:
    """One CUDA kernel launch.

    Args:
        kernel: C++ name expression, exactly as `LTXK_KERNEL(...)` registers it.
        grid: blocks, up to three dimensions.
        block: threads per block.
        parameters: the fields of the kernel's parameter struct by name, in its order, 8 bytes each: int as i64, float as double,
            None as a null pointer.
        shared_bytes: dynamic shared memory.
        cooperative: all blocks are resident at once.
    """

    kernel: str
    grid: tuple[int, ...]
    block: int
    parameters: Mapping[str, Parameter]
    shared_bytes: int = 0
    cooperative: bool = False

    def __str__(self) -> str:
        more = ", cooperative" * self.cooperative
        return f"{self.kernel}, grid {'x'.join(map(str, self.grid))}, block {self.block}, shared {self.shared_bytes} bytes{more}"


@dataclass(frozen=True)
class Zero:
    """Set `bytes` bytes of an argument to zero."""

    target: Argument
    bytes: int

    def __str__(self) -> str:
        return f"zero {self.bytes} bytes"


@dataclass(frozen=True)
class Call:
    """One CPU kernel call, by its registered name."""

    kernel: str
    parameters: Mapping[str, Parameter]

    def __str__(self) -> str:
        return self.kernel


Step = Launch | Zero


def nested(name: str, **fields: Parameter) -> dict[str, Parameter]:
    """The fields of a struct that is the field `name` of the parameters."""
    return {f"{name}.{field}": value for field, value in fields.items()}


def divider(by: int) -> int:
    """The parameter with which kernels divide numbers below 2^31 by `by` without a division: a factor, and above it a shift."""
    shift = (by - 1).bit_length()
    return shift << 32 | (((1 << shift) - by << 32) // by + 1)


def float_bits(value: float) -> int:
    """A parameter that is the 32 bits of an fp32."""
    return ctypes.c_uint32.from_buffer(ctypes.c_float(value)).value


def pack(parameters: Mapping[str, Parameter]) -> tuple[bytes, list[tuple[int, int, int]]]:
    """The parameter struct as bytes, and where addresses go into it: (slot, argument, offset)."""
    packed = bytearray()
    relocations = []
    for slot, value in enumerate(parameters.values()):
        if isinstance(value, Argument):
            relocations.append((slot, value.index, value.offset))
            packed += bytes(8)
        elif value is None:
            packed += bytes(8)
        elif isinstance(value, float):
            packed += struct.pack("<d", value)
        else:
            packed += struct.pack("<q", value)
    return bytes(packed), relocations


def grid3(grid: tuple[int, ...]) -> tuple[int, int, int]:
    """A grid with all three dimensions."""
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z
