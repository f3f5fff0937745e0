"""The worker of verify with the CPU shim as its tier "cpu", and a fault planted in the CUDA launches of rms_norm_modulate.

`python -m tests.verify.planted FAULT`: the kernels run from their own source on CPU fibers.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from ltxkern.compiled.steps import Launch, Step
from ltxkern.verify import worker
from tests.csrc.on_shim import on_shim, run_step


def _wrong_result(step: Launch) -> Launch:
    return replace(step, parameters={**step.parameters, "eps": 0.5})


def _one_row_more(step: Launch) -> Launch:
    rows = step.parameters["rows"]
    assert isinstance(rows, int)
    return replace(step, grid=(step.grid[0] + 1, *step.grid[1:]), parameters={**step.parameters, "rows": rows + 1})


def _endless(step: Launch) -> Launch:
    while True:
        time.sleep(0.01)


def _crash(step: Launch) -> Launch:
    os.abort()


FAULTS: dict[str, Callable[[Launch], Launch]] = {
    "wrong result": _wrong_result,
    "out of bounds": _one_row_more,
    "endless": _endless,
    "crash": _crash,
}


def launches(fault: str) -> Callable[[Sequence[Step], Sequence[Tensor | None]], None]:
    """What runs the steps of a call: those of rms_norm_modulate with the fault."""

    def run(steps: Sequence[Step], tensors: Sequence[Tensor | None]) -> None:
        for step in steps:
            is_planted = isinstance(step, Launch) and step.kernel.startswith("ltxk::rms_norm_modulate")
            run_step(FAULTS[fault](step) if is_planted else step, tensors)

    return run


if __name__ == "__main__":
    with on_shim(run=launches(sys.argv[1])):
        worker.main()
