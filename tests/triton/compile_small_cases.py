"""Compiles what the small cases would launch, for one architecture: odd sizes and ones are specialised as on a device.

Run as a script, without TRITON_INTERPRET: `python compile_small_cases.py ARCH [dtype ...]`; prints the number of kernels.
"""

from __future__ import annotations

import sys

import torch
import triton
from aot_compile import NamedTarget, compiled
from triton_cases import SMALL_CASES

import ltxkern.dispatch
import ltxkern.triton


def main() -> None:
    arch, *names = sys.argv[1:]
    dtypes = [getattr(torch, name) for name in names] or [torch.bfloat16]
    triton.runtime.driver.set_active(NamedTarget(int(arch)))
    ltxkern.dispatch.unavailable = lambda backend: None
    ltxkern.triton._device_refusal = lambda tensor: None
    count = 0
    with ltxkern.use_backend("triton"):
        for case in SMALL_CASES:
            for dtype in dtypes:
                if dtype not in case.dtypes:
                    continue
                problem = case.make("cpu", dtype)
                out = problem.outputs()
                try:
                    kernels = list(compiled(lambda problem=problem, out=out: problem.call(out)))
                except Exception as error:
                    raise RuntimeError(f"{case} in {dtype} does not compile for sm_{arch}") from error
                if not kernels:
                    raise RuntimeError(f"{case} in {dtype} launched nothing")
                count += len(kernels)
    print(count)


if __name__ == "__main__":
    main()
