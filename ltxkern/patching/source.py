"""Methods of a module's class as they are written: what `flow`, `containers` and `reach` read."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any, NamedTuple


class Method(NamedTuple):
    """A method, a property's getter or a static method: as the class holds it, and without what wraps it."""

    name: str
    held: Any
    function: FunctionType


def methods(kind: type) -> Iterator[Method]:
    """Those of a class and of the classes above it that are not torch's, the nearest first; __init__ runs before a patch."""
    for base in kind.__mro__:
        if base is object or base.__module__.startswith("torch."):
            continue
        for name, value in vars(base).items():
            value = getattr(value, "fget", None) or getattr(value, "func", None) or value
            function = inspect.unwrap(value) if callable(value) else value
            if name != "__init__" and inspect.isfunction(function):
                yield Method(name, value, function)


@functools.cache
def parsed(function: Any) -> ast.stmt | None:
    """The statement that defines a function, None where its source cannot be read."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
