"""Functions of another stack replaced by ours, with a list of what was and what was not, and the way back."""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple


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

    def put(self, owner: Any, name: str, new: Any) -> None:
        """Replace one attribute."""
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def undo(self) -> None:
        """Put back what was there, the last replaced first; nothing is left to do the second time."""
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


def same_kind(x: Any, *others: Any) -> bool:
    """Tensors of one dtype that the row ops take, on one device."""
    from ltxkern.ops.checks import ACTIVATION_DTYPES

    return x.dtype in ACTIVATION_DTYPES and all(one.dtype == x.dtype and one.device == x.device for one in others)
