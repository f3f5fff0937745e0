"""The one place where a call finds its backend.

Every op of the toolkit is an `Op`: a NamedTuple of arguments, a torch reference, an allocator for its outputs and its `Backend`
entries. A call `op(args, out=None)` goes

1. to the opaque torch op (`ltxkern.registration`) where something traces or a gradient is wanted, which comes back here later;
2. to `select`: the first backend that is permitted (`use_backend`, LTXKERN_BACKEND), present (`missing`) and does not `refuse` the
   arguments, decided from what it declares and never by catching an exception;
3. to that backend's kernel, `kernel(out, args)`, loaded at first use; for "torch" to the reference.

An op whose calls are many and short asks for the program of an earlier one before all of this (`again`).
What `ltxkern verify` stored of this card decides which backends are trusted and preferred; without it, a probe at first use.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltxkern import debug, schema, triton
from ltxkern.aliasing import Signature
from ltxkern.compiled import driver, extension
from ltxkern.compiled.programs import KnownCalls, run_noted
from ltxkern.registration import (
    FOLLOWING,
    allow_writing,
    composed,
    is_compiling,
    needs_dispatcher,
    refuse_inference,
    refuse_writing,
    register,
    register_in_place,
    resolved,
    tensors_of,
    transforming,
)
from ltxkern.trust.backends import Trust
from ltxkern.trust.permitted import BACKENDS, DEVICE_BACKENDS, backend_names, environment_choice

logger = logging.getLogger("ltxkern")

forced: ContextVar[tuple[str, ...] | None] = ContextVar("ltxkern_backend", default=None)
_registry: dict[str, Op] = {}


class BackendError(RuntimeError):
    """No permitted backend can serve a call; the message gives the reason of each, `given` the op's arguments."""

    given: Any = None


class Backend(NamedTuple):
    """One implementation of an op.

    Args:
        name: one of `BACKENDS` other than "torch", which every op has through its reference.
        refuse: called with the op's arguments, a NamedTuple; the reason in words why this backend cannot serve them, or None.
        load: returns the kernel, called as `kernel(out, args)` (in-place ops: `kernel(args)`); runs once, at first use.
    """

    name: str
    refuse: Callable[[Any], str | None]
    load: Callable[[], Callable[..., None]]


@functools.cache
def disabled() -> frozenset[str]:
    """What LTXKERN_DISABLE switches off: entries `backend` or `op:backend`; ValueError for what is neither."""
    entries = frozenset(part.strip() for part in os.environ.get("LTXKERN_DISABLE", "").split(",") if part.strip())
    for entry in entries:
        op, _, backend = entry.rpartition(":")
        backend_names(backend, f"LTXKERN_DISABLE={entry}")
        if op and op not in _registry:
            raise ValueError(f"LTXKERN_DISABLE={entry}: unknown op {op!r}; known are {', '.join(sorted(_registry))}")
    return entries


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why a backend cannot run in this process, or None if it can; asked again once CUDA is in use, and after a fork."""
    if backend == "torch":
        return None
    if backend in disabled():
        return f"{backend} is switched off by LTXKERN_DISABLE"
    if backend in ("cuda", "nvrtc", "cpu"):
        return extension.unavailable(backend)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None if triton.interpreted() else driver.no_device()


def _ask_again() -> None:
    """Forget which backends can run: what was found out holds no longer."""
    unavailable.cache_clear()
    for op in _registry.values():
        op.forget()


os.register_at_fork(after_in_child=_ask_again)


def _waiting(backend: str) -> bool:
    """Whether no tensor can lie where a backend works, CUDA not being in use yet: then nothing is asked of a device."""
    return backend in DEVICE_BACKENDS and not triton.interpreted() and driver.unused(_ask_again)


def backends() -> list[str]:
    """Names of the backends that can run in this process, in order of preference.

    Example:
        >>> "torch" in ltxkern.backends()
        True
    """
    return [name for name in BACKENDS if unavailable(name) is None]


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Serve every op in the block by the named backend; several names form an order of preference.

    A case that none of the named backends can serve raises `BackendError` with each one's reason.

    Args:
        names: one or more of "cuda", "nvrtc", "triton", "cpu", "torch".
    Raises:
        ValueError: unknown name, or no name.
        BackendError: a named single backend cannot run in this process.
    """
    if not names:
        raise ValueError(f"use_backend: name at least one of {', '.join(BACKENDS)}")
    chosen = tuple(name for text in names for name in backend_names(text, "use_backend"))
    if len(chosen) == 1 and (reason := unavailable(chosen[0])) is not None:
        raise BackendError(f"backend {chosen[0]!r} cannot run here: {reason}")
    token = forced.set(chosen)
    try:
        yield
    finally:
        forced.reset(token)


def handed(call: Callable[[], Any]) -> Any:
    """The arguments that a public function's call hands to its op, which does not run: no backend is permitted."""
    token = forced.set(("none",))
    try:
        call()
    except BackendError as refusal:
        refusal.__traceback__ = None  # its frames hold the call's tensors, and one of them the refusal
        return refusal.given
    finally:
        forced.reset(token)


