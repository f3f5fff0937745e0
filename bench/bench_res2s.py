"""Benchmark of the res2s half-steps and the SDE step at the latents of both stages; video and audio in one call."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ltxkern
from bench_normalize_noise import normalize
from cases import Call, Case, Suite, count_bytes
from command_line import main

# One step from the middle of the 15-step schedule; h < 0.5 and sigma > 0.03, so that the anchor is refined.
STEP = ltxkern.res2s_steps([0.8990960121154785, 0.8689230680465698])[0]


def sde(sample: Tensor, advanced: Tensor, noise: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """The SDE step in its linear form."""
    a, b, s = coefficients
    return a * sample + b * advanced + s * noise


def standardised(noise: Tensor, stats: Tensor | None) -> Tensor:
    """Raw noise brought to mean 0 and std 1; ready noise as it is."""
    return noise if stats is None else (noise - noise.mean()) / noise.std()


def midpoint(
    latents: list[Tensor], x0s: list[Tensor], noises: list[Tensor], stats: list[Tensor] | None, iterations: int = 0
) -> list[Tensor]:
    """First half-step; the anchor by its closed form, or by the 100 iterations that other samplers run."""
    c = STEP.contraction
    middles, anchors = [], []
    for i, (latent, x0, noise) in enumerate(zip(latents, x0s, noises, strict=True)):
        start, target = latent.double(), x0.double()
        ready = standardised(noise, None if stats is None else stats[i])
        moved = sde(start, start + c * (target - start), ready, STEP.substep)
        anchor = start if iterations else (moved - c * target) / (1 - c)
        for _ in range(iterations):
            anchor = moved - c * (target - anchor)
        middles.append(moved.to(latent.dtype))
        anchors.append(anchor)
    return middles + anchors


def advance(
    anchors: list[Tensor], x0s: list[Tensor], seconds: list[Tensor], noises: list[Tensor], stats: list[Tensor] | None
) -> list[Tensor]:
    """Second half-step."""
    latents = []
    for i, (anchor, x0, second, noise) in enumerate(zip(anchors, x0s, seconds, noises, strict=True)):
        e1, e2 = x0.double() - anchor, second.double() - anchor
        moved = anchor + STEP.h * (STEP.b1 * e1 + STEP.b2 * e2)
        ready = standardised(noise, None if stats is None else stats[i])
        latents.append(sde(anchor, moved, ready, STEP.advance).to(x0.dtype))
    return latents


def fused_half_step(op: Callable[..., Any], *args: Any) -> Any:
    """The toolkit's half-step."""
    return op(*args[:-1], STEP, noise_stats=args[-1])


def sde_step(sample: Tensor, denoised: Tensor, noise: Tensor) -> Tensor:
    """The SDE step alone."""
    return sde(sample, denoised, noise, STEP.advance)


def fused_sde_step(sample: Tensor, denoised: Tensor, noise: Tensor) -> Tensor:
    """The toolkit's SDE step."""
    return ltxkern.res2s_sde_step(sample, denoised, STEP.sigma, STEP.sigma_next, noise)


def whole_step(*args: Any, iterations: int = 0) -> list[Tensor]:
    """Both half-steps as samplers run them, each on noise that it normalises first."""
    latent, x0, second, first_noise, second_noise, _ = args
    middle, anchor = midpoint([latent], [x0], [normalize(first_noise)], None, iterations)
    return [middle, anchor, *advance([anchor], [x0], [second], [normalize(second_noise)], None)]


