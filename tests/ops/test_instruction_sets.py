"""Every CPU kernel in each instruction set that this processor has: rows around a register, misaligned, with odd ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ltxkern.compiled import extension

ROOT = Path(__file__).resolve().parents[2]

COMPARE = """
import itertools
from ltxkern.compiled import extension
from tests.ops.contract import ACTIVATIONS
from ltxkern.verify.cases import CASES, Size
from tests.ops.contract import held_to_torch

for case, dtype, width in itertools.product(CASES, ACTIVATIONS, (1, 7, 33, 261)):
    if dtype in case.dtypes:
        held_to_torch(case, "cpu", dtype, Size(2, 5, width), shift=3)
print(extension.module().isa())
"""


@pytest.mark.skipif(
    extension.unavailable("cpu") is not None, reason=f"CPU KERNELS NOT TESTED: {extension.unavailable('cpu')}"
)
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_op(isa: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LTXKERN_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "this processor has no" in done.stderr:
        pytest.skip(f"{isa} OBJECTS NOT TESTED: this processor has no {isa}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == isa
