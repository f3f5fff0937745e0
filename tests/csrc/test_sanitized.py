"""The CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer: one subprocess, one build kept under build/."""

import os
import subprocess
import sys

import pytest

from tests.csrc.shim_build import ROOT, build

SCRIPT = """
import sys, torch
from pathlib import Path
from tests.csrc import kernel_runs
from tests.csrc.shim_build import load
module = load(Path(sys.argv[1]))
count = 0
for shape, groups in [((1, 8, 3, 8), 2), ((2, 6, 5, 7), 3), ((1, 4, 131), 2)]:
    for dtype in (torch.float32, torch.bfloat16):
        for name, planner in kernel_runs.group_norm_planners(shape, dtype):
            module.schedule(count)
            kernel_runs.run_group_norm(module, name, planner, shape, groups, dtype)
            count += 1
        for last in (False, True):
            kernel_runs.run_pixel_norm(module, shape, dtype, last=last, threads=64)
            count += 1
print("ran", count)
"""


def preload() -> str:
    """The sanitizer's runtime and the C++ one, which must come first in an interpreter that was not built with them."""
    names = ("libasan.so", "libstdc++.so")
    return " ".join(subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in names)


@pytest.mark.slow
def test_no_access_outside_and_no_undefined_behaviour() -> None:
    module = build(sanitize=True)
    environment = os.environ | {
        "LD_PRELOAD": preload(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", SCRIPT, str(module)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.startswith("ran ")
