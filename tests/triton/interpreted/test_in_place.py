"""Outputs that are inputs, on the interpreted kernels: the calls of tests/ops/test_aliasing.py."""

from __future__ import annotations

import pytest
import torch

from ltxkern import use_backend
from tests.ops.op_cases import WITH_OUT, OpCase

CASES = [
    pytest.param(call, output, name, id=f"{call}-out{output}-{name}")
    for call in WITH_OUT
    for output, names in enumerate(call.may_be)
    for name in names
]


@pytest.mark.parametrize(("call", "output", "name"), CASES)
def test_an_output_may_be_an_input(call: OpCase, output: int, name: str) -> None:
    tensors = call.tensors()
    with use_backend("triton"):
        expected = call.run(tensors, call.outputs(tensors))
        outputs = call.outputs(tensors)
        outputs[output] = tensors[name]
        results = call.run(tensors, outputs)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)
