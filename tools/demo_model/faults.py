"""Faults planted into a pipeline, as people make them: what the demo's model measures must tell each from the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ltxkern.pipeline.result import HQOutput
from ltxkern.pipeline.run import denoising
from ltxkern.pipeline.run import stage as run_stage
from ltxkern.pipeline.run.presets import PRESETS
from ltxkern.pipeline.sampling.guidance import COND, NEG, MultiModalPolicy, Prediction
from ltxkern.pipeline.sampling.latents import LatentState, VideoLatentShape
from ltxkern.pipeline.sampling.schedule import STAGE_2_SIGMAS
from ltxkern.pipeline.sampling.state import Latents

Call = Callable[..., HQOutput]


class WrongSign(MultiModalPolicy):
    """Guides towards the negative prompt."""

    def combine(self, predictions: Mapping[str, Prediction]) -> Latents:
        swapped = {**predictions, COND: predictions[NEG], NEG: predictions[COND]}
        return super().combine(swapped)


def _with(**settings: Any) -> Callable[[ExitStack, Call], Call]:
    """The fault of settings that are given whatever was asked."""

    def plant(stack: ExitStack, pipeline: Call) -> Call:
        return lambda prompt, **options: pipeline(prompt, **options | settings)

    return plant


def _shifted_schedule(stack: ExitStack, pipeline: Call) -> Call:
    right = run_stage.res2s_sample

    def sample(predict: Callable[..., Latents], latents: Latents, sigmas: Tensor, **options: Any) -> Latents:
        def told(latents: Latents, sigma: float, *, step: int, substep: bool) -> Latents:
            """What the model predicts where it takes the noise for that of the next step."""
            later = sigmas[min(step + 1, len(sigmas) - 1)]
            return predict(latents, float(later), step=step, substep=substep)

        return right(told, latents, sigmas, **options)

    stack.enter_context(patch.object(run_stage, "res2s_sample", sample))
    return pipeline


def _noise_the_wrong_way(stack: ExitStack, pipeline: Call) -> Call:
    right = LatentState.noise

    def noise(state: LatentState, scale: float = 1.0, **draws: Any) -> LatentState:
        return right(state, scale if scale == 1.0 else 1.0 - scale, **draws)

    stack.enter_context(patch.object(LatentState, "noise", noise))
    return pipeline


def _noised_before_the_upsampler(stack: ExitStack, pipeline: Call) -> Call:
    enlarge, noise = denoising.upsample_latent, LatentState.noise

    def noised(upsampler: Any, vae: Any, latent: Tensor) -> Tensor:
        drawn = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)).to(latent)
        return enlarge(upsampler, vae, torch.lerp(latent, drawn, STAGE_2_SIGMAS[0]))

    def not_again(state: LatentState, scale: float = 1.0, **draws: Any) -> LatentState:
        again = isinstance(state.shape, VideoLatentShape) and scale != 1.0
        return noise(state, 0.0 if again else scale, **draws)

    stack.enter_context(patch.object(denoising, "upsample_latent", noised))
    stack.enter_context(patch.object(LatentState, "noise", not_again))
    return pipeline


def _sides_exchanged(stack: ExitStack, pipeline: Call) -> Call:
    def call(prompt: str, **options: Any) -> HQOutput:
        output = pipeline(prompt, **options)
        return replace(output, audio=torch.flip(output.audio, [0]))

    return call


def _no_upsampler(stack: ExitStack, pipeline: Call) -> Call:
    def repeat(upsampler: Any, vae: Any, latent: Tensor) -> Tensor:
        return latent.repeat_interleave(2, 3).repeat_interleave(2, 4)

    stack.enter_context(patch.object(denoising, "upsample_latent", repeat))
    return pipeline


# Name of each fault, and what makes calls with it.
FAULTS: dict[str, Callable[[ExitStack, Call], Call]] = {
    "sigma schedule off by a step": _shifted_schedule,
    "guidance sign": _with(guidance_policy=WrongSign),
    "phase not switched": _with(distilled_strengths=(PRESETS["hq"].distilled_strengths[0],) * 2),
    "noised before the upsampler": _noised_before_the_upsampler,
    "noise and latent exchanged": _noise_the_wrong_way,
    "left and right exchanged": _sides_exchanged,
    "upsampler skipped": _no_upsampler,
}


@contextmanager
def planted(pipeline: Call, fault: str) -> Iterator[Call]:
    """Calls of a pipeline with one of the `FAULTS`."""
    with ExitStack() as stack:
        yield FAULTS[fault](stack, pipeline)
