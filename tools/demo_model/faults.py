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


def _shifted_schedule(stack: ExitStack, settings: dict[str, Any]) -> None:
    right = run_stage.res2s_sample

    def sample(predict: Callable[..., Latents], latents: Latents, sigmas: Tensor, **options: Any) -> Latents:
        def told(latents: Latents, sigma: float, *, step: int, substep: bool) -> Latents:
            """What the model predicts where it takes the noise for that of the next step."""
            later = sigmas[min(step + 1, len(sigmas) - 1)]
            return predict(latents, float(later), step=step, substep=substep)

        return right(told, latents, sigmas, **options)

    stack.enter_context(patch.object(run_stage, "res2s_sample", sample))


def _wrong_sign(stack: ExitStack, settings: dict[str, Any]) -> None:
    settings["guidance_policy"] = WrongSign


def _phase_not_switched(stack: ExitStack, settings: dict[str, Any]) -> None:
    settings["distilled_strengths"] = (0.25, 0.25)


def _noise_the_wrong_way(stack: ExitStack, settings: dict[str, Any]) -> None:
    right = LatentState.noise

    def noise(state: LatentState, scale: float = 1.0, **draws: Any) -> LatentState:
        return right(state, scale if scale == 1.0 else 1.0 - scale, **draws)

    stack.enter_context(patch.object(LatentState, "noise", noise))


def _noised_before_the_upsampler(stack: ExitStack, settings: dict[str, Any]) -> None:
    enlarge, noise = denoising.upsample_latent, LatentState.noise

    def noised(upsampler: Any, vae: Any, latent: Tensor) -> Tensor:
        drawn = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)).to(latent)
        return enlarge(upsampler, vae, torch.lerp(latent, drawn, STAGE_2_SIGMAS[0]))

    def not_again(state: LatentState, scale: float = 1.0, **draws: Any) -> LatentState:
        again = isinstance(state.shape, VideoLatentShape) and scale != 1.0
        return noise(state, 0.0 if again else scale, **draws)

    stack.enter_context(patch.object(denoising, "upsample_latent", noised))
    stack.enter_context(patch.object(LatentState, "noise", not_again))


def _no_upsampler(stack: ExitStack, settings: dict[str, Any]) -> None:
    def repeat(upsampler: Any, vae: Any, latent: Tensor) -> Tensor:
        return latent.repeat_interleave(2, 3).repeat_interleave(2, 4)

    stack.enter_context(patch.object(denoising, "upsample_latent", repeat))


# Name of each fault, and what makes it.
FAULTS: dict[str, Callable[[ExitStack, dict[str, Any]], None]] = {
    "sigma schedule off by a step": _shifted_schedule,
    "guidance sign": _wrong_sign,
    "phase not switched": _phase_not_switched,
    "noised before the upsampler": _noised_before_the_upsampler,
    "noise and latent exchanged": _noise_the_wrong_way,
    "left and right exchanged": lambda stack, settings: None,
    "upsampler skipped": _no_upsampler,
}


@contextmanager
def planted(pipeline: Call, fault: str) -> Iterator[Call]:
    """Calls of a pipeline with one of the `FAULTS`."""

    def call(prompt: str, **options: Any) -> HQOutput:
        output = pipeline(prompt, **options | settings)
        if fault == "left and right exchanged":
            output = replace(output, audio=torch.flip(output.audio, [0]))
        return output

    settings: dict[str, Any] = {}
    with ExitStack() as stack:
        FAULTS[fault](stack, settings)
        yield call
