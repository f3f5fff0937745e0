"""Ops on arrays of other libraries: NumPy's own, and a stand-in for all that speak DLPack, CuPy's among them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern.verify.cases import F32, MAIN, OpCase, Size
from tests.ops.contract import assert_same

FUNCTIONAL = [case for case in MAIN if not case.in_place]


class Array:
    """An array of a library that knows tensors by DLPack alone; its module takes them by `from_dlpack`, as CuPy and JAX do."""

    exchanged = 0

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._tensor.__dlpack_device__()

    def __array_namespace__(self, api_version: str | None = None) -> ModuleType:
        module = ModuleType("library")
        module.from_dlpack = self._taken
        return module

    @classmethod
    def _taken(cls, tensor: Tensor) -> Array:
        cls.exchanged += 1
        return cls(torch.from_dlpack(tensor))

    def numpy(self) -> Any:
        return self._tensor.numpy()


KINDS = {"numpy": (Tensor.numpy, np.ndarray), "dlpack": (Array, Array)}


def pointer(array: Any) -> int:
    return int(torch.from_dlpack(array).data_ptr())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", FUNCTIONAL, ids=str)
def test_every_op(case: OpCase, kind: str) -> None:
    """The same bits in the same kind, nothing copied on the way out, and `out` written in the memory that it has."""
    make, expected_type = KINDS[kind]
    tensors = case.tensors(F32, Size(2, 3, 4))
    wanted = case.run(tensors)
    given = {name: make(value) for name, value in tensors.items()}
    result = case.function(**given, **case.others)
    results = list(result) if isinstance(result, tuple) else [result]
    assert all(type(one) is expected_type for one in results)
    assert_same([torch.from_dlpack(one) for one in results], wanted)
    if not case.out:
        return
    outputs = [make(value) for value in case.outputs(tensors)]
    places, before = [pointer(one) for one in outputs], Array.exchanged
    out = outputs[0] if len(outputs) == 1 else tuple(outputs)
    assert case.function(**given, **case.others, out=out) is out
    assert [pointer(one) for one in outputs] == places
    assert_same([torch.from_dlpack(one) for one in outputs], wanted)
    # By that the library's stream waits for the op.
    assert Array.exchanged - before == (kind == "dlpack") * len(outputs)


def test_modalities_and_mixtures() -> None:
    """Lists of arrays, and tensors among arrays: the first argument says what comes back."""
    case = next(case for case in MAIN if case.op == "res2s_midpoint")
    tensors = case.tensors(F32, Size(2, 3, 4))
    wanted = case.function(**{name: [value, value] for name, value in tensors.items()}, **case.others)
    lists = {name: [value.numpy(), value] for name, value in tensors.items()}
    got = case.function(**lists, **case.others)
    assert all(type(one) is np.ndarray for pair in got for one in pair)
    assert_same([[torch.from_numpy(one) for one in pair] for pair in got], wanted)


def test_numpy_arrays_that_torch_does_not_take() -> None:
    """Backwards and read-only ones are copied; written into they cannot be."""
    x, logits = torch.randn(3, 4, 5), torch.randn(3, 4)
    wanted = ltxkern.head_gate(x.flip(0), logits).numpy()
    backwards, fixed = x.numpy()[::-1], x.flip(0).contiguous().numpy()
    fixed.flags.writeable = False
    for array in (backwards, fixed):
        assert np.array_equal(ltxkern.head_gate(array, logits.numpy()), wanted)
        with pytest.raises(ValueError, match=r"out must be writable and lie forwards .*: use out\.copy\(\)"):
            ltxkern.head_gate(x.numpy(), logits.numpy(), out=array)


def test_what_is_refused() -> None:
    x = torch.randn(3, 4, 5)
    with pytest.raises(TypeError, match=r"x must be of a dtype that torch has, got object: use x\.astype\(float\)"):
        ltxkern.head_gate(x.numpy().astype(object), x[..., 0].numpy())
    with pytest.raises(TypeError, match=r"x must be one of torch\.float16, .*, got torch\.float64: use x\.to"):
        ltxkern.head_gate(x.double().numpy(), x[..., 0].numpy())
    with pytest.raises(
        TypeError, match=r"logits must be a torch\.Tensor, got ndarray: use torch\.from_numpy\(logits\)"
    ):
        ltxkern.head_gate(x, x[..., 0].numpy())

    class Mute(Array):
        __array_namespace__ = property(lambda self: (_ for _ in ()).throw(AttributeError("none")))

    Mute.__module__ = "nowhere.arrays"
    with pytest.raises(
        TypeError, match=r"x must be of a library that takes arrays .*, got Mute: use torch\.from_dlpack\(x\)"
    ):
        ltxkern.head_gate(Mute(x), Mute(x[..., 0]))


def test_cupy_is_known_by_its_module() -> None:
    """A library without the array API's namespace is asked by the name of its module, as older CuPy."""

    class Older(Array):
        __array_namespace__ = property(lambda self: (_ for _ in ()).throw(AttributeError("none")))

    module = ModuleType("older")
    module.from_dlpack = Older._taken
    Older.__module__ = "older.core"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "older", module)
        x, logits = torch.randn(3, 4, 5), torch.randn(3, 4)
        got = ltxkern.head_gate(Older(x), Older(logits))
    assert type(got) is Older
    assert_same(torch.from_dlpack(got), ltxkern.head_gate(x, logits))
