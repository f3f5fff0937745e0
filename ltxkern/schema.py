"""The torch schema of an op from the NamedTuple of its arguments: their names, types and defaults are written there alone."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

_KINDS = {Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType"}


def _kind(annotation: Any) -> str:
    if annotation in _KINDS:
        return _KINDS[annotation]
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not NoneType]
    if len(parts) != 1 or origin not in (Sequence, Union, UnionType):
        raise TypeError(
            f"{annotation} has no torch schema type: use one of {', '.join(_KINDS.values())}, X | None, Sequence[X]"
        )
    return _kind(parts[0]) + ("[]" if origin is Sequence else "?")


def kinds(arguments: type[Any]) -> dict[str, str]:
    """Schema type of each argument: "Tensor?", "float[]", "ScalarType"."""
    return {name: _kind(annotation) for name, annotation in get_type_hints(arguments).items()}


def text(arguments: type[Any], *, in_place: bool) -> str:
    """The arguments as a schema lists them; an in-place op changes the first."""
    listed: list[str] = []
    for name, kind in kinds(arguments).items():
        changed = "(a!)" if in_place and not listed else ""
        default = f"={arguments._field_defaults[name]!r}" if name in arguments._field_defaults else ""
        listed.append(f"{kind}{changed} {name}{default}")
    return ", ".join(listed)
