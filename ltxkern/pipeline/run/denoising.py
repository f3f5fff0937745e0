"""The denoising part of one generation: the run's generators, its stages, and what lies between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ltxkern.pipeline.files.lora import LoRAPhase
from ltxkern.pipeline.model.conditioning import ImageCondition, apply_image_conditions, encode_conditions
from ltxkern.pipeline.model.decode import upsample_latent
from ltxkern.pipeline.run.device_memory import step_down, vacate, with_room
from ltxkern.pipeline.run.health import explained
from ltxkern.pipeline.run.progress import Report, report
from ltxkern.pipeline.run.request import GenerationRequest, Stage
from ltxkern.pipeline.run.stage import run_stage
from ltxkern.pipeline.sampling.finite import check_latents
from ltxkern.pipeline.sampling.guidance import CFGPolicy
from ltxkern.pipeline.sampling.latents import LatentState, patchify
from ltxkern.pipeline.sampling.state import fill_normal, sample_generators
from ltxkern.pipeline.work.kept import KeptWork

logger = logging.getLogger(__name__)

_DRAWN = "drawn"

_Result = TypeVar("_Result")
StepCallback = Callable[[str, int, int, dict[str, Tensor]], None]


@dataclass
class DenoisingRun:
    """The denoising part of one call: the run's generators, its stages, and what lies between them."""

    pipeline: Any
    request: GenerationRequest
    stages: list[Stage]
    initial_noise: Sequence[Tensor] | None
    sde_noise: Sequence[Mapping[str, Sequence[Tensor]]] | None
    image_latents: Sequence[Sequence[Tensor]] | None
    callback: StepCallback | None
    progress: Report | None
    work: KeptWork

    def __post_init__(self) -> None:
        self.kept = [self.work.take(f"stage{index}") for index in range(1, len(self.stages) + 1)]

    @property
    def is_denoised(self) -> bool:
        """Whether an earlier process ran all stages."""
        return all(found is not None for found in self.kept)

    def latents(self, policies: Sequence[CFGPolicy], phases: Sequence[LoRAPhase]) -> dict[str, Tensor]:
        """The stages that `phases` covers (all, save on some ranks of several); the latents that `HQOutput` carries."""
        pipeline = self.pipeline
        # One per video, for the initial noise of stage-1 video, stage-1 audio, stage-2 video, stage-2 audio in this order.
        self.generators = sample_generators(self.request.seeds(), pipeline.device)
        if phases and not self.is_denoised:
            self._with_room("the transformer", lambda: pipeline.attach(self.request, phases))
        latents: dict[str, Tensor] = {}
        video: Tensor | None = None
        audio: Tensor | None = None
        for index in range(len(phases)):
            found = self.kept[index]
            if found is not None:
                self._draw_again(index, found)
            else:
                found = self._denoised(index, policies[index], phases, video, audio)
                self.work.stage(f"stage{index + 1}", found)
            video, audio = found["video"], found["audio"]
            if index == 0:
                latents |= {"stage1_video": video, "stage1_audio": audio}
            if index + 1 < len(phases):
                smaller = video
                video = self.work.once("stage1-upsampled", lambda: {"video": self._upsample(smaller)})["video"]  # noqa: B023
                latents["upsampled_video"] = video
        if video is None or audio is None or len(phases) < len(self.stages):
            return latents
        if len(self.stages) > 1:
            latents["stage2_audio"] = audio
        source = audio if self.request.sounds_from == "stage2" else latents["stage1_audio"]
        return latents | {"video": video, "audio": source}

    def _with_room(self, name: str, work: Callable[[], _Result]) -> _Result:
        """`with_room`, in the next device mode; ranks that share a run must stay in step."""
        if self.pipeline.denoiser_factory is not None:
            return work()
        return with_room(name, work, lambda: step_down(self.pipeline.manager))

    def _denoised(
        self,
        index: int,
        policy: CFGPolicy,
        phases: Sequence[LoRAPhase],
        video: Tensor | None,
        audio: Tensor | None,
    ) -> dict[str, Tensor]:
        """What `_stage` gives, in the LoRA phase of the stage and in a device mode that has room for it."""
        stage, phase, pipeline = self.stages[index], phases[index], self.pipeline
        pictures = self._pictures(index)
        before = [generator.get_state() for generator in self.generators]

        def attempt() -> dict[str, Tensor]:
            for generator, state in zip(self.generators, before, strict=True):
                generator.set_state(state)
            if not pipeline.manager.is_attached:
                pipeline.attach(self.request, phases)
            pipeline.manager.switch_lora_phase(phase)
            with (
                explained(
                    f"stage{index + 1}", pipeline.components, ["transformer"], [lora for lora, _ in phase.entries]
                ),
                pipeline.manager.stage(stage.name, forwards=self._forwards(stage, policy)),
            ):
                return self._stage(index, policy, pictures, video, audio)

        return self._with_room(stage.name, attempt)

    def _draw_again(self, index: int, found: Mapping[str, Tensor]) -> None:
        """Bring the generators to where a stage that is not run would have left them."""
        for offset, name in enumerate(("video", "audio")):
            if self.initial_noise is None:
                tokens = patchify(found[name])
                drawn = int(found[_DRAWN][offset])
                fill_normal(tokens.new_empty(tokens.shape[0], drawn, tokens.shape[2]), self.generators)

    def _forwards(self, stage: Stage, policy: CFGPolicy) -> int | None:
        """Transformer calls of a stage, where they are known beforehand; None where steps may be skipped or shared out."""
        if self.pipeline.denoiser_factory is not None or any(policy.skipped(step) for step in range(len(stage.sigmas))):
            return None
        return stage.evaluations

    def _pictures(self, index: int) -> Sequence[Tensor]:
        if self.image_latents is not None:
            return self.image_latents[index]
        if not self.request.images:
            return ()
        kept = self.work.once(f"stage{index + 1}-images", lambda: self._encode_pictures(index))
        return [kept[name] for name in sorted(kept)]

    def _encode_pictures(self, index: int) -> dict[str, Tensor]:
        stage, pipeline = self.stages[index], self.pipeline
        report(self.progress, f"images for {stage.name}", 0, 1)

        def encode() -> list[Tensor]:
            with pipeline.manager.component("video_vae", pipeline.components.video_vae) as vae:
                return encode_conditions(vae, self.request.images, stage.height, stage.width, device=pipeline.device)

        encoded = with_room(f"images for {stage.name}", encode, lambda: vacate(pipeline.manager))
        report(self.progress, f"images for {stage.name}", 1, 1)
        return {f"{place:05d}": latent for place, latent in enumerate(encoded)}

    def _stage(
        self, index: int, policy: CFGPolicy, pictures: Sequence[Tensor], video: Tensor | None, audio: Tensor | None
    ) -> dict[str, Tensor]:
        """The latents of both modalities after a stage, and how many tokens of noise it drew for each."""
        stage, pipeline = self.stages[index], self.pipeline
        transformer = pipeline.components.transformer
        dtype = next(transformer.parameters()).dtype
        place: dict[str, Any] = {"fps": self.request.frame_rate, "dtype": dtype, "device": pipeline.device}
        place["spatial_ratio"] = pipeline.geometry.spatial_ratio
        place["temporal_ratio"] = pipeline.geometry.temporal_ratio
        state = LatentState.create(stage.video, latent=video, **place)
        conditions = self._conditions(pictures)
        if conditions:
            ratio = pipeline.geometry.spatial_ratio
            state = apply_image_conditions(
                state, conditions, pictures, fps=self.request.frame_rate, spatial_ratio=ratio
            )
        states = {"video": state, "audio": LatentState.create(stage.audio, latent=audio, **place)}
        scale = 1.0 if index == 0 else stage.sigmas[0]
        for offset, name in enumerate(("video", "audio")):
            given = None if self.initial_noise is None else self.initial_noise[2 * index + offset]
            states[name] = states[name].noise(scale, generator=self.generators, noise=given)
        drawn = [states[name].latent.shape[1] for name in ("video", "audio")]
        ends = run_stage(
            transformer,
            states,
            policy,
            stage,
            conditioned=bool(conditions),
            eta=self.request.noise_share,
            substep_eta=self.request.substep_eta,
            seeds=self.request.seeds(),
            max_batch_size=self.request.max_batch_size,
            sde_noise=None if self.sde_noise is None else self.sde_noise[index],
            callback=self._step_callback(stage),
            denoiser_factory=pipeline.denoiser_factory,
            steps=self.work.steps(f"stage{index + 1}", stage.name),
        )
        return {name: state.unpack() for name, state in ends.items()} | {_DRAWN: torch.tensor(drawn)}

    def _conditions(self, pictures: Sequence[Tensor]) -> Sequence[ImageCondition]:
        if self.image_latents is not None and not self.request.images and len(pictures) == 1:
            return (ImageCondition("", 0, 1.0),)
        return self.request.images

    def _step_callback(self, stage: Stage) -> Callable[[int, int, dict[str, Tensor]], None]:
        def after_step(done: int, total: int, latents: dict[str, Tensor]) -> None:
            report(self.progress, stage.name, done, total)
            if self.callback is not None:
                self.callback(stage.name, done, total, latents)

        report(self.progress, stage.name, 0, stage.steps)
        return after_step

    def _upsample(self, video: Tensor) -> Tensor:
        pipeline = self.pipeline
        report(self.progress, "upsampling", 0, 1)
        statistics = self._statistics()

        def enlarge() -> Tensor:
            with pipeline.manager.component("upsampler", pipeline.components.upsampler) as upsampler:
                return upsample_latent(upsampler, statistics, video)

        larger = with_room("upsampling", enlarge, lambda: vacate(pipeline.manager))
        with explained("stage1", pipeline.components, ["upsampler"]):
            check_latents("upsampling", {"video latent": larger})
        report(self.progress, "upsampling", 1, 1)
        return larger

    def _statistics(self) -> Any:
        """The video VAE, for its latent statistics; without one the latents are taken as normalised to mean 0 and std 1."""
        components = self.pipeline.components
        if components.video_vae is not None:
            return components.video_vae
        logger.warning("no video VAE is given: the upsampler takes mean 0 and std 1 for the latent statistics")
        channels = self.pipeline.geometry.video_channels
        return SimpleNamespace(latents_mean=torch.zeros(channels), latents_std=torch.ones(channels))
