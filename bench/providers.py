"""Who is timed on a case, and whether the result is right.

The torch composition, torch.compile of it, the toolkit's backends, and other libraries if installed. Before timing each is held to
the fp64 reference of record, and the toolkit's own to the torch composition's error.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ltxkern
from cases import Call, clone_args, in_fp64, result_of

EAGER = "torch eager"
COMPILE = "torch.compile"
BASELINES = (EAGER, COMPILE)
ALLOWED_RATIO = 1.5
# Where the composition's own error is nil (fp64 tensors), the bound is a few units of fp64. The worst of millions of fp32 sums
# moves by a unit with their order alone.
FP64_FLOOR = 256 * torch.finfo(torch.float64).eps
FP32_UNIT = torch.finfo(torch.float32).eps


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
    for name, function in {EAGER: call.composition, **call.other}.items():
        if is_wanted(name, wanted):
            found.append(Provider(name, function))
    if is_wanted(COMPILE, wanted):
        if (reason := compiler_missing(device)) is None:
            torch._dynamo.reset()
            found.append(Provider(COMPILE, torch.compile(call.composition, fullgraph=True, dynamic=False)))
        else:
            skipped.append(Skip(COMPILE, reason))
    for backend in ltxkern.backends():
        name = f"ltxkern {backend}"
        if not is_wanted(name, wanted):
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
        if not is_wanted(name, wanted):
            continue
        try:
            found.append(Provider(name, load()))
        except ImportError as error:
            skipped.append(Skip(name, f"not installed: {error}"))
    return found, skipped


class WrongResultError(Exception):
    """A provider's result is further from fp64 than the toolkit allows."""


@dataclass(frozen=True)
class Errors:
    """Distance of a result from fp64: RMS and maximum, relative to the reference's RMS and maximum."""

    rms: float
    maximum: float


@dataclass(frozen=True)
class Reference:
    """The fp64 result of a case, the composition's result in the model dtype, and that one's errors."""

    exact: Sequence[Tensor]
    composed: Sequence[Tensor]
    errors: Errors


def errors_against(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> Errors:
    """Worst errors over all outputs.

    Raises:
        WrongResultError: count or shapes differ, or a value is not finite where the reference is.
    """
    if [tuple(o.shape) for o in outputs] != [tuple(e.shape) for e in exact]:
        raise WrongResultError(
            f"shapes {[tuple(o.shape) for o in outputs]}, expected {[tuple(e.shape) for e in exact]}"
        )
    worst_rms = worst_max = 0.0
    for output, truth in zip(outputs, exact, strict=True):
        if output.numel() == 0:
            continue
        difference = (output.double() - truth).abs()
        if not bool(torch.isfinite(difference).all()):
            raise WrongResultError("not finite where the fp64 reference is finite")
        rms = float(difference.square().mean().sqrt() / truth.square().mean().sqrt().clamp_min(1e-300))
        maximum = float(difference.max() / truth.abs().max().clamp_min(1e-300))
        worst_rms, worst_max = max(worst_rms, rms), max(worst_max, maximum)
    return Errors(worst_rms, worst_max)


def reference_of(call: Call) -> Reference:
    """Run the composition in fp64 and in the model dtype."""
    wide = in_fp64(clone_args(call.args))
    exact = result_of(call, wide, call.composition(*wide))
    narrow = clone_args(call.args)
    composed = result_of(call, narrow, call.composition(*narrow))
    return Reference(exact, composed, errors_against(composed, exact))


def check(
    name: str, call: Call, function: Callable[..., Any], reference: Reference, *, bounded: bool
) -> tuple[Errors, bool]:
    """Errors of one provider, and whether its result has the very bits of the torch composition.

    Args:
        name: for the message.
        call: the case.
        function: the provider.
        reference: of `reference_of`.
        bounded: whether an error beyond 1.5 x the composition's stops the benchmark (the toolkit's own providers).
    Raises:
        WrongResultError: beyond the bound, wrong shapes, or not finite.
    """
    args = clone_args(call.args)
    try:
        outputs = result_of(call, args, function(*args))
        errors = errors_against(outputs, reference.exact)
    except WrongResultError as error:
        raise WrongResultError(f"{name}: {error}") from error
    if bounded:
        wide = all(output.dtype == torch.float32 for output in outputs)
        for kind, got, own, least in (
            ("RMS", errors.rms, reference.errors.rms, FP64_FLOOR),
            ("maximum", errors.maximum, reference.errors.maximum, FP32_UNIT if wide else FP64_FLOOR),
        ):
            limit = max(ALLOWED_RATIO * own, least)
            if got > limit:
                raise WrongResultError(
                    f"{name}: {kind} error against fp64 is {got:.3e}, allowed {limit:.3e} "
                    f"({ALLOWED_RATIO} x {own:.3e} of the torch composition)"
                )
    same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(outputs, reference.composed, strict=True))
    return errors, same