def published_sde(sample: Tensor, advanced: Tensor, noise: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The SDE step in the published order, over epsilon."""
    alpha, down, up = ltxkern.sde_coefficients(sigma_next, sigma_up=0.5 * sigma_next)
    epsilon = (sample - advanced) / (sigma - sigma_next)
    return alpha * ((sample - sigma * epsilon) + down * epsilon) + up * noise


def published_step(mask: Tensor, clean: Tensor, iterations: int, *args: Any) -> list[Tensor]:
    """A whole step op by op in the published order: every prediction and state passes the mask, also one of all ones."""
    latent, x0, second, first_noise, second_noise, _ = args

    def kept(value: Tensor) -> Tensor:
        return (value * mask + clean.float() * (1 - mask)).to(value.dtype)

    c, start, target = STEP.contraction, latent.double(), kept(x0)
    direction = target - start
    moved = start + c * direction
    moved = kept(published_sde(start, moved, normalize(first_noise), STEP.sigma, STEP.sigma_sub))
    anchor = start if iterations else (moved - c * target) / (1 - c)
    for _ in range(iterations):
        anchor = moved - c * direction
        direction = target - anchor
    first = target - anchor
    advanced = anchor + STEP.h * (STEP.b1 * first + STEP.b2 * (kept(second) - anchor))
    result = kept(published_sde(anchor, advanced, normalize(second_noise), STEP.sigma, STEP.sigma_next))
    return [moved.to(latent.dtype), anchor, result.to(latent.dtype)]


def fused_whole_step(*args: Any) -> list[Tensor]:
    """The toolkit's: statistics and half-step, twice, into given outputs."""
    latent, x0, second, first_noise, second_noise, (middle, anchor, result, first_stats, second_stats) = args
    ltxkern.noise_statistics(first_noise, out=first_stats)
    ltxkern.res2s_midpoint(latent, x0, first_noise, STEP, noise_stats=first_stats, out=(middle, anchor))
    ltxkern.noise_statistics(second_noise, out=second_stats)
    ltxkern.res2s_advance(anchor, x0, second, second_noise, STEP, noise_stats=second_stats, out=result)
    return [middle, anchor, result]


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """States and predictions in the model dtype, noise and anchor in fp64."""
    shapes = [case.shape, (1, 126, 128)]

    def random(kind: torch.dtype) -> list[Tensor]:
        return [torch.randn(s, device=device, dtype=torch.float64, generator=generator).to(kind) for s in shapes]

    if case.options["half"] == "both":
        state, x0, second = (random(dtype)[0] for _ in range(3))
        args = (state, x0, second, random(torch.float64)[0], random(torch.float64)[0])
        stats = [torch.zeros(1, 3, dtype=torch.float64, device=device) for _ in range(2)]
        outputs = [*(torch.zeros_like(state, dtype=kind) for kind in (dtype, torch.float64, dtype)), *stats]
        unmasked = torch.ones(*state.shape[:-1], 1, device=device), torch.zeros_like(state)
        return Call(
            (*args, outputs),
            op=fused_whole_step,
            composition=whole_step,
            other={
                "torch eager, 100 iterations": functools.partial(whole_step, iterations=100),
                "published order": functools.partial(published_step, *unmasked, 0),
                "published order, 100 iterations": functools.partial(published_step, *unmasked, 100),
            },
            reads=count_bytes(args),
        )
    raw = case.options.get("raw_noise", False)
    state, x0, second, noise = random(dtype), random(dtype), random(dtype), random(torch.float64)
    stats = [ltxkern.reference.noise_statistics(n) for n in noise] if raw else None
    if case.options["half"] == "midpoint":
        other = {} if raw else {"torch eager, 100 iterations": functools.partial(midpoint, iterations=100)}
        return Call(
            (state, x0, noise, stats),
            op=functools.partial(fused_half_step, ltxkern.res2s_midpoint),
            composition=midpoint,
            other=other,
        )
    if case.options["half"] == "advance":
        anchor = [s.double() for s in state]
        return Call(
            (anchor, x0, second, noise, stats),
            op=functools.partial(fused_half_step, ltxkern.res2s_advance),
            composition=advance,
        )
    wide = random(torch.float64)
    return Call((wide[0], x0[0].double(), noise[0]), op=fused_sde_step, composition=sde_step)


STAGE1, STAGE2 = (1, 8160, 128), (1, 32640, 128)
SUITE = Suite(
    op="res2s",
    cases=(
        Case("stage1_midpoint", STAGE1, "small", {"half": "midpoint"}),
        Case("stage1_advance", STAGE1, "small", {"half": "advance"}),
        Case("stage1_midpoint_raw_noise", STAGE1, options={"half": "midpoint", "raw_noise": True}),
        Case("stage1_advance_raw_noise", STAGE1, options={"half": "advance", "raw_noise": True}),
        Case("stage1_step_raw_noise_out", STAGE1, options={"half": "both"}),
        Case("stage1_sde_step", STAGE1, options={"half": "sde"}),
        Case("stage2_midpoint", STAGE2, options={"half": "midpoint"}),
        Case("stage2_advance", STAGE2, options={"half": "advance"}),
        Case("stage2_midpoint_raw_noise", STAGE2, options={"half": "midpoint", "raw_noise": True}),
    ),
    prepare=prepare,
    allowed_dtypes=("bf16", "fp16", "fp32", "fp64"),
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
