"""The first-order Euler samplers on the denoiser protocol of res2s: plain, and ancestral with fresh noise after each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ltxkern.ops.checks import check_finite_number
from ltxkern.ops.res2s import post_process
from ltxkern.pipeline.sampling.state import (
    Callback,
    Denoiser,
    Keep,
    Latents,
    SamplerPoint,
    Seeds,
    fill_normal,
    fp32,
    ready_noise,
    sample_generators,
    sampler_state,
    schedule_floats,
)


def euler_step(sample: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One Euler step along the velocity: `x' = x + v (sigma_next - sigma)`, `v = (x - x0) / sigma`.

    Args:
        sample: x at sigma, any shape, fp16 to fp64.
        denoised: x0, same shape.
        sigma, sigma_next: noise levels as host floats; sigma is not 0.
    Returns:
        Shape and dtype of sample.
    Raises:
        ValueError: shapes differ, or sigma is 0.

    Contract: exact; velocity in fp32 rounded to sample's dtype, then the step in fp32 rounded again (fp64 for fp64 samples).
    Source: the Euler step of LTX-2.
    """
    dtype = _step_dtype(sample, sigma, denoised=denoised)
    span = fp32(sigma_next) - fp32(sigma)
    velocity = ((sample.to(dtype) - denoised.to(dtype)) / sigma).to(sample.dtype)
    return (sample.to(dtype) + velocity.to(dtype) * span).to(sample.dtype)


def euler_ancestral_step(
    sample: Tensor, denoised: Tensor, sigma: float, sigma_next: float, noise: Tensor, *, eta: float = 1.0
) -> Tensor:
    """An Euler step to a level below sigma_next, and fresh noise back up to it; the variance is kept.

    `down = sigma_next (1 + eta (sigma_next / sigma - 1))`, `r = down / sigma`, `a = (1 - sigma_next) / (1 - down)`,
    `x' = a (r x + (1 - r) x0) + sqrt(sigma_next^2 - (a down)^2) n`; x0 where sigma_next is 0. Published s_noise is 1.

    Args:
        sample: x at sigma, any shape, fp16 to fp64.
        denoised, noise: x0 and n, same shape; noise is not read where sigma_next is 0.
        sigma, sigma_next: noise levels as host floats; sigma is not 0.
        eta: 0 is a plain Euler step, 1 (published) takes it down to sigma_next^2 / sigma.
    Returns:
        Shape of sample, in fp32 (fp64 for an fp64 sample).
    Raises:
        ValueError: shapes differ, sigma is 0, or eta is negative or not finite.

    Contract: exact; coefficients and step in fp32 in the published order of operations.
    Source: the ancestral Euler step of LTX-2.
    """
    check_finite_number("eta", eta, low=0.0)
    dtype = _step_dtype(sample, sigma, denoised=denoised, noise=noise)
    if sigma_next == 0.0:
        return denoised.to(dtype)
    at, after = torch.tensor([sigma, sigma_next], dtype=torch.float32)
    down = after * (1.0 + (after / at - 1.0) * eta)
    ratio = down / at
    signal, below = 1.0 - after, 1.0 - down
    level = (after**2 - down**2 * signal**2 / below**2).clamp(min=0) ** 0.5
    # Host floats, each an fp32 number: the device's tensors meet no tensor of the host.
    kept, taken, rescale, renoise = (float(value) for value in (ratio, 1.0 - ratio, signal / below, level))
    advanced = kept * sample.to(dtype) + taken * denoised.to(dtype)
    return rescale * advanced + noise.to(dtype) * renoise


def _step_dtype(sample: Tensor, sigma: float, **others: Tensor) -> torch.dtype:
    """The dtype that a step computes in, once its arguments fit."""
    for name, other in others.items():
        if sample.shape != other.shape:
            raise ValueError(f"{name} must have shape {tuple(sample.shape)} like sample, got {tuple(other.shape)}")
    if sigma == 0.0:
        raise ValueError("sigma must not be 0: the velocity (sample - denoised) / sigma is not defined there")
    return torch.promote_types(sample.dtype, torch.float32)


@torch.no_grad()
def euler_sample(
    denoiser: Denoiser,
    latents: Mapping[str, Tensor],
    sigmas: Tensor | Iterable[float],
    *,
    masks: Mapping[str, Tensor | None] | None = None,
    clean: Mapping[str, Tensor | None] | None = None,
    eta: float = 0.0,
    noise_seed: Seeds = -1,
    model_dtype: torch.dtype | None = None,
    noise: Mapping[str, Sequence[Tensor]] | None = None,
    callback: Callback | None = None,
    start: SamplerPoint | None = None,
    keep: Keep | None = None,
) -> Latents:
    """Denoise latents by Euler steps, one evaluation each.

    `x0 = x0 mask + clean (1 - mask)`, then `euler_step`, for each interval of the schedule; with eta `euler_ancestral_step`, whose
    result is masked again. The step to 0 gives x0 and draws no noise.

    Args:
        denoiser, latents, masks, clean, model_dtype, callback, start, keep: as in `res2s_sample`; substep is always False.
        sigmas: decreasing noise levels, last one 0 or positive; rounded to fp32.
        eta: share of the ancestral step; 0 is the plain sampler, 1 the published ancestral one.
        noise_seed: seed of the noise of a run with eta, drawn in the model dtype after each step, video before audio, from a fresh
            generator; several give each sample of the batch the noise it would get alone.
        noise: ready noise instead of drawn one: per modality one tensor for each step to a positive level.
    Returns:
        Latents by modality, in the model dtype.
    Raises:
        TypeError, ValueError: each names the parameter. What the denoiser or the callback raises passes through.

    Contract: exact, see the steps; nothing reads a device value on the host inside the loop.
    Source: the Euler loops of LTX-2.
    """
    state = sampler_state(latents, masks, clean, model_dtype)
    levels = schedule_floats(sigmas)
    check_finite_number("eta", eta, low=0.0)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if not 0.0 <= sigma_next < sigma:
            raise ValueError(
                f"sigmas must be strictly decreasing and at least 0, got {sigma} then {sigma_next} at index {index}"
            )
    given = None
    generators = sample_generators(noise_seed, state.device) if eta and noise is None else []
    if noise is not None and eta:
        given = ready_noise(state, noise, sum(level > 0 for level in levels[1:]), "one a step that does not end at 0")
    behind, current = state.at(start, generators)
    for index, (sigma, sigma_next) in enumerate(list(pairwise(levels))[behind:], behind):
        x0 = state.predict(denoiser, current, sigma, index, False)
        found = []
        for place, (x, d, mask, c) in enumerate(zip(current, x0, state.masks, state.cleans, strict=True)):
            target = post_process(d, mask, c)
            if not eta:
                found.append(euler_step(x, target, sigma, sigma_next))
            elif sigma_next == 0.0:
                found.append(target.to(state.dtype))
            else:
                n = fill_normal(torch.empty_like(x), generators) if given is None else given[place][index]
                step = euler_ancestral_step(x, target, sigma, sigma_next, n, eta=eta)
                found.append(post_process(step, mask, c).to(state.dtype))
        current = found
        if keep is not None and index + 2 < len(levels):
            keep(state.point(index + 1, current, generators))
        if callback is not None:
            callback(index + 1, len(levels) - 1, state.named(current))
    return state.named(current)
