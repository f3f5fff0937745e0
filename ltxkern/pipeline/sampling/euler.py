"""The first-order Euler sampler of the non-HQ two-stage pipeline, on the same denoiser protocol as res2s."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from ltxkern.ops.res2s import post_process
from ltxkern.pipeline.sampling.state import Callback, Denoiser, Latents, fp32, sampler_state, schedule_floats


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
    if sample.shape != denoised.shape:
        raise ValueError(f"denoised must have shape {tuple(sample.shape)} like sample, got {tuple(denoised.shape)}")
    if sigma == 0.0:
        raise ValueError("sigma must not be 0: the velocity (sample - denoised) / sigma is not defined there")
    dtype = torch.promote_types(sample.dtype, torch.float32)
    span = fp32(sigma_next) - fp32(sigma)
    velocity = ((sample.to(dtype) - denoised.to(dtype)) / sigma).to(sample.dtype)
    return (sample.to(dtype) + velocity.to(dtype) * span).to(sample.dtype)


@torch.no_grad()
def euler_sample(
    denoiser: Denoiser,
    latents: Mapping[str, Tensor],
    sigmas: Tensor | Iterable[float],
    *,
    masks: Mapping[str, Tensor | None] | None = None,
    clean: Mapping[str, Tensor | None] | None = None,
    model_dtype: torch.dtype | None = None,
    callback: Callback | None = None,
) -> Latents:
    """Denoise latents by Euler steps, one evaluation each.

    `x0 = x0 mask + clean (1 - mask)`, then `euler_step`, for each interval of the schedule.

    Args:
        denoiser, latents, masks, clean, model_dtype, callback: as in `res2s_sample`; substep is always False.
        sigmas: decreasing noise levels, last one 0 or positive; rounded to fp32.
    Returns:
        Latents by modality, in the model dtype.
    Raises:
        TypeError, ValueError: each names the parameter. What the denoiser or the callback raises passes through.

    Contract: exact, see `euler_step`; nothing reads a device value on the host inside the loop.
    Source: the Euler loop of LTX-2.
    """
    state = sampler_state(latents, masks, clean, model_dtype)
    levels = schedule_floats(sigmas)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if not 0.0 <= sigma_next < sigma:
            raise ValueError(
                f"sigmas must be strictly decreasing and at least 0, got {sigma} then {sigma_next} at index {index}"
            )
    current = state.latents
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x0 = state.predict(denoiser, current, sigma, index, False)
        quadruples = zip(current, x0, state.masks, state.cleans, strict=True)
        current = [euler_step(x, post_process(d, mask, c), sigma, sigma_next) for x, d, mask, c in quadruples]
        if callback is not None:
            callback(index + 1, len(levels) - 1, state.named(current))
    return state.named(current)
