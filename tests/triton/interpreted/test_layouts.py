"""The calls of ltxkern/verify/cases.py, interpreted: outputs that are inputs or lie otherwise, strided and empty tensors."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from torch import Tensor

from ltxkern import BackendError, triton, use_backend
from ltxkern.verify.cases import F32, MAIN, WITH_OUT, OpCase, Size

CASES = [
    pytest.param(case, output, name, id=f"{case}-out{output}-{name}")
    for case in WITH_OUT
    for output, names in enumerate(case.may_be)
    for name in names
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The elementwise kernels take several blocks."""
    for found in pkgutil.iter_modules(triton.__path__):
        module = importlib.import_module(f"ltxkern.triton.{found.name}")
        if hasattr(module, "BLOCK"):
            monkeypatch.setattr(module, "BLOCK", 16)


def turned(value: Tensor) -> Tensor:
    """The same values, the last two dims the other way around in memory."""
    return value.mT.contiguous().mT if value.dim() > 1 else value


@pytest.mark.parametrize(("case", "output", "name"), CASES)
def test_an_output_may_be_an_input(case: OpCase, output: int, name: str) -> None:
    tensors = case.tensors()
    with use_backend("triton"):
        expected = case.run(tensors, case.outputs(tensors))
        outputs = case.outputs(tensors)
        outputs[output] = tensors[name]
        results = case.run(tensors, outputs)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("case", WITH_OUT, ids=str)
def test_an_output_may_lie_otherwise(case: OpCase) -> None:
    tensors = case.tensors()
    outputs = [turned(output) for output in case.outputs(tensors)]
    with use_backend("triton"):
        expected = case.run(tensors, case.outputs(tensors))
        results = case.run(tensors, outputs)
    for result, output, wanted in zip(results, outputs, expected, strict=True):
        assert result is output
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_strided_tensors_are_served_or_refused_in_words(case: OpCase) -> None:
    tensors = {name: turned(value) for name, value in case.tensors().items()}
    copies = {name: value.clone() for name, value in tensors.items()}
    with use_backend("torch"):
        expected = case.run(copies)
    with use_backend("triton"):
        try:
            results = case.run(tensors)
        except BackendError as refusal:
            assert any(words in str(refusal) for words in ("has strides", "not dense", "not contiguous"))  # noqa: PT017
            return
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", WITH_OUT, ids=str)
def test_empty_tensors(case: OpCase) -> None:
    tensors = case.tensors(F32, Size(batch=0))
    with use_backend("triton"):
        results = case.run(tensors)
    assert [result.shape for result in results] == [tensors[name].shape for name in case.like]
