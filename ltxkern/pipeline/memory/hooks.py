"""Hooks around the forwards of a transformer and of its blocks, removed together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


class ForwardHooks:
    """Calls back before and after each forward of a module, and of chosen submodules by name.

    Args:
        module: whose forwards are followed.
        before, after: called without arguments around each of them.
    """

    def __init__(self, module: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._module = module
        self._own = _around(module, before, after)
        self._inner: list[Any] = []

    def follow(self, names: Iterable[str], before: Callable[[str], None], after: Callable[[str], None]) -> None:
        """Follows these submodules, in place of those followed so far; the callbacks get the name."""
        _remove(self._inner)
        for name in names:
            self._inner += _around(self._module.get_submodule(name), _bound(before, name), _bound(after, name))

    def remove(self) -> None:
        """No more calls."""
        _remove(self._inner)
        _remove(self._own)


def _bound(callback: Callable[[str], None], name: str) -> Callable[[], None]:
    return lambda: callback(name)


def _around(module: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> list[Any]:
    # The hooks return None: what goes in and out stays as it is.
    return [
        module.register_forward_pre_hook(lambda *_: before()),
        module.register_forward_hook(lambda *_: after()),
    ]


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()
