"""The worker of verify with the CPU shim as its tier "cpu", and a fault planted in the CUDA launches of each of four ops.

`python -m tests.verify.planted`: the kernels run from their own source on CPU fibers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ltxkern.compiled.steps import Launch, Step
from ltxkern.verify import worker
from tests.csrc.on_shim import on_shim, run_step


def _wrong_result(step: Launch) -> Launch:
    return replace(step, parameters={**step.parameters, "eps": 0.5})


def _one_row_more(step: Launch) -> Launch:
    rows = step.parameters["rows"]
    assert isinstance(rows, int)
    return replace(step, grid=(2 * step.grid[0], *step.grid[1:]), parameters={**step.parameters, "rows": rows + 1})


def _endless(step: Launch) -> Launch:
    while True:
        time.sleep(0.01)


def _crash(step: Launch) -> Launch:
    os.abort()


class Fault(NamedTuple):
    """An op, what is done to its launches, and the words by which it is found."""

    op: str
    change: Callable[[Launch], Launch]
    found: str


FAULTS = {
    "wrong result": Fault("rms_norm_modulate", _wrong_result, "error against fp64"),
    "out of bounds": Fault("gated_residual", _one_row_more, "written outside of output 0"),
    "endless": Fault("qk_norm_rope", _endless, "no end after 10 s"),
    "crash": Fault("res2s_sde_step", _crash, "the process ended by SIGABRT"),
}
RIGHT = "channelwise_normalize"


def launches(steps: Sequence[Step], tensors: Sequence[Tensor | None]) -> None:
    """Runs the steps of a call, those of the four ops with their faults."""
    for step in steps:
        for fault in FAULTS.values():
            if isinstance(step, Launch) and step.kernel.startswith(f"ltxk::{fault.op}"):
                step = fault.change(step)
        run_step(step, tensors)


if __name__ == "__main__":
    with on_shim(run=launches):
        worker.main()