def capabilities() -> dict[str, dict[str, str | None]]:
    """Table op x backend: None where the backend serves the op in this process, else the reason why not.

    A call may still be refused for its own dtype, layout or size; the reason then comes with `BackendError` under `use_backend`.
    What `ltxkern verify` found wrong on a GPU is told once CUDA is in use.
    """
    for op in _registry.values():
        for kind in ("cpu", "cuda")[: 1 + torch.cuda.is_initialized()]:
            op.heed_proofs(kind)
    return {name: {backend: op.missing(backend) for backend in BACKENDS} for name, op in sorted(_registry.items())}


def registered() -> dict[str, Op]:
    """Every op by its name."""
    return _registry


def served() -> dict[str, set[str]]:
    """Which backends have served each op so far in this process (the receipt that a run's log quotes)."""
    served = {name: op.receipts | op.captured for name, op in sorted(_registry.items())}
    return {name: backends for name, backends in served.items() if backends}


class Op:
    """One operation: arguments, torch reference, output allocator, backends, and its registration as `torch.ops.ltxkern.<name>`.

    Args:
        name: name under `torch.ops.ltxkern`; a functional op is also registered as `<name>_out` with its outputs as last arguments.
        arguments: NamedTuple of the arguments: what refusals, kernels and `allocate` take; its annotations make the torch schema.
        result: in torch schema syntax, "()" for an in-place op, which changes its first argument.
        reference: the torch composition, `reference(*args)`; returns fresh tensors (functional) or works in place.
        allocate: outputs with the right shape, dtype and strides, `allocate(args)`; also the fake implementation. None: in place.
        backends: compiled implementations, best first.
        may_be: for each output the arguments that it may be, element for element, on every backend; see `aliasing.Signature`.
        indices: of an op whose programs are kept (`again`): its arguments that hold indices, each with the one whose rows they are.
            None: nothing is kept.
    """

    def __init__(
        self,
        name: str,
        arguments: type[Any],
        result: str,
        reference: Callable[..., Any],
        allocate: Callable[[Any], Any] | None = None,
        *,
        backends: Sequence[Backend] = (),
        may_be: Sequence[Sequence[str]] = ((),),
        indices: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.arguments = arguments
        self.reference = reference
        self.allocate = allocate
        # What has served; what has only been captured, so that the next call asks again whether it is trusted.
        self.receipts: set[str] = set()
        self.captured: set[str] = set()
        self._backends = {backend.name: backend for backend in backends}
        self._kernels: dict[str, Callable[..., None]] = {}
        self._present: dict[tuple[str, ...] | None, tuple[str, ...]] = {}
        self._trust = Trust(name, self._backends, BACKENDS)
        self._signature = Signature(schema.kinds(arguments), may_be if allocate else None)
        self._known = KnownCalls(arguments._fields, indices, FOLLOWING)
        _registry[name] = self
        if allocate is None:
            self._torch_op = register_in_place(name, arguments, self._run_in_place)
        else:
            self._torch_op = register(name, arguments, result, self._run, self._run_into, allocate, reference)

    def missing(self, backend: str) -> str | None:
        """Why this op has no such backend in this process, or None if it has."""
        if backend == "torch":
            return None
        if backend not in self._backends:
            return f"{self.name} has no {backend} kernel"
        if f"{self.name}:{backend}" in disabled():
            return f"{self.name}:{backend} is switched off by LTXKERN_DISABLE"
        return self._trust.refused.get(backend) or unavailable(backend)

    def present(self) -> tuple[str, ...]:
        """The permitted backends that are here, best first."""
        names = forced.get() or environment_choice()
        found = self._present.get(names)
        if found is None:
            found = tuple(n for n in names or self._trust.order if not _waiting(n) and self.missing(n) is None)
            self._present[names] = found
        return found

    def select(self, args: Any) -> str:
        """Name of the first permitted backend that serves these arguments.

        Raises:
            BackendError: none does; with the reason of each.
        """
        for name in self.present():
            if name == "torch" or self._backends[name].refuse(args) is None:
                return name
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refusals(args))
        error = BackendError(f"ltxkern.{self.name}: no permitted backend can serve this call. {reasons}")
        error.given = args
        raise error

    def refusals(self, args: Any, before: str | None = None) -> Iterator[tuple[str, str]]:
        """Each permitted backend, up to one if that is named, and why it does not serve these arguments."""
        for name in forced.get() or environment_choice() or self._trust.order:
            if name == before:
                return
            yield name, self.missing(name) or self._backends[name].refuse(args) or ""

    def kernel(self, backend: str) -> Callable[..., None]:
        """The loaded kernel of a backend other than torch."""
        if backend not in self._kernels:
            self._kernels[backend] = debug.watch(self, backend, self._backends[backend].load())
        return self._kernels[backend]

    @functools.cached_property
    def _composition(self) -> Callable[..., Any]:
        """The reference, as it serves calls."""
        return debug.watch(self, "torch", self.reference)

    def heed_proofs(self, kind: str) -> None:
        """Take what is stored of the devices of a kind, "cpu" or "cuda", into account."""
        if self._trust.heed(kind):
            self.forget()

    def forget(self) -> None:
        """Who is here, and who served which call: what was found out holds no longer."""
        self._present.clear()
        self._known.forget()

    def _serving(self, args: Any) -> str:
        """The backend that serves a call."""
        backend = self.select(args)
        return backend if backend in self.receipts else self._first_use(backend, args)

    def _first_use(self, backend: str, args: Any) -> str:
        """The backend that serves a call for which `select` chose one that is not trusted yet."""
        device = next((tensor.device for tensor in tensors_of(args)), torch.device("cpu"))
        while backend not in self._trust.serving:
            if not self._trust.heed(device.type) and self._trust.admit(backend, self, args, device):
                break
            self.forget()
            backend = self.select(args)
        if backend not in self.receipts | self.captured:
            logger.info("%s is served by %s", self.name, backend)
        (self.receipts if backend in self._trust.serving else self.captured).add(backend)
        return backend

    def _run(self, args: Any, checked: bool = False) -> Any:
        assert self.allocate is not None
        # Before the choice: who forgets it forgets what this call leaves there.
        known = self._known.table() if checked and forced.get() is None else None
        backend = self._serving(args)
        if backend == "torch":
            return self._composition(*args)
        out = self.allocate(args)
        run_noted(known if backend in self.receipts else None, self.kernel(backend), out, args)
        return out

    def again(self, args: Any) -> Any:
        """The outputs, where arguments lie as those of a call that passed the checks; else None, and within `use_backend`."""
        return None if is_compiling() or forced.get() is not None else self._known.again(args)

    def _run_into(self, out: Any, args: Any) -> None:
        outputs = (out,) if isinstance(out, Tensor) else out
        self._signature.check(outputs, args)
        backend = self._serving(args)
        allow_writing(self.name, outputs)
        if backend != "torch":
            self.kernel(backend)(out, args)
            return
        values = self._composition(*args)
        for target, value in zip(outputs, (values,) if isinstance(values, Tensor) else values, strict=True):
            target.copy_(value)

    def _run_in_place(self, args: Any) -> None:
        self._signature.check(args[:1], args)
        self._change(self._serving(args), args)

    def _change(self, backend: str, args: Any) -> None:
        allow_writing(self.name, args[:1])
        if backend == "torch":
            self._composition(*args)
        else:
            self.kernel(backend)(args)

    def run_each(self, calls: Sequence[Any], check_memory: Callable[[], None]) -> None:
        """An in-place op on several lists of checked arguments; all that can be refused is, before the first is changed."""
        for args in () if is_compiling() else calls:
            refuse_inference(self.name, args[:1])
        if any(map(needs_dispatcher, calls)):
            for args in calls:
                refuse_writing(self.name, args, args[:1])
            for args in calls:
                self._torch_op.call(*resolved(args))
            return
        check_memory()
        for backend, args in [(self._serving(args), args) for args in calls]:
            self._change(backend, args)

    def check_memory(self, outputs: Sequence[Tensor], args: Sequence[Any]) -> None:
        """Refuse overlaps as a call does, for what is written without one; what traces has no addresses."""
        if not needs_dispatcher([*args, *outputs]):
            self._signature.check(outputs, args)

    def _followed(self, args: Any) -> Any:
        """A call that something traces, differentiates or transforms: torch.func looks into the reference alone."""
        if not transforming():
            return self._torch_op.call(*resolved(args))
        if is_compiling():
            return composed(self.reference, args)
        permitted = forced.get() or environment_choice() or BACKENDS
        if "torch" not in permitted:
            raise BackendError(
                f"ltxkern.{self.name}: torch.func and forward-mode gradients look into the torch reference alone, and only "
                f"{', '.join(permitted)} may serve this call: permit torch, too"
            )
        self.receipts.add("torch")
        return composed(self._composition, args)

    def __call__(self, args: Any, out: Any = None) -> Any:
        """Run the op on checked arguments, an `arguments`; `out` is a tensor, or a sequence where the op has several outputs."""
        if self.allocate is None:
            if not needs_dispatcher(args):
                return self._run_in_place(args)
            refuse_writing(self.name, args, args[:1])
            return self._torch_op.call(*resolved(args))
        if out is None:
            return self._followed(args) if needs_dispatcher(args) else self._run(args, checked=True)
        outputs = [out] if isinstance(out, Tensor) else list(out)
        if not needs_dispatcher([*args, *outputs]):
            self._run_into(out, args)
            return out
        assert self._torch_op.into is not None
        refuse_writing(self.name, [*args, *outputs], outputs)
        self._torch_op.into(*resolved(args), *(outputs if self._torch_op.outputs else [outputs]))
        return out
