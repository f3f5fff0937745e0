"""Functions of another stack replaced by ours, with a list of what was and what was not, and the way back."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from ltxkern.ops.checks import ACTIVATION_DTYPES, broadcasts


class Left(NamedTuple):
    """A place that keeps the other stack's own function, and why."""

    place: str
    reason: str


class Routes:
    """What an `install` has replaced; `undo` puts every function back, as the end of a `with` block does.

    Attributes:
        places: names of what was replaced, and the op behind each.
        left: what was not, with the reasons.
    """

    def __init__(self) -> None:
        self.places: dict[str, str] = {}
        self.left: list[Left] = []
        self._before: list[tuple[Any, str, Any]] = []
        self._everywhere: list[tuple[str, Any, Any]] = []

    def put(self, owner: Any, name: str, new: Any) -> None:
        """Replace one attribute."""
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def put_everywhere(self, package: str, before: Any, new: Any) -> None:
        """Replace a function in every loaded module of a package, under whatever name; `undo` also in those loaded since."""
        self._everywhere.append((package, before, new))
        _swap(package, before, new)

    def undo(self) -> None:
        """Put back what was there, the last replaced first; nothing is left to do the second time."""
        while self._everywhere:
            package, before, new = self._everywhere.pop()
            _swap(package, new, before)
        while self._before:
            owner, name, before = self._before.pop()
            setattr(owner, name, before)

    def __enter__(self) -> Routes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        rows = [f"{place}: ltxkern.{op}" for place, op in self.places.items()]
        return "\n".join(rows + [f"{place}: left, {reason}" for place, reason in self.left])


def _swap(package: str, old: Any, new: Any) -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package and module is not None:
            for held, value in list(vars(module).items()):
                if value is old:
                    setattr(module, held, new)


def same_kind(x: Any, *others: Any) -> bool:
    """Tensors of one dtype that the row ops take, on one device."""
    return x.dtype in ACTIVATION_DTYPES and all(one.dtype == x.dtype and one.device == x.device for one in others)


def modulates(x: Tensor, *rows: Tensor) -> bool:
    """Whether rows of a modulation, or a gate, lie over x as `rms_norm_modulate` takes them."""
    return same_kind(x, *rows) and all(
        broadcasts(row.shape, x.shape) and row.shape[-1:] == x.shape[-1:] for row in rows
    )


def rotates(*sides: tuple[Tensor, Tensor, Tensor, Tensor]) -> bool:
    """Queries and keys with their weight and split tables by token, as `qk_norm_rope` takes them."""
    (q, _, first, _), (k, _, last, _) = sides
    for x, weight, cos, sin in sides:
        if x.ndim != 3 or cos.ndim != 4 or cos.shape != sin.shape or not same_kind(q, x, weight, cos, sin):
            return False
        batch, tokens, inner = x.shape
        heads, half = cos.shape[1], cos.shape[3]
        if cos.shape[0] not in (1, batch) or cos.shape[2] != tokens or 2 * heads * half != inner:
            return False
        if weight.shape != (inner,):
            return False
    return first.shape[1::2] == last.shape[1::2] and q.shape[0] == k.shape[0]
