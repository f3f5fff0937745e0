"""The torch schema that a NamedTuple of arguments makes: every type, defaults, the argument that an in-place op changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ltxkern import registration, schema


class Arguments(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    factors: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    scale: Sequence[float]
    dtype: torch.dtype
    layout: str
    exact: bool
    groups: int | None
    seed: int = 0


REST = "Tensor? bias, Tensor[] factors, Tensor?[] masks, float[] scale, ScalarType dtype, str layout, bool exact, int? groups"


def test_schema() -> None:
    assert schema.text(Arguments, in_place=False) == f"Tensor weight, {REST}, int seed=0"
    assert schema.text(Arguments, in_place=True) == f"Tensor(a!) weight, {REST}, int seed=0"
    assert schema.kinds(Arguments)["masks"] == "Tensor?[]"


@pytest.mark.parametrize("kind", [dict[str, Any], list[Tensor], Tensor | int], ids=str)
def test_a_type_without_a_schema_is_refused_in_words(kind: Any) -> None:
    with pytest.raises(TypeError, match=r"has no torch schema type: use one of Tensor, int, float"):
        schema.kinds(NamedTuple("Listed", [("x", Tensor), ("options", kind)]))


def test_numbers_of_dtypes_are_read_as_dtypes() -> None:
    """torch 2.11 hands them to implementations in Python."""
    read = registration.typed(Arguments)
    for number, dtype in ((5, torch.float16), (6, torch.float32), (7, torch.float64), (15, torch.bfloat16)):
        given = (None, None, [], [], [], number, "split", True, 5)
        assert read(given) == [None, None, [], [], [], dtype, "split", True, 5]
    assert read((None, None, [], [], [], torch.float16)) == [None, None, [], [], [], torch.float16]
