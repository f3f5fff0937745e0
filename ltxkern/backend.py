"""What a backend is: a name, the reasons for which it refuses a call, and a kernel that is loaded when first used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BACKENDS = ("cuda", "nvrtc", "triton", "cpu", "torch")


class BackendError(RuntimeError):
    """No permitted backend can serve a call; the message gives the reason of each."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: one of `BACKENDS` other than "torch", which every op has through its reference.
        refuse: called with the op's arguments; the reason in words why this backend cannot serve them, or None.
        load: returns the kernel, called as `kernel(out, *args)` (in-place ops: `kernel(*args)`); runs once, at first use.
    """

    name: str
    refuse: Callable[..., str | None]
    load: Callable[[], Callable[..., None]]


def backend_names(text: str, variable: str) -> tuple[str, ...]:
    """The backends that a comma-separated text names; ValueError for an unknown one."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"{variable}: unknown backend {name!r}; known are {', '.join(BACKENDS)}")
    return names
