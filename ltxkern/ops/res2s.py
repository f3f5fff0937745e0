"""The res2s sampler between two model calls: SDE step and both half-steps, each one op for video and audio together."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled import res2s as launch
from ltxkern.dispatch import Op
from ltxkern.layout import fresh, through_torch
from ltxkern.ops import tiers
from ltxkern.ops.checks import (
    SAMPLER_DTYPES,
    check_device,
    check_finite_number,
    check_flag,
    check_out,
    check_pair,
    check_shape,
    check_tensor,
    check_together,
    listed,
    modalities,
)
from ltxkern.ops.res2s_step import Res2sStep, sde_linear_form

TensorOrSequence = Tensor | Sequence[Tensor]


class StepArguments(NamedTuple):
    """Of `res2s_sde_step`; coefficients (A, B, S)."""

    sample: Tensor
    denoised: Tensor
    noise: Tensor
    coefficients: Sequence[float]
    noise_stats: Tensor | None


class MidpointArguments(NamedTuple):
    """Of `res2s_midpoint`, an entry a modality; coefficients (c, A, B, S)."""

    latent: Sequence[Tensor]
    x0: Sequence[Tensor]
    noise: Sequence[Tensor]
    mask: Sequence[Tensor | None]
    clean: Sequence[Tensor | None]
    noise_stats: Sequence[Tensor | None]
    coefficients: Sequence[float]
    refine: bool
    compute_dtype: torch.dtype


class AdvanceArguments(NamedTuple):
    """Of `res2s_advance`, an entry a modality; coefficients (h b1, h b2, A, B, S)."""

    anchor: Sequence[Tensor]
    x0: Sequence[Tensor]
    x0_mid: Sequence[Tensor]
    noise: Sequence[Tensor]
    mask: Sequence[Tensor | None]
    clean: Sequence[Tensor | None]
    noise_stats: Sequence[Tensor | None]
    coefficients: Sequence[float]
    model_dtype: Sequence[torch.dtype]


def post_process(x: Tensor, mask: Tensor | None, clean: Tensor | None) -> Tensor:
    """Put the kept part of masked tokens back: `x mask + clean (1 - mask)`.

    Args:
        x: (B, T, C) prediction or state, fp16 to fp64.
        mask: (B, T, 1) fp32, or None for all ones.
        clean: (B, T, C).
    Returns:
        x's shape and dtype; computed in x's dtype or fp32, whichever is wider, rounded once.
    """
    if mask is None or clean is None:
        return x
    return (x * mask + clean.float() * (1 - mask)).to(x.dtype)


def standardise(noise: Tensor, stats: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Ready noise in the compute dtype: as it is, or raw noise brought to mean 0 and std 1 per slice."""
    if stats is None:
        return noise.to(dtype)
    shape = (*noise.shape[:-2], 1, 1)
    count, mean, deviation = (column.reshape(shape) for column in stats.unbind(1))
    return ((noise.double() - mean) * torch.rsqrt(deviation / (count - 1))).to(dtype)


def sde_step_reference(
    sample: Tensor, denoised: Tensor, noise: Tensor, coefficients: Sequence[float], stats: Tensor | None = None
) -> Tensor:
    """`A sample + B denoised + S noise` in the widest of the dtypes, rounded to denoised's."""
    a, b, s = coefficients
    dtype = torch.promote_types(torch.promote_types(sample.dtype, denoised.dtype), torch.float32)
    step = a * sample.to(dtype) + b * denoised.to(dtype) + s * standardise(noise, stats, dtype)
    return step.to(denoised.dtype).contiguous()


