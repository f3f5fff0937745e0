"""Compiles what the small cases would launch, for one architecture: odd sizes and ones are specialised as on a device.

Run as a script, without TRITON_INTERPRET: `python compile_small_cases.py ARCH [dtype ...]`; prints the number of kernels.
"""

from __future__ import annotations

import sys

import torch
from aot_compile import compiled, target
from triton_cases import SMALL_CASES


def main() -> None:
    arch, *names = sys.argv[1:]
    dtypes = [getattr(torch, name) for name in names] or [torch.bfloat16]
    target(int(arch))
    count = 0
    for case, dtype in ((case, dtype) for case in SMALL_CASES for dtype in dtypes if dtype in case.dtypes):
        try:
            kernels = list(compiled(case, "cpu", dtype))
        except Exception as error:
            raise RuntimeError(f"{case} in {dtype} does not compile for sm_{arch}") from error
        if not kernels:
            raise RuntimeError(f"{case} in {dtype} launched nothing")
        count += len(kernels)
    print(count)


if __name__ == "__main__":
    main()
