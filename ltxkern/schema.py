"""The torch schema of an op from the NamedTuple of its arguments: their names, types and defaults are written there alone."""

from collections.abc import Sequence
from typing import Any, ForwardRef, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

_KINDS = {Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType"}


def _kind(annotation: Any) -> str:
    if annotation in _KINDS:
        return _KINDS[annotation]
    match get_origin(annotation), get_args(annotation):
        case origin, (one,) if origin is Sequence:
            return f"{_kind(one)}[]"
        case _, (one, none) if none is type(None):
            return f"{_kind(one)}?"
    known = ", ".join(one.__name__ for one in _KINDS)
    raise TypeError(f"{annotation} has no torch schema type: use one of {known}, X | None, Sequence[X]")


def kinds(arguments: type[Any]) -> dict[str, str]:
    """Schema type of each argument: "Tensor?", "float[]", "ScalarType"."""
    hints = arguments.__annotations__
    # Asked only where it must be: every op's would be a tenth of the time of an import.
    if any(isinstance(hint, ForwardRef) for hint in hints.values()):
        hints = get_type_hints(arguments)
    return {name: _kind(hint) for name, hint in hints.items()}


def text(arguments: type[Any], *, in_place: bool) -> str:
    """The arguments as a schema lists them; an in-place op changes the first."""
    listed: list[str] = []
    for name, kind in kinds(arguments).items():
        changed = "(a!)" if in_place and not listed else ""
        default = f"={arguments._field_defaults[name]!r}" if name in arguments._field_defaults else ""
        listed.append(f"{kind}{changed} {name}{default}")
    return ", ".join(listed)
