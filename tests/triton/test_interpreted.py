"""Runs tests of Triton's kernels in processes of their own, interpreted: Triton decides at decoration time whether to interpret."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

ROOT = Path(__file__).resolve().parents[2]


# Of the ops' own tests those of what no small case shows; they all run so, in minutes.
ROW_INDEX = ["tests/ops/test_row_index.py", "-p", "tests.triton.interpreted.conftest", "-k", "triton"]


@pytest.mark.parametrize(("arguments", "least"), [(["tests/triton/interpreted"], 500), (ROW_INDEX, 150)], ids=str)
def test_kernels_in_the_interpreter(arguments: list[str], least: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "LTXKERN_DISABLE": ""}
    environment.pop("LTXKERN_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= least, run.stdout[-2000:]