def midpoint_reference(
    latent: Sequence[Tensor],
    x0: Sequence[Tensor],
    noise: Sequence[Tensor],
    mask: Sequence[Tensor | None],
    clean: Sequence[Tensor | None],
    stats: Sequence[Tensor | None],
    coefficients: Sequence[float],
    refine: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Half-step 1 for each modality; coefficients (c, A, B, S); x_mid of all modalities, then the anchors of all."""
    c, a, b, s = coefficients
    midpoints, anchors = [], []
    for i, state in enumerate(latent):
        start = state.to(dtype)
        target = post_process(x0[i], mask[i], clean[i]).to(dtype)
        moved = start + c * (target - start)
        moved = a * start + b * moved + s * standardise(noise[i], stats[i], dtype)
        moved = post_process(moved, mask[i], clean[i])
        midpoints.append(moved.to(state.dtype).contiguous())
        anchor = (moved - c * target) / (1 - c) if refine else start.clone()
        anchors.append(anchor.contiguous())
    return midpoints + anchors


def advance_reference(
    anchor: Sequence[Tensor],
    x0: Sequence[Tensor],
    x0_mid: Sequence[Tensor],
    noise: Sequence[Tensor],
    mask: Sequence[Tensor | None],
    clean: Sequence[Tensor | None],
    stats: Sequence[Tensor | None],
    coefficients: Sequence[float],
    model_dtype: Sequence[torch.dtype],
) -> list[Tensor]:
    """Half-step 2 for each modality; coefficients (h b1, h b2, A, B, S)."""
    hb1, hb2, a, b, s = coefficients
    results = []
    for i, start in enumerate(anchor):
        first = post_process(x0[i], mask[i], clean[i]).to(start.dtype)
        second = post_process(x0_mid[i], mask[i], clean[i]).to(start.dtype)
        moved = start + (hb1 * (first - start) + hb2 * (second - start))
        moved = a * start + b * moved + s * standardise(noise[i], stats[i], start.dtype)
        results.append(post_process(moved, mask[i], clean[i]).to(model_dtype[i]).contiguous())
    return results


SDE_STEP = Op(
    "res2s_sde_step",
    StepArguments,
    "Tensor",
    sde_step_reference,
    lambda args: fresh(args.denoised),
    backends=[*tiers.compiled(launch.sde_step), tiers.triton("res2s", tiers.not_contiguous, "launch_sde_step")],
    may_be=[("sample", "denoised", "noise")],
)
MIDPOINT = Op(
    "res2s_midpoint",
    MidpointArguments,
    "Tensor[]",
    midpoint_reference,
    lambda args: [*map(fresh, args.latent), *(fresh(state, args.compute_dtype) for state in args.latent)],
    backends=[*tiers.compiled(launch.midpoint), tiers.triton("res2s", tiers.not_contiguous, "launch_midpoint")],
    may_be=[("latent", "x0", "noise", "clean")] * 2,
)
ADVANCE = Op(
    "res2s_advance",
    AdvanceArguments,
    "Tensor[]",
    advance_reference,
    lambda args: [*map(fresh, args.anchor, args.model_dtype)],
    backends=[*tiers.compiled(launch.advance), tiers.triton("res2s", tiers.not_contiguous, "launch_advance")],
    may_be=[("anchor", "x0", "x0_mid", "noise", "clean")],
)


def _check_step(step: object) -> None:
    if not isinstance(step, Res2sStep):
        raise TypeError(f"step must be a Res2sStep, got {type(step).__name__}: use an entry of res2s_steps(sigmas)")


def _check_operand(name: str, value: Tensor, first: Tensor) -> None:
    check_tensor(name, value, dtypes=SAMPLER_DTYPES)
    check_shape(name, value, first.shape)
    check_device(name, value, first.device)


def _check_modality(
    tensors: dict[str, Tensor], mask: Tensor | None, clean: Tensor | None, stats: Tensor | None
) -> bool:
    """Tensors of one modality; True where the first one is an array."""
    (first_name, first), *others = tensors.items()
    if check_tensor(first_name, first, dtypes=SAMPLER_DTYPES, min_dim=2, arrays=True):
        return True
    for name, value in others:
        _check_operand(name, value, first)
    check_together("mask", mask, "clean", clean)
    if mask is not None and clean is not None:
        check_tensor("mask", mask, dtypes=(torch.float32,))
        check_device("mask", mask, first.device)
        check_shape("mask", mask, (*first.shape[:-1], 1))
        _check_operand("clean", clean, first)
    if stats is not None:
        check_tensor("noise_stats", stats, dtypes=(torch.float64,))
        check_shape("noise_stats", stats, (first.shape[:-2].numel(), 3))
        check_device("noise_stats", stats, first.device)
    return False


def res2s_sde_step(
    sample: Tensor,
    denoised: Tensor,
    sigma: float,
    sigma_next: float,
    noise: Tensor,
    *,
    eta: float = 0.5,
    terminal: bool = False,
    noise_stats: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One SDE step from sigma to sigma_next, without reading anything back from the device.

    `x' = alpha [(sigma_down - sigma_next)/(sigma - sigma_next) x + (sigma - sigma_down)/(sigma - sigma_next) d] + sigma_up n`, with
    alpha, sigma_down and sigma_up of `sde_coefficients(sigma_next, sigma_up=eta * sigma_next)`.

    Args:
        sample: x at noise level sigma, any shape, fp16 to fp64.
        denoised: d, the deterministically advanced state, same shape.
        sigma, sigma_next: noise levels as host floats.
        noise: n, same shape; standardised already, or raw with `noise_stats`.
        eta: share of sigma_next added as noise.
        terminal: True returns `denoised`, as eta 0 and sigma_next 0 do: decided on host floats, no op runs.
        noise_stats: statistics of raw noise from `noise_statistics`.
        out: written in place of a fresh tensor; shape and dtype of denoised. May be `sample`, `denoised` or `noise` itself.
    Returns:
        Shape and dtype of denoised.
    Raises:
        TypeError, ValueError: each names the parameter; also where sigma equals sigma_next in a non-terminal step.

    Contract: rounded; arithmetic in the widest of the input dtypes, fp32 at least.
    Bytes: read sample, denoised, noise, write the result, once each.
    Source: the res2s sampler of LTX-2.
    """
    if _check_modality({"sample": sample, "denoised": denoised, "noise": noise}, None, None, noise_stats):
        return through_torch(res2s_sde_step, locals())
    for name, value in (("sigma", sigma), ("sigma_next", sigma_next), ("eta", eta)):
        check_finite_number(name, value, low=0.0)
    check_flag("terminal", terminal)
    if out is not None:
        check_out(out, denoised.shape, denoised.dtype, denoised.device)
    if terminal or eta == 0.0 or sigma_next == 0.0:
        if out is None:
            return denoised
        SDE_STEP.check_memory([out], StepArguments(sample, denoised, noise, (), noise_stats))
        return out.copy_(denoised)
    if sigma == sigma_next:
        raise ValueError(f"sigma and sigma_next must differ, got {sigma} for both")
    coefficients = list(sde_linear_form(sigma, sigma_next, eta))
    return SDE_STEP(StepArguments(sample, denoised, noise, coefficients, noise_stats), out)


def res2s_midpoint(
    latent: TensorOrSequence,
    x0: TensorOrSequence,
    noise: TensorOrSequence,
    step: Res2sStep,
    *,
    mask: Any = None,
    clean: Any = None,
    noise_stats: Any = None,
    compute_dtype: torch.dtype = torch.float64,
    out: Any = None,
) -> Any:
    """First half of a res2s step in one pass: midpoint state for the second evaluation, and the refined anchor.

    With `c = h a21`: `d = post(x0)` rounded to x0's dtype; `m = x + c (d - x)`; `m = A x + B m + S n` (substep SDE); `m = post(m)`;
    anchor `= (m - c d) / (1 - c)` where `step.refine` (the limit of the anchor recursion), else x.
    `post(v) = v mask + clean (1 - mask)`.

    Args:
        latent: state x, (B, T, C) in the model dtype; or one tensor per modality in a sequence, served in one launch.
        x0: prediction at sigma, same shape, usually in the model dtype.
        noise: substep noise, same shape; ready, or raw with `noise_stats`.
        step: coefficients of this step, from `res2s_steps`.
        mask: fp32 (B, T, 1), 1 where a token is denoised; None for all. Goes with `clean`.
        clean: known latents, same shape as latent.
        noise_stats: statistics of raw noise from `noise_statistics`.
        compute_dtype: fp64 (the algorithm's), or fp32 for devices with slow fp64.
        out: pair (x_mid, anchor), or pair of lists; each may be the latent, x0, noise or clean of its modality.
    Returns:
        (x_mid in latent's dtype, anchor in compute_dtype); a pair of lists where sequences came in.
    Raises:
        TypeError, ValueError: each names the parameter.

    Contract: rounded; fp64 arithmetic, each output rounded once.
    Bytes per element at bf16 state and fp64 noise: 2 + 2 + 8 read, 2 + 8 written.
    Source: the res2s sampler of LTX-2; closed form of its 100-iteration anchor recursion.
    """
    single = isinstance(latent, Tensor)
    states = modalities("latent", latent)
    if states is None:
        return through_torch(res2s_midpoint, locals())
    count = len(states)
    x0s, noises = listed("x0", x0, count), listed("noise", noise, count)
    masks, cleans, stats = (
        listed(n, v, count) for n, v in (("mask", mask), ("clean", clean), ("noise_stats", noise_stats))
    )
    _check_step(step)
    if compute_dtype not in (torch.float32, torch.float64):
        raise TypeError(f"compute_dtype must be torch.float64 or torch.float32, got {compute_dtype}: use torch.float64")
    for i, state in enumerate(states):
        _check_modality({"latent": state, "x0": x0s[i], "noise": noises[i]}, masks[i], cleans[i], stats[i])
    outputs = None
    if out is not None:
        check_pair(out)
        outputs = [*listed("out[0]", out[0], count), *listed("out[1]", out[1], count)]
        for i, state in enumerate(states):
            check_out(outputs[i], state.shape, state.dtype, state.device, "out[0]")
            check_out(outputs[count + i], state.shape, compute_dtype, state.device, "out[1]")
    coefficients = [step.contraction, *step.substep]
    args = MidpointArguments(states, x0s, noises, masks, cleans, stats, coefficients, step.refine, compute_dtype)
    results = MIDPOINT(args, outputs)
    return (results[0], results[1]) if single else (results[:count], results[count:])


def res2s_advance(
    anchor: TensorOrSequence,
    x0: TensorOrSequence,
    x0_mid: TensorOrSequence,
    noise: TensorOrSequence,
    step: Res2sStep,
    *,
    mask: Any = None,
    clean: Any = None,
    noise_stats: Any = None,
    model_dtype: torch.dtype | None = None,
    out: Any = None,
) -> Any:
    """Second half of a res2s step in one pass: combination, step SDE, mask and cast.

    With refined anchor a: `d1 = post(x0)`, `d2 = post(x0_mid)`; `m = a + h (b1 (d1 - a) + b2 (d2 - a))`; `m = A a + B m + S n`;
    result `post(m)` in the model dtype.

    Args:
        anchor: fp64 (or fp32) state from `res2s_midpoint`, (B, T, C); or one per modality in a sequence, served in one launch.
        x0, x0_mid: predictions at sigma and at the midpoint, same shape.
        noise: step noise, same shape; ready, or raw with `noise_stats`.
        step: coefficients of this step, from `res2s_steps`.
        mask, clean, noise_stats: as in `res2s_midpoint`.
        model_dtype: dtype of the result; None for x0's.
        out: written in place of fresh tensors; each may be the anchor, x0, x0_mid, noise or clean of its modality.
    Returns:
        The latent at sigma_next; a list where sequences came in.
    Raises:
        TypeError, ValueError: each names the parameter.

    Contract: rounded; arithmetic in the anchor's dtype, one rounding at the end.
    Bytes per element at bf16 predictions and fp64 noise and anchor: 8 + 2 + 2 + 8 read, 2 written.
    Source: the res2s sampler of LTX-2.
    """
    single = isinstance(anchor, Tensor)
    starts = modalities("anchor", anchor)
    if starts is None:
        return through_torch(res2s_advance, locals())
    count = len(starts)
    firsts, seconds, noises = listed("x0", x0, count), listed("x0_mid", x0_mid, count), listed("noise", noise, count)
    masks, cleans, stats = (
        listed(n, v, count) for n, v in (("mask", mask), ("clean", clean), ("noise_stats", noise_stats))
    )
    _check_step(step)
    if model_dtype is not None and model_dtype not in SAMPLER_DTYPES:
        raise TypeError(f"model_dtype must be one of {', '.join(map(str, SAMPLER_DTYPES))}, got {model_dtype!r}")
    for i, start in enumerate(starts):
        named = {"anchor": start, "x0": firsts[i], "x0_mid": seconds[i], "noise": noises[i]}
        _check_modality(named, masks[i], cleans[i], stats[i])
        if start.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"anchor must be torch.float64 or torch.float32, got {start.dtype}")
    dtypes = [first.dtype if model_dtype is None else model_dtype for first in firsts]
    outputs = None
    if out is not None:
        outputs = listed("out", out, count)
        for target, start, dtype in zip(outputs, starts, dtypes, strict=True):
            check_out(target, start.shape, dtype, start.device)
    coefficients = [step.h * step.b1, step.h * step.b2, *step.advance]
    args = AdvanceArguments(starts, firsts, seconds, noises, masks, cleans, stats, coefficients, dtypes)
    results = ADVANCE(args, outputs)
    return results[0] if single else results
