"""The res2s sampler: two evaluations a step, fp64 arithmetic, SDE noise, and a clean last evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ltxkern.ops.normalize_noise import noise_statistics
from ltxkern.ops.res2s import post_process, res2s_advance, res2s_midpoint
from ltxkern.ops.res2s_step import SUBSTEP_ETA, Res2sStep, res2s_steps
from ltxkern.pipeline.sampling.state import (
    Callback,
    Denoiser,
    Keep,
    Latents,
    SamplerPoint,
    SamplerState,
    Seeds,
    fill_normal,
    fp32,
    offset_seeds,
    ready_noise,
    sample_generators,
    sampler_state,
    schedule_floats,
)

TAIL_SIGMA = fp32(0.0011)


class _Noise(Protocol):
    """Source of the noise of one step or substep: tensors, and their statistics where they are raw."""

    @property
    def generators(self) -> Sequence[torch.Generator]: ...

    def next(self, step: int, substep: bool) -> tuple[list[Tensor], list[Tensor] | None]: ...


class _DrawnNoise:
    """Raw fp64 noise from fresh generators on the latents' device, in one buffer per modality.

    A buffer is free again before its next draw: the op that reads it is launched on the same stream in between.
    """

    def __init__(self, state: SamplerState, step_seeds: Seeds, substep_seeds: Seeds) -> None:
        self._steps, self._substeps = (sample_generators(seeds, state.device) for seeds in (step_seeds, substep_seeds))
        self.generators = [*self._steps, *self._substeps]
        self._buffers = [torch.empty_like(latent, dtype=torch.float64) for latent in state.latents]
        self._statistics = [latent.new_empty((latent.shape[0], 3), dtype=torch.float64) for latent in state.latents]

    def next(self, step: int, substep: bool) -> tuple[list[Tensor], list[Tensor] | None]:
        for buffer, statistics in zip(self._buffers, self._statistics, strict=True):
            noise_statistics(fill_normal(buffer, self._substeps if substep else self._steps), out=statistics)
        return self._buffers, self._statistics


class _ReplayedNoise:
    """Ready noise given by the caller: substep 0, step 0, substep 1, step 1, ... of each modality."""

    generators: tuple[torch.Generator, ...] = ()

    def __init__(self, state: SamplerState, noise: Mapping[str, Sequence[Tensor]], count: int) -> None:
        self._noise = ready_noise(state, noise, count, "two a step")

    def next(self, step: int, substep: bool) -> tuple[list[Tensor], list[Tensor] | None]:
        return [tensors[2 * step + (not substep)] for tensors in self._noise], None


@torch.no_grad()
def res2s_sample(
    denoiser: Denoiser,
    latents: Mapping[str, Tensor],
    sigmas: Tensor | Iterable[float],
    *,
    masks: Mapping[str, Tensor | None] | None = None,
    clean: Mapping[str, Tensor | None] | None = None,
    noise_seed: Seeds = -1,
    substep_seed: Seeds | None = None,
    eta: float = 0.5,
    substep_eta: float = SUBSTEP_ETA,
    anchor_refinement: bool = True,
    model_dtype: torch.dtype | None = None,
    noise: Mapping[str, Sequence[Tensor]] | None = None,
    callback: Callback | None = None,
    start: SamplerPoint | None = None,
    keep: Keep | None = None,
) -> Latents:
    """Denoise latents by the res2s sampler: a second-order exponential Runge-Kutta step with SDE noise on both of its stages.

    One step from sigma to sigma': evaluate at sigma; `res2s_midpoint` to sqrt(sigma sigma') with substep noise; evaluate there;
    `res2s_advance` to sigma' with step noise. A schedule that ends at 0 goes to 0.0011 instead and takes one more evaluation
    there, whose prediction is the result: n steps are 2n + 1 evaluations (2n where the last sigma is positive).

    Args:
        denoiser: `denoiser(latents, sigma, *, step, substep) -> x0 by modality`. step counts from 0; substep is True at the
            midpoint; the final evaluation has step n. The tensors handed to it are never written to again.
        latents: "video" and/or "audio", packed (B, T, C), fp16 to fp64; not changed.
        sigmas: decreasing noise levels, last one 0 or positive; rounded to fp32. A tensor on a GPU is read once, before the loop.
        masks: fp32 (B, T, 1) per modality, 1 where a token is denoised, 0 where it stays `clean`; missing or None for all ones.
        clean: (B, T, C) per modality; goes with its mask.
        noise_seed: seed of the step noise; several give each sample of the batch the noise it would get alone.
        substep_seed: seed of the substep noise; None for noise_seed + 10000. All generators are fresh in every call.
        eta: share of sigma' that each step adds as noise.
        substep_eta: share of the midpoint's sigma that each substep adds; published is 0.5. Where both are 0 no noise enters, and
            no seed matters.
        anchor_refinement: whether small steps refine their anchor (closed form of the 100-iteration recursion).
        model_dtype: dtype of the state between steps and of the result; None for the latents' own.
        noise: ready fp64 noise instead of drawn one: per modality substep 0, step 0, substep 1, step 1, ... (2n tensors).
        callback: called as `callback(done, total, latents)` after each step, done from 1; the final evaluation counts as one.
        start: a point of an earlier call with the same arguments, to go on from there with the same bits.
        keep: called with the point after each step but the last, before the callback.
    Returns:
        Clean latents by modality, in the model dtype.

    Noise narrows the result. However small a step is, it replaces the same share of the noise by fresh noise around an estimate of
    the clean part, and that estimate has less spread than clean data. On Gaussian data of spread 1 with its best prediction the run
    is linear, and the spread of the result is exactly the length of its answers to the start alone and to each noise alone. Off by,
    for (eta, substep_eta) = (0, 0), (0, 0.5), (0.5, 0.5), (1, 0.5): -7.8, -9.7, -11.8, -29.7 % with the 15 steps at 8160 tokens of
    the HQ preset, whose large last steps make up the first figure; -0.4, -3.0, -3.9, -25.9 % with 400 steps at 4096 tokens; and
    0.0, -2.6, -3.5, -25.7 % with these unstretched, so that no step is large.

    Raises:
        TypeError, ValueError: each names the parameter. What the denoiser or the callback raises passes through.

    Contract: state in the model dtype, everything between two evaluations in fp64. Noise is drawn in fp64 on the latents' device
    (video before audio) and standardised per sample. Nothing reads a device value on the host inside the loop.
    Source: the res2s sampler of LTX-2; Hochbruck and Ostermann 2005.
    """
    state = sampler_state(latents, masks, clean, model_dtype)
    levels = schedule_floats(sigmas)
    clean_end = levels[-1] == 0.0
    if clean_end:
        if not levels[-2] > TAIL_SIGMA:
            raise ValueError(f"sigmas: the last level before 0 must be above {TAIL_SIGMA:.4f}, got {levels[-2]}")
        levels[-1] = TAIL_SIGMA
    steps = res2s_steps(levels, eta, substep_eta=substep_eta, anchor_refinement=anchor_refinement)
    source: _Noise
    if noise is not None:
        source = _ReplayedNoise(state, noise, 2 * len(steps))
    else:
        source = _DrawnNoise(state, noise_seed, offset_seeds(noise_seed) if substep_seed is None else substep_seed)
    return _run(denoiser, state, steps, source, clean_end, callback, start, keep)


def _run(
    denoiser: Denoiser,
    state: SamplerState,
    steps: Sequence[Res2sStep],
    source: _Noise,
    clean_end: bool,
    callback: Callback | None,
    start: SamplerPoint | None,
    keep: Keep | None,
) -> Latents:
    total = len(steps) + clean_end
    behind, current = state.at(start, source.generators)
    anchors = [torch.empty_like(latent, dtype=torch.float64) for latent in current]
    for index, step in enumerate(steps[behind:], behind):
        x0 = state.predict(denoiser, current, step.sigma, index, False)
        current = _half_steps(denoiser, state, current, x0, anchors, index, step, source)
        if keep is not None and index + 1 < total:
            keep(state.point(index + 1, current, source.generators))
        if callback is not None:
            callback(index + 1, total, state.named(current))
    if clean_end:
        x0 = state.predict(denoiser, current, TAIL_SIGMA, len(steps), False)
        triples = zip(x0, state.masks, state.cleans, strict=True)
        current = [post_process(value, mask, clean).to(state.dtype) for value, mask, clean in triples]
        if callback is not None:
            callback(total, total, state.named(current))
    return state.named(current)


def _half_steps(
    denoiser: Denoiser,
    state: SamplerState,
    current: list[Tensor],
    x0: list[Tensor],
    anchors: list[Tensor],
    index: int,
    step: Res2sStep,
    source: _Noise,
) -> list[Tensor]:
    """From the prediction at sigma to the state at sigma_next; the anchors are scratch."""
    noise, statistics = source.next(index, substep=True)
    midpoints = [torch.empty_like(latent) for latent in current]
    res2s_midpoint(
        current,
        x0,
        noise,
        step,
        mask=state.masks,
        clean=state.cleans,
        noise_stats=statistics,
        out=(midpoints, anchors),
    )
    x0_mid = state.predict(denoiser, midpoints, step.sigma_sub, index, True)
    noise, statistics = source.next(index, substep=False)
    return res2s_advance(
        anchors,
        x0,
        x0_mid,
        noise,
        step,
        mask=state.masks,
        clean=state.cleans,
        noise_stats=statistics,
        model_dtype=state.dtype,
    )
