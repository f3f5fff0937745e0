"""Docstrings of the package as the API reference needs them: blank lines around sections, and a line for each parameter."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

SECTION = re.compile(r"(?<!\n)\n(Args|Returns|Yields|Raises|Example|Contract|Bytes|Source|Protocol):")
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 .*)*)", re.MULTILINE)


def spaced(text: str) -> str:
    """A docstring with a blank line before every section."""
    return SECTION.sub(r"\n\n\1:", text)


def apart(text: str) -> str:
    """`a, b: words` as a parameter each, with the same words."""
    return SEVERAL.sub(lambda found: "\n".join(f"{found[1]}{name}: {found[3]}" for name in found[2].split(", ")), text)


class Sections(Extension):
    """Applied to every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = apart(spaced(obj.docstring.value))
