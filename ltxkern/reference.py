"""The torch reference of every op, under the op's public name: read these to know what the kernels compute.

`reference.<op>` is the function `reference` of `ltxkern/ops/<op>.py`, with its arguments by name.
"""

from collections.abc import Callable
from typing import Any

from ltxkern.dispatch import registered


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in registered():
        raise AttributeError(f"ltxkern.reference has no op {name!r}; it has {', '.join(__dir__())}")
    return registered()[name].reference


def __dir__() -> list[str]:
    return sorted(registered())
