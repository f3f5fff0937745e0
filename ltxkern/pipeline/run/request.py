"""One generation, checked before anything is loaded: what is asked for, and the shapes, sigmas and forwards that follow."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ltxkern.ops.res2s_step import SUBSTEP_ETA
from ltxkern.pipeline.model.conditioning import ImageCondition, parse_image_condition, validate_image_conditions
from ltxkern.pipeline.results.media import frame_rate
from ltxkern.pipeline.run.checks import (
    find_device,
    require_all,
    require_at_least_one,
    require_positive,
    require_schedule,
    require_share,
    require_side,
    require_strength,
    require_texts,
    whole,
)
from ltxkern.pipeline.run.presets import PRESETS, Preset, find_preset
from ltxkern.pipeline.sampling.guidance import (
    GuidanceRequest,
    GuidanceScales,
    MultiModalPolicy,
)
from ltxkern.pipeline.sampling.latents import (
    PRODUCTION_BLOCKS,
    AudioLatentShape,
    Geometry,
    VideoLatentShape,
    require_frame_count,
)
from ltxkern.pipeline.sampling.schedule import STAGE_2_SIGMAS, ltx2_sigmas

# Frames per second: the model's positions are seconds, and it saw videos of at most 20; H.264 carries no more than 300.
FRAME_RATES = (1, 300)
# Of stage 1: a schedule of more is a slip of the keyboard, and one of billions does not fit into memory.
MOST_STEPS = 10_000

__all__ = [
    "DEFAULT_NEGATIVE_PROMPT",
    "PRESETS",
    "GenerationRequest",
    "Preset",
    "Stage",
    "find_device",
    "find_preset",
    "require_strength",
    "scale_blocks",
]

# The five leading tags are the published pipeline's (the model knows them); the rest covers the same ground in our words.
DEFAULT_NEGATIVE_PROMPT = (
    "has_subtitles, has_blurbox, transition from black, transition to black, speech_ending_short, "
    "blurred, unfocused, burnt-out highlights, crushed shadows, flat contrast, washed-out colours, heavy noise, grain, "
    "compression blocks, flicker, jitter, camera shake, ghosting, duplicated limbs, deformed hands, extra fingers, "
    "warped face, waxy skin, stiff motion, frozen frame, watermark, logo, text overlay, silence, muffled sound, "
    "distorted or robotic voice, echo, hiss, sound out of sync, unwanted speech, cartoon filter, generation artefacts"
)


@dataclass(frozen=True)
class Stage:
    """One denoising stage of a request: sizes, schedule and the number of forwards."""

    name: str
    height: int
    width: int
    video: VideoLatentShape
    audio: AudioLatentShape
    sigmas: tuple[float, ...]
    sampler: str
    branches: int

    @property
    def steps(self) -> int:
        """Steps that a sampler reports: intervals of the schedule, and the clean last evaluation of res2s."""
        return len(self.sigmas) - 1 + (1 if self.sampler == "res2s" and self.sigmas[-1] == 0 else 0)

    @property
    def evaluations(self) -> int:
        """Model evaluations: res2s takes two a step and one for a final zero, Euler one a step."""
        steps = len(self.sigmas) - 1
        return 2 * steps + (1 if self.sigmas[-1] == 0 else 0) if self.sampler == "res2s" else steps

    @property
    def forwards(self) -> int:
        """Transformer forwards when every branch runs in every evaluation."""
        return self.evaluations * self.branches


@dataclass(frozen=True)
class GenerationRequest:
    """Everything that is asked of one generation; plain data, checked by `validate` and run by `HQTwoStagePipeline.generate`.

    Args:
        prompt, negative_prompt: one text, or one per video.
        images: `ImageCondition`, "PATH[:FRAME[:STRENGTH]]", paths or (path, frame, strength) tuples.
        preset: of the pipeline that is to run it.
        seed: of the initial noise (and of ancestral Euler's own; that of res2s has fixed seeds, as published). One for all videos,
            each of which draws what it would draw in a call of its own, or one per video.
        height, width: of the result, multiples of 64 (32 for one stage).
        num_frames: 8k+1.
        frame_rate: frames per second; also a fraction such as "24000/1001".
        steps: of stage 1; None for the preset's (15 in HQ).
        video_guidance, audio_guidance: scales of stage 1; None for the preset's.
        distilled_strengths: of the distilled LoRA in stage 1 and 2; None for the pipeline's.
        eta: noise share of a step of res2s or ancestral Euler; None for the preset's (0.5 in HQ, 1 in the distilled ones).
        substep_eta: noise share of a res2s midpoint; with 0 here and in eta a run has no noise but the initial one. What both do to
            the spread of the result: `res2s_sample`.
        audio_source: "stage1" or "stage2"; None for the preset's (stage 2 in "distilled", else stage 1, as published).
        stage1_sigmas, stage2_sigmas: schedules in place of the preset's.
        max_batch_size: guidance branches per batch of a forward.
    """

    prompt: str | Sequence[str] = ""
    negative_prompt: str | Sequence[str] = DEFAULT_NEGATIVE_PROMPT
    images: Sequence[Any] = ()
    preset: Preset = field(default_factory=lambda: PRESETS["hq"])
    seed: int | Sequence[int] = 10
    height: int = 1088
    width: int = 1920
    num_frames: int = 121
    frame_rate: float = 24.0
    steps: int | None = None
    video_guidance: GuidanceScales | None = None
    audio_guidance: GuidanceScales | None = None
    distilled_strengths: tuple[float, float] | None = None
    eta: float | None = None
    substep_eta: float = SUBSTEP_ETA
    audio_source: str | None = None
    stage1_sigmas: Sequence[float] | Tensor | None = None
    stage2_sigmas: Sequence[float] | Tensor | None = None
    max_batch_size: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.frame_rate, (str, Fraction)):
            object.__setattr__(self, "frame_rate", float(frame_rate(self.frame_rate)))
        object.__setattr__(self, "images", tuple(_image_condition(item) for item in self.images))
        for name in ("stage1_sigmas", "stage2_sigmas"):
            sigmas = getattr(self, name)
            object.__setattr__(self, name, None if sigmas is None else _floats(sigmas))
        if isinstance(self.seed, Sequence) and not isinstance(self.seed, str):
            object.__setattr__(self, "seed", tuple(self.seed))

    @property
    def batch(self) -> int:
        """Number of videos: one per prompt."""
        return 1 if isinstance(self.prompt, str) else len(self.prompt)

    def prompts(self) -> list[str]:
        """The prompts, one per video."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    def negative_prompts(self) -> list[str]:
        """The negative prompts, one per video."""
        if isinstance(self.negative_prompt, str):
            return [self.negative_prompt] * self.batch
        return list(self.negative_prompt)

    def seeds(self) -> list[int]:
        """The seeds, one per video."""
        seeds = list(self.seed) if isinstance(self.seed, Sequence) else [self.seed]
        return seeds * self.batch if len(seeds) == 1 else seeds

    @property
    def noise_share(self) -> float:
        """`eta`, or the preset's."""
        return self.preset.eta if self.eta is None else self.eta

    @property
    def sounds_from(self) -> str:
        """`audio_source`, or the preset's."""
        return self.preset.audio_source if self.audio_source is None else self.audio_source

    def validate(self, geometry: Geometry | None = None, *, check_files: bool = True) -> None:
        """Refuse what cannot be generated, all of it in one error, before anything is loaded.

        Raises:
            ValueError, TypeError: every parameter that is wrong, with the nearest legal value.
        """
        geometry = geometry or Geometry()
        multiple = geometry.spatial_ratio * self.preset.stages
        shares = {"eta": self.noise_share, "substep_eta": self.substep_eta}
        schedules = {"stage1_sigmas": self.stage1_sigmas, "stage2_sigmas": self.stage2_sigmas}
        require_all(
            lambda: require_texts(self.prompts(), self.negative_prompts()),
            lambda: require_side("height", self.height, multiple),
            lambda: require_side("width", self.width, multiple),
            lambda: self._require_length(geometry),
            self._require_seeds,
            self._require_steps,
            self._require_sound,
            *(partial(require_share, name, share) for name, share in shares.items()),
            lambda: require_at_least_one("max_batch_size", self.max_batch_size),
            *(partial(require_schedule, name, list(_floats(s))) for name, s in schedules.items() if s is not None),
            *(partial(require_strength, "distilled LoRA", strength) for strength in self.distilled_strengths or ()),
            lambda: self._require_guidance(geometry),
            lambda: validate_image_conditions(self.images, self.num_frames, check_files=check_files),
        )

    def _require_length(self, geometry: Geometry) -> None:
        require_frame_count(whole("num_frames", self.num_frames), geometry.temporal_ratio)
        require_positive("frame_rate", self.frame_rate)
        low, high = FRAME_RATES
        if not low <= self.frame_rate <= high:
            raise ValueError(
                f"frame_rate must be between {low} and {high}, got {self.frame_rate:g}: "
                f"use {low if self.frame_rate < low else high}"
            )
        if self.audio_shape(geometry).frames < 1:
            raise ValueError(
                f"num_frames {self.num_frames} at {self.frame_rate} fps is shorter than one audio latent (1/25 s): use more frames"
            )

    def _require_sound(self) -> None:
        if self.sounds_from not in ("stage1", "stage2"):
            raise ValueError(f'audio_source must be "stage1" or "stage2", got {self.audio_source!r}')
        if self.sounds_from == "stage2" and self.preset.stages == 1:
            raise ValueError('audio_source "stage2" needs a pipeline of two stages: use "stage1"')

    def _require_seeds(self) -> None:
        if len(self.seeds()) != self.batch:
            raise ValueError(f"seed must be one, or one per prompt: {self.batch} prompts, {len(self.seeds())} given")
        for seed in self.seeds():
            if not -(2**63) <= whole("seed", seed) < 2**64:
                raise ValueError(f"seed must be between -2^63 and 2^64 - 1, got {seed}")

    def _require_steps(self) -> None:
        if self.steps is None or self.stage1_sigmas is not None:
            return
        count = whole("steps", self.steps)
        if self.preset.for_distilled and count != self.preset.steps:
            raise ValueError(
                f"steps must be {self.preset.steps} with pipeline {self.preset.name}, whose noise levels are fixed, got {count}: "
                "leave it out, or give stage1_sigmas"
            )
        if count < 2:
            raise ValueError(f"steps must be at least 2, got {count}: use 2")
        if count > MOST_STEPS:
            raise ValueError(f"steps must be at most {MOST_STEPS}, got {count}: use {MOST_STEPS}")

    def _require_guidance(self, geometry: Geometry) -> None:
        for name, scales in (("video", self.video_guidance), ("audio", self.audio_guidance)):
            if not isinstance(scales, GuidanceScales | None):
                raise TypeError(f"{name}_guidance must be GuidanceScales or None, got {scales!r}")
            wrong = [b for b in (scales.stg_blocks if scales else ()) if not 0 <= b < geometry.blocks]
            if wrong:
                raise ValueError(f"{name} stg_blocks must be between 0 and {geometry.blocks - 1}, got {wrong}")

    def video_shape(self, stage: int, geometry: Geometry) -> VideoLatentShape:
        """Video latent of stage 1 (half size where there are two stages) or 2."""
        divisor = self.preset.stages // stage
        return VideoLatentShape.from_pixels(
            self.num_frames,
            self.height // divisor,
            self.width // divisor,
            channels=geometry.video_channels,
            batch=self.batch,
            spatial_ratio=geometry.spatial_ratio,
            temporal_ratio=geometry.temporal_ratio,
        )

    def audio_shape(self, geometry: Geometry) -> AudioLatentShape:
        """Audio latent of both stages."""
        return AudioLatentShape.from_pixels(
            self.num_frames,
            self.frame_rate,
            channels=geometry.audio_channels,
            mel_bins=geometry.mel_bins,
            batch=self.batch,
        )

    def guidance(self, geometry: Geometry) -> GuidanceRequest:
        """Guidance of stage 1; a preset's STG block is moved to the same depth of the model."""
        default = self.preset.guidance
        return GuidanceRequest(
            *(
                given if given is not None else scale_blocks(preset, geometry.blocks)
                for given, preset in ((self.video_guidance, default.video), (self.audio_guidance, default.audio))
            )
        )

    def stages(self, geometry: Geometry | None = None) -> list[Stage]:
        """The stages with their shapes, schedules and forwards."""
        geometry = geometry or Geometry()
        count = self.preset.stages
        first = self.video_shape(1, geometry)
        sigmas = self.preset.sigmas if self.stage1_sigmas is None else self.stage1_sigmas
        if sigmas is None:
            sigmas = ltx2_sigmas(self.preset.steps if self.steps is None else self.steps, first.tokens).tolist()
        found = [
            Stage(
                "stage 1",
                self.height // count,
                self.width // count,
                first,
                self.audio_shape(geometry),
                _floats(sigmas),
                self.preset.sampler,
                len(MultiModalPolicy.build(self.guidance(geometry), {}, {}).branches),
            )
        ]
        if count == 2:
            later = STAGE_2_SIGMAS if self.stage2_sigmas is None else self.stage2_sigmas
            # Three steps are too few to take fresh noise out again: the refinement of the distilled model is plain, as published.
            sampler = self.preset.sampler.removesuffix("-ancestral")
            second = replace(
                found[0], name="stage 2", height=self.height, width=self.width, branches=1, sampler=sampler
            )
            found.append(replace(second, video=self.video_shape(2, geometry), sigmas=_floats(later)))
        return found

    def plan(self, geometry: Geometry | None = None) -> list[Stage]:
        """`stages` under its name of version 0.1; a plan is what a request needs of memory and time."""
        warnings.warn("GenerationRequest.plan is now called stages", DeprecationWarning, stacklevel=2)
        return self.stages(geometry)


def _floats(sigmas: Sequence[float] | Tensor) -> tuple[float, ...]:
    return tuple(float(sigma) for sigma in sigmas)


def _image_condition(item: Any) -> ImageCondition:
    """An image condition from what users write."""
    if isinstance(item, str):
        return parse_image_condition(item)
    if isinstance(item, (ImageCondition, Path)):
        return item if isinstance(item, ImageCondition) else ImageCondition(item)
    return ImageCondition(*item)


def scale_blocks(scales: GuidanceScales | None, blocks: int) -> GuidanceScales | None:
    """A preset made for the published 48 blocks, moved to the same relative depth of another model."""
    if blocks == PRODUCTION_BLOCKS or scales is None or not scales.stg_blocks:
        return scales
    return replace(scales, stg_blocks=tuple(sorted({b * blocks // PRODUCTION_BLOCKS for b in scales.stg_blocks})))


def __getattr__(name: str) -> Any:
    if name == "StagePlan":
        warnings.warn("StagePlan is now called Stage", DeprecationWarning, stacklevel=2)
        return Stage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
