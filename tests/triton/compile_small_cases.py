"""Compiles calls of ltxkern/verify/cases.py for one architecture: odd sizes and ones are specialised as on a device.

Run without TRITON_INTERPRET: `python -m tests.triton.compile_small_cases ARCH [dtype ...]`; prints the number of kernels.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from ltxkern import BackendError
from ltxkern.verify.cases import CASES, Size
from tests.triton.aot_compile import compiled, target

SIZES = [Size(2, 5, 7), Size(1, 1, 16)]


def main() -> None:
    arch, *names = sys.argv[1:]
    dtypes = [getattr(torch, name) for name in names] or [torch.bfloat16]
    target(int(arch))
    count = 0
    for case, dtype, size in ((case, dtype, size) for case in CASES for dtype in dtypes for size in SIZES):
        try:
            kernels = compiled(partial(case.run, case.tensors(dtype, size)))
        except BackendError:
            continue
        except Exception as error:
            raise RuntimeError(f"{case} in {dtype} of {size} does not compile for sm_{arch}") from error
        if not kernels:
            raise RuntimeError(f"{case} in {dtype} of {size} launched nothing")
        count += len(kernels)
    print(count)


if __name__ == "__main__":
    main()
