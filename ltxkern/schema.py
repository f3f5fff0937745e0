"""The torch schema of an op from the NamedTuple of its arguments: their names, types and defaults are written there alone."""

from __future__ import annotations

from typing import Any

_KINDS = {"Tensor": "Tensor", "int": "int", "float": "float", "bool": "bool", "str": "str", "torch.dtype": "ScalarType"}


def _kind(annotation: str) -> str:
    """By the annotation's own text: to ask typing for what it means would be a quarter of the time of an import."""
    if annotation.endswith(" | None"):
        return _kind(annotation.removesuffix(" | None")) + "?"
    if annotation.startswith("Sequence[") and annotation.endswith("]"):
        return _kind(annotation[len("Sequence[") : -1]) + "[]"
    if annotation not in _KINDS:
        raise TypeError(
            f"{annotation} has no torch schema type: use one of {', '.join(_KINDS)}, X | None, Sequence[X], in a file "
            "that begins with `from __future__ import annotations`"
        )
    return _KINDS[annotation]


def kinds(arguments: type[Any]) -> dict[str, str]:
    """Schema type of each argument: "Tensor?", "float[]", "ScalarType"."""
    texts = {name: getattr(a, "__forward_arg__", a) for name, a in arguments.__annotations__.items()}
    return {name: _kind(text if isinstance(text, str) else repr(text)) for name, text in texts.items()}


def text(arguments: type[Any], *, in_place: bool) -> str:
    """The arguments as a schema lists them; an in-place op changes the first."""
    listed: list[str] = []
    for name, kind in kinds(arguments).items():
        changed = "(a!)" if in_place and not listed else ""
        default = f"={arguments._field_defaults[name]!r}" if name in arguments._field_defaults else ""
        listed.append(f"{kind}{changed} {name}{default}")
    return ", ".join(listed)
