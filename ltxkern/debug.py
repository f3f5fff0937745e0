"""LTXKERN_DEBUG: a line on standard error for every call of an op, and at 2 a further line for each of its steps.

The variable is read once, at the first call. Where it is off, `watch` and `recorded` hand back what they were given, so that a call
passes through nothing of this module.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LEVELS = {"": 0, "0": 0, "1": 1, "2": 2}

# A logger of its own: the lines are wanted whatever the application does with "ltxkern", and once.
logger = logging.getLogger("ltxkern.debug")
_steps: ContextVar[list[str] | None] = ContextVar("ltxkern_debug_steps", default=None)


class Watched(Protocol):
    """What this module asks of an op."""

    name: str
    arguments: type[Any]
    allocate: Callable[[Any], Any] | None

    def refusals(self, args: Any, before: str) -> Iterator[tuple[str, str]]:
        """The permitted backends ahead of one, with the reason of each."""

    def missing(self, backend: str) -> str | None:
        """Why the op has no such backend in this process."""


@functools.cache
def level() -> int:
    """0: off; 1: a line a call; 2: with its steps.

    Raises:
        ValueError: LTXKERN_DEBUG is none of these.
    """
    text = os.environ.get("LTXKERN_DEBUG", "")
    if text not in LEVELS:
        raise ValueError(f"LTXKERN_DEBUG={text}: expected 0 (off), 1 (a line a call) or 2 (with its steps)")
    if LEVELS[text] and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("ltxkern: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    return LEVELS[text]


def recorded(steps: Sequence[object], program: Callable[..., None]) -> Callable[..., None]:
    """A program that also notes its steps where a call is watched."""
    if level() == 0:
        return program
    said = [str(step) for step in steps]

    def run(*tensors: Any) -> None:
        _note(*said)
        program(*tensors)

    return run


def watch(op: Watched, backend: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in for a backend's kernel, `run(out, args)` (in place: `run(args)`), or for the reference, `run(*args)`."""
    if level() == 0:
        return run
    if backend == "triton":
        _watch_triton()

    @functools.wraps(run)
    def watched(*given: Any) -> Any:
        args = op.arguments(*given) if backend == "torch" else given[-1]
        token = _steps.set([])
        try:
            with _TorchOps():
                result = run(*given)
            steps = _steps.get() or []
        finally:
            _steps.reset(token)
        written = args[:1] if op.allocate is None else result if backend == "torch" else given[:1]
        _report(op, backend, args, written, steps)
        return result

    return watched


def _note(*steps: str) -> None:
    noted = _steps.get()
    if noted is not None:
        noted.extend(steps)


class _TorchOps(TorchDispatchMode):
    """Notes what torch itself runs inside a call: the ops of a reference, the copies around a kernel; views and allocations not."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or name.startswith(("empty", "new_empty", "_local_scalar", "_unsafe_view"))):
            _note(f"torch {name}")
        return func(*args, **(kwargs or {}))


@functools.cache
def _watch_triton() -> None:
    """Triton launches note themselves, compiled and interpreted ones."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    kinds: tuple[Any, ...] = (JITFunction, InterpretedFunction)
    for kind in kinds:
        kind.run = _noting(kind.run)


def _noting(run: Callable[..., Any]) -> Callable[..., Any]:
    def noting(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        with _unwatched():
            made = run(self, *args, grid=grid, warmup=warmup, **options)
        facts = getattr(made, "metadata", None)
        block = "" if facts is None else f", block {32 * facts.num_warps}, shared {facts.shared} bytes"
        _note(f"{self.fn.__name__}, grid {'x'.join(map(str, grid))}{block}")
        return made

    return noting


@contextmanager
def _unwatched() -> Iterator[None]:
    """What an interpreter does with torch on the way is no step."""
    token = _steps.set(None)
    try:
        yield
    finally:
        _steps.reset(token)


def _report(op: Watched, backend: str, args: Any, written: Any, steps: list[str]) -> None:
    given = ", ".join(f"{name} {_described(value)}" for name, value in args._asdict().items() if value is not None)
    # What a backend lacks is said without the remedy that follows the colon.
    refusals = ", ".join(
        f"{name} ({reason.split(': ')[0] if op.missing(name) else reason})"
        for name, reason in op.refusals(args, backend)
    )
    unit = "launch" if any(tensor.is_cuda for tensor in _tensors(args)) else "call"
    ending = "" if len(steps) == 1 else "es" if unit == "launch" else "s"
    logger.debug(
        f"{op.name}({given}) by {backend}: {len(steps)} {unit}{ending}, "
        f"{_bytes(args)} bytes read, {_bytes(written)} bytes written{'; not ' if refusals else ''}{refusals}"
    )
    if level() > 1:
        for step in steps:
            logger.debug(f"  {step}")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = "" if value.is_contiguous() else f" strides {'x'.join(map(str, value.stride()))}"
        return f"{str(value.dtype).removeprefix('torch.')} {'x'.join(map(str, value.shape)) or 'scalar'}{strides}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_described, value))}]"
    return str(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _bytes(value: Any) -> int:
    """Of all distinct tensors; the elements that an expanded dim repeats lie in memory once."""
    distinct = {(t.data_ptr(), t.dtype, t.shape, t.stride()): t for t in _tensors(value)}
    total = 0
    for tensor in distinct.values():
        elements = tensor.element_size()
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements *= 1 if stride == 0 and size else size
        total += elements
    return total
