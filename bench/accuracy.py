"""Correctness before timing: every provider against the fp64 reference of record, held to the torch composition's own error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cases import Call, clone_args, in_fp64, result_of

ALLOWED_RATIO = 1.5
# Where the composition's own error is nil (fp64 tensors), the bound is a few units of fp64. The worst of millions of fp32 sums
# moves by a unit with their order alone.
FP64_FLOOR = 256 * torch.finfo(torch.float64).eps
FP32_UNIT = torch.finfo(torch.float32).eps


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
