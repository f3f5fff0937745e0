"""A request: what it refuses before any work, its stages, its normal form."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.model.conditioning import ImageCondition
from ltxkern.pipeline.run import request
from ltxkern.pipeline.run.request import PRESETS, GenerationRequest
from ltxkern.pipeline.sampling.guidance import GuidanceScales
from ltxkern.pipeline.sampling.schedule import STAGE_2_SIGMAS
from tests.pipeline.demo_runs import SMALL


def test_what_users_write_becomes_plain_data(tmp_path: Path) -> None:
    """Images of every form, sigmas of every sequence; a request made from one is equal to it."""
    picture = tmp_path / "a.png"
    images = (picture, f"{picture}:8:0.5", (picture, 8, 0.5), ImageCondition(picture, 8))
    asked = GenerationRequest(prompt="a", images=images, stage1_sigmas=torch.tensor([1.0, 0.5, 0.0]))
    found = [(str(image.path), image.frame, image.strength) for image in asked.images]
    assert found == [(str(picture), frame, strength) for frame, strength in ((0, 1.0), (8, 0.5), (8, 0.5), (8, 1.0))]
    assert asked.stage1_sigmas == (1.0, 0.5, 0.0)
    assert asked.stages()[0].sigmas == (1.0, 0.5, 0.0)
    assert replace(asked) == asked


def test_stages_of_a_request() -> None:
    first, second = GenerationRequest(prompt=["a", "b"], steps=4).stages()
    assert (first.name, first.height, first.width, len(first.sigmas)) == ("stage 1", 544, 960, 5)
    assert (second.name, second.height, second.width, second.sigmas) == ("stage 2", 1088, 1920, STAGE_2_SIGMAS)
    assert (first.steps, first.evaluations, first.branches, first.forwards) == (5, 9, 3, 27)
    assert (second.evaluations, second.branches) == (7, 1)
    assert first.video.dims()[0] == second.audio.dims()[0] == 2
    (only,) = GenerationRequest(preset=PRESETS["one-stage"], steps=4, video_guidance=GuidanceScales()).stages()
    assert (only.height, only.evaluations) == (1088, 4)


def test_a_distilled_request_has_a_fixed_schedule() -> None:
    asked = GenerationRequest(prompt="a", preset=PRESETS["distilled"])
    asked.validate()
    assert [(s.evaluations, s.steps, s.branches) for s in asked.stages()] == [(8, 8, 1), (3, 3, 1)]
    assert (asked.noise_share, asked.sounds_from) == (1.0, "stage2")
    (only,) = GenerationRequest(prompt="a", preset=PRESETS["one-stage-distilled"]).stages()
    assert (only.height, only.evaluations) == (1088, 8)
    with pytest.raises(
        ValueError, match="steps must be 8 with pipeline distilled, whose noise levels are fixed, got 4"
    ):
        replace(asked, steps=4).validate()
    assert len(replace(asked, steps=4, stage1_sigmas=(1.0, 0.5, 0.0)).stages()[0].sigmas) == 3


def test_defaults_are_the_published_ones() -> None:
    asked = GenerationRequest(prompt="a")
    assert (asked.noise_share, asked.substep_eta, asked.sounds_from) == (0.5, 0.5, "stage1")


def test_old_names_warn() -> None:
    asked = GenerationRequest(prompt="a")
    with pytest.warns(DeprecationWarning, match="plan is now called stages"):
        assert asked.plan() == asked.stages()
    with pytest.warns(DeprecationWarning, match="StagePlan is now called Stage"):
        assert request.StagePlan is request.Stage


REFUSED = [
    ({"height": 1080}, "height 1080 is not a multiple of 64: use 1088 or 1024"),
    ({"width": 100}, "width 100 is not a multiple of 64: use 128 or 64"),
    ({"height": 0}, "height 0 is not a positive multiple of 64: use 64"),
    ({"num_frames": 120}, "num_frames 120 is not 8k\\+1: use 113 or 121"),
    ({"frame_rate": float("nan")}, "frame_rate must be a positive number"),
    ({"frame_rate": 1e9}, "frame_rate must be between 1 and 300, got 1e\\+09: use 300"),
    ({"frame_rate": 0.5}, "frame_rate must be between 1 and 300, got 0.5: use 1"),
    ({"steps": 1}, "steps must be at least 2"),
    ({"steps": 2**31}, "steps must be at most 10000, got 2147483648: use 10000"),
    ({"audio_guidance": 3.0}, "audio_guidance must be GuidanceScales or None, got 3.0"),
    ({"steps": 1, "height": 65, "seed": 2**64}, r"3 problems:\n  height 65 .*\n  seed must .*\n  steps must"),
    ({"seed": 2**64}, "seed must be between"),
    ({"audio_source": "both"}, "audio_source must be"),
    ({"images": ["/nowhere/at/all.png"]}, "/nowhere/at/all.png"),
    ({"output_type": "gif"}, "output_type must be one of"),
    ({"distilled_strengths": (0.25, -1.0)}, "strength must be a finite number of at least 0"),
    ({"stage2_sigmas": [0.5, 0.7, 0.0]}, "strictly falling"),
    ({"video_guidance": GuidanceScales(stg=1.0, stg_blocks=(48,))}, "stg_blocks must be between 0 and 1"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one text, or one per prompt"),
    ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
    ({"seed": [1, 2]}, "seed must be one, or one per prompt: 1 prompts, 2 given"),
    ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ({"eta": 1.5}, "eta must be between 0 and 1, got 1.5: use 1"),
    ({"substep_eta": -0.5}, "substep_eta must be between 0 and 1, got -0.5: use 0"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED])
def test_refusals_come_before_any_forward(
    pipeline: HQTwoStagePipeline, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done before the request was refused")

    monkeypatch.setattr(pipeline.prompts, "encode", never)
    with pytest.raises((ValueError, TypeError), match=sentence):
        pipeline("a kite", **{**SMALL, **changes})


def test_a_frame_rate_may_be_a_fraction() -> None:
    for rate in ("24000/1001", "23.976", Fraction(24000, 1001)):
        assert GenerationRequest(frame_rate=rate).frame_rate == 24000 / 1001


@pytest.mark.parametrize("text", [os.fsdecode(b"caf\xe9"), json.loads('"caf\\ud83d"')], ids=["latin-1", "half"])
def test_a_prompt_in_another_encoding(text: str) -> None:
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(ValueError, match=f"{name} must be Unicode text, got .* after 'caf': write it in UTF-8"):
            GenerationRequest(**{"prompt": "a", name: text}).validate()
