"""Every Triton kernel through the public functions, on tiny odd shapes, in every dtype, against fp64."""

from __future__ import annotations

import pytest
import torch
from problems import Case, run
from triton_cases import SMALL_CASES

from ltxkern import use_backend

ROWS = [pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}") for case in SMALL_CASES for dtype in case.dtypes]


@pytest.mark.parametrize(("case", "dtype"), ROWS)
def test_small_case(case: Case, dtype: torch.dtype) -> None:
    with use_backend("triton"):
        run(case, "cpu", dtype)
