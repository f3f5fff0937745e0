"""One denoising stage: the forwards that run, in batches or one by one, with every sampler."""

from __future__ import annotations

from dataclasses import replace

import torch

from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.run.request import GenerationRequest
from ltxkern.pipeline.sampling.guidance import GuidanceScales
from tests.pipeline.demo_runs import SMALL, count_forwards, latents


def test_evaluation_counts_at_defaults(pipeline: HQTwoStagePipeline) -> None:
    assert count_forwards(pipeline, steps=None) == {"stage 1": 31 * 3, "stage 2": 7}


def test_plan_tells_the_forwards_that_run(pipeline: HQTwoStagePipeline) -> None:
    counts = count_forwards(pipeline, steps=3)
    request = GenerationRequest(prompt="a", **{**SMALL, "steps": 3})
    assert list(counts.values()) == [stage.forwards for stage in request.stages(pipeline.geometry)]


def test_void_scales_skip_their_forwards(pipeline: HQTwoStagePipeline) -> None:
    void = GuidanceScales()
    assert count_forwards(pipeline, video_guidance=void, audio_guidance=void)["stage 1"] == 5
    one = replace(void, cfg=2.0)
    assert count_forwards(pipeline, video_guidance=one, audio_guidance=void)["stage 1"] == 10
    perturbed = GuidanceScales(cfg=2.0, stg=1.0, modality=2.0, stg_blocks=(1,))
    assert count_forwards(pipeline, video_guidance=perturbed, audio_guidance=void)["stage 1"] == 20


def test_skip_step_skips_forwards(pipeline: HQTwoStagePipeline) -> None:
    skipping = GuidanceScales(cfg=2.0, skip_step=1)
    counted = count_forwards(pipeline, steps=4, video_guidance=skipping, audio_guidance=skipping)
    # Steps 1 and 3 reuse the prediction of the evaluation before; midpoints and the final evaluation (step 4) run.
    assert counted["stage 1"] == (9 - 2) * 2


def test_max_batch_size(pipeline: HQTwoStagePipeline) -> None:
    base = latents(pipeline)
    for size in (2, 3):
        for name, tensor in latents(pipeline, max_batch_size=size).items():
            torch.testing.assert_close(tensor, base[name], atol=1e-4, rtol=1e-4)
