"""Who is timed on a case: the torch composition, torch.compile of it, the toolkit's backends, and other libraries if installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import ltxkern
from cases import Call, clone_args

EAGER = "torch eager"
COMPILE = "torch.compile"
BASELINES = (EAGER, COMPILE)


@dataclass(frozen=True)
class Provider:
    """One row of the table: a name, the function, and whether it is the toolkit's (then its error is bounded)."""

    name: str
    function: Callable[..., Any]
    ours: bool = False


@dataclass(frozen=True)
class Skip:
    """A provider that does not run on a case, with the reason; `crashed` where it should have run."""

    name: str
    reason: str
    crashed: bool = False


def on_backend(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """The op served by one named backend."""

    def call(*args: Any) -> Any:
        with ltxkern.use_backend(backend):
            return function(*args)

    return call


def is_wanted(name: str, wanted: Sequence[str] | None) -> bool:
    """Whether `--backends` names a provider; one of the toolkit's goes by its backend alone too."""
    return wanted is None or name in wanted or name.removeprefix("ltxkern ") in wanted


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None."""
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")):
        return "torch.compile needs a C++ compiler on a CPU"
    return None


def providers_of(call: Call, device: torch.device, wanted: Sequence[str] | None) -> tuple[list[Provider], list[Skip]]:
    """Providers of a call in the order of the table, and those left out.

    Args:
        call: the case.
        device: where it runs.
        wanted: names to keep ("torch eager", "torch.compile", a backend, a peer); None for all.
    """
    found: list[Provider] = []
    skipped: list[Skip] = []

    def keep(name: str) -> bool:
        return is_wanted(name, wanted)

    if keep(EAGER):
        found.append(Provider(EAGER, call.composition))
    for name, function in call.other.items():
        if keep(name):
            found.append(Provider(name, function))
    if keep(COMPILE):
        reason = compiler_missing(device)
        if reason is None:
            torch._dynamo.reset()
            found.append(Provider(COMPILE, torch.compile(call.composition, fullgraph=True, dynamic=False)))
        else:
            skipped.append(Skip(COMPILE, reason))
    for backend in ltxkern.backends():
        name = f"ltxkern {backend}"
        if not keep(name):
            continue
        function = on_backend(call.op, backend)
        try:
            function(*clone_args(call.args))
        except ltxkern.BackendError as error:
            skipped.append(Skip(name, str(error)))
            continue
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # A backend that said it serves the case: a fault of the toolkit, kept as such; the other providers go on.
            skipped.append(Skip(name, f"{type(error).__name__}: {str(error).strip()[:300]}", crashed=True))
            continue
        found.append(Provider(name, function, ours=True))
    for name, load in call.peers.items():
        if not keep(name):
            continue
        try:
            found.append(Provider(name, load()))
        except ImportError as error:
            skipped.append(Skip(name, f"not installed: {error}"))
    return found, skipped
