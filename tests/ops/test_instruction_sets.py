"""Every CPU kernel in each instruction set that this processor has: rows around a register, misaligned, with odd ends."""

import pytest

from tests.processes import python
from tests.serving import needs_cpu_kernels

COMPARE = """
import itertools
from ltxkern.compiled import extension
from tests.ops import test_group_norm_silu as group_norm, test_pixel_norm_silu as pixel_norm
from tests.ops.contract import ACTIVATIONS
from ltxkern.verify.cases import CASES, Size
from tests.ops.contract import held_to_torch

for case, dtype, width in itertools.product(CASES, ACTIVATIONS, (1, 7, 33, 261)):
    if dtype in case.dtypes:
        held_to_torch(case, "cpu", dtype, Size(2, 5, width), shift=3)
for dtype, (shape, groups), last in itertools.product(ACTIVATIONS, group_norm.SHAPES, (False, True)):
    group_norm.test_contract("cpu", dtype, shape, groups, last, full=True)
    pixel_norm.test_contract("cpu", dtype, shape, last, weighted=True)
print(extension.module().isa())
"""


@needs_cpu_kernels
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_op(isa: str) -> None:
    done = python("-c", COMPARE, status=None, LTXKERN_CPU_ISA=isa)
    if "this processor has no" in done.stderr:
        pytest.skip(f"{isa} OBJECTS NOT TESTED: this processor has no {isa}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == isa
