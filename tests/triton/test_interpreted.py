"""Runs tests of Triton's kernels in processes of their own, interpreted: Triton decides at decoration time whether to interpret."""

from __future__ import annotations

import re

import pytest

from tests.processes import python

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

# Of the ops' own tests those of what no small case shows; they all run so, in minutes.
ROW_INDEX = ["tests/ops/test_row_index.py", "-p", "tests.triton.interpreted.conftest", "-k", "triton"]


@pytest.mark.parametrize(("arguments", "least"), [(["tests/triton/interpreted"], 500), (ROW_INDEX, 150)], ids=str)
def test_kernels_in_the_interpreter(arguments: list[str], least: int) -> None:
    mode = {"TRITON_INTERPRET": "1", "LTXKERN_DISABLE": "", "LTXKERN_BACKEND": ""}
    run = python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments, **mode)
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= least, run.stdout[-2000:]
