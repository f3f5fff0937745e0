"""The LTX-2.3 two-stage generators: prompt and pictures in, video with sound out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltxkern.dispatch import served
from ltxkern.patch import patch
from ltxkern.patching.report import Report
from ltxkern.pipeline.files.found import FoundModel, geometry_from_configs
from ltxkern.pipeline.files.hub import ModelFiles
from ltxkern.pipeline.files.lora import LoRA, LoRAPhase, lora_phases
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.streams import clock_for, side_by_side
from ltxkern.pipeline.model.attention_choice import AttentionChoice, use_attention
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.model.decode import Tiling
from ltxkern.pipeline.model.fusions import FusionPolicy, use_fusions, use_side_by_side
from ltxkern.pipeline.model.text import PromptEmbeddings
from ltxkern.pipeline.parallel.by_branch import CFGParallel
from ltxkern.pipeline.planning.admission import Admission, admit_model
from ltxkern.pipeline.result import HQOutput
from ltxkern.pipeline.results.embedding_cache import EmbeddingCache
from ltxkern.pipeline.run.decoding import decode
from ltxkern.pipeline.run.denoising import DenoisingRun, StepCallback
from ltxkern.pipeline.run.presets import warn_if_unfit
from ltxkern.pipeline.run.progress import OnProgress, ProgressClock
from ltxkern.pipeline.run.prompts import PromptEncoder, open_embedding_cache
from ltxkern.pipeline.run.request import (
    DEFAULT_NEGATIVE_PROMPT,
    GenerationRequest,
    find_device,
    find_preset,
    require_strength,
)
from ltxkern.pipeline.sampling.guidance import CFGPolicy, MultiModalPolicy
from ltxkern.pipeline.sampling.latents import Geometry
from ltxkern.pipeline.work.facts import facts_of
from ltxkern.pipeline.work.folder import WorkFolder
from ltxkern.pipeline.work.kept import KeptWork

OUTPUT_TYPES = ("video", "latents", "stream")
SAMPLE_RATE = 48000
_REQUEST_FIELDS = {field.name for field in fields(GenerationRequest)}


class HQTwoStagePipeline:
    """Prompt (and pictures) to video with sound, by the published LTX-2.3 two-stage algorithm.

    Stage 1 denoises at half size with guidance, the latent is upsampled, stage 2 refines at full size with the distilled LoRA
    at its own strength, the VAEs and the vocoder decode. Build with `from_pretrained` or `from_components`.
    """

    def __init__(
        self,
        components: Components,
        *,
        device: torch.device | str = "cpu",
        preset: str = "hq",
        loras: Sequence[tuple[LoRA, float]] = (),
        distilled_lora: LoRA | None = None,
        distilled_strengths: tuple[float, float] | None = None,
        device_mode: str = "auto",
        attention: str | AttentionChoice | None = None,
        policy: str | FusionPolicy | None = None,
        audio_stream: bool = False,
        geometry: Geometry | None = None,
        pristine: ModelFiles | str | Path | None = None,
        embedding_cache: EmbeddingCache | None = None,
        keep_text_encoder: bool = False,
    ) -> None:
        self.components = components
        self.device = torch.device(device)
        self.preset = find_preset(preset)
        self.loras = list(loras)
        self.distilled_lora = distilled_lora
        self.distilled_strengths = distilled_strengths or self.preset.distilled_strengths
        self.manager = TwoStageDeviceManager(device_mode, device=self.device)
        config = components.config("transformer")
        self.attention = AttentionChoice.of(attention).require(self.device, components.dtype("transformer"), config)
        self.policy = FusionPolicy.of(policy)
        if self.policy.name == "exact":
            components.run_apart()
        # A stream of its own: on that of the manager sound would wait for weights on their way.
        own = audio_stream and self.device.type == "cuda"
        self._beside = partial(side_by_side, clock_for(self.device)) if own else None
        self.geometry = geometry or geometry_from_configs(config, components.config("audio_vae"))
        self.prompts = PromptEncoder(components, self.manager, self.device, embedding_cache, keep_text_encoder)
        self.denoiser_factory: Callable[..., Any] | None = None
        self._parallel: CFGParallel | None = None
        self._patched: list[Report] = []
        self._pristine = pristine
        self.model_facts: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | FoundModel,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        preset: str = "hq",
        device_mode: str = "auto",
        attention: str | None = None,
        policy: str | None = None,
        audio_stream: bool = False,
        loras: Sequence[str | Path | tuple[str | Path, float]] = (),
        distilled_lora: str | Path | None = None,
        distilled_strengths: tuple[float, float] | None = None,
        upsampler: str | Path | None = None,
        text_encoder: str | Path | None = None,
        embedding_cache: str | Path | bool = True,
        keep_text_encoder: bool = False,
        variant: str | None = None,
        **parts: str | Path | None,
    ) -> HQTwoStagePipeline:
        """Open a model: a built-in "demo" or "demo-random", an official single file, a diffusers folder, or a hub id.

        Args:
            path_or_id: "demo" (tiny, trained on moving shapes), "demo-random" (its pictures are noise), a path, a hub id, or what
                was found already.
            device: where to compute; None for the first CUDA device, else the CPU.
            dtype: of weights and activations; the vocoder stays fp32.
            preset: "hq", "two-stage", "one-stage", or for a distilled checkpoint "distilled", "one-stage-distilled".
            device_mode: "auto", "resident", "snapshot", "inplace" or "original"; see `TwoStageDeviceManager`.
            attention: kernel that computes attention, "auto" for the best of the card; None for LTXKERN_ATTENTION, else "auto".
            policy: of fused passes, "rounded" or "exact", see `FusionPolicy`; None for LTXKERN_POLICY. By "exact" the norms of VAEs
                and upsampler are not fused.
            audio_stream: on CUDA, run the sound's part of a transformer block on a stream beside the video's; the same bits.
            loras: user LoRA files with strengths (1.0 where none is given, negative ones too), merged before the distilled
                one in both stages; a file, a folder with one, or a hub name `owner/name[/file]`.
            distilled_lora: the distilled LoRA file, named alike; the demos bring their own.
            distilled_strengths: its strength in stage 1 and 2; None for the preset's (0.25, 0.5 in HQ).
            upsampler, text_encoder: files or folders of parts that do not lie with the model.
            embedding_cache: folder that keeps prompt embeddings between runs; True for the user's cache folder (never for
                a demo), False for none. A prompt found there needs no text encoder.
            keep_text_encoder: keep it in memory after encoding; otherwise it is let go and read again when needed.
            variant: of the weights in a diffusers folder, such as "fp16"; None for the plain ones.
            parts: transformer, video_vae, audio_vae, vocoder, connectors that do not lie with the model.
        Raises:
            CheckpointError: a file that is missing, truncated or does not fit; with keys and file.
            ValueError: unknown preset or mode, a strength that is not finite, or a negative one of the distilled LoRA.
        """
        chosen = find_preset(preset)
        place = find_device(device)
        strengths = distilled_strengths or chosen.distilled_strengths
        pairs = [(item, 1.0) if isinstance(item, (str, Path)) else (item[0], float(item[1])) for item in loras]
        wanted = [(str(path), strength, True) for path, strength in pairs]
        for name, strength, signed in [*wanted, *(("distilled LoRA", strength, False) for strength in strengths)]:
            require_strength(name, strength, signed=signed)
        model = FoundModel.of(path_or_id, upsampler=upsampler, text_encoder=text_encoder, variant=variant, **parts)
        if model is not path_or_id:  # who found it has checked it
            admission = Admission()
            files = [("loras", path) for path, _ in pairs]
            files += [] if distilled_lora is None else [("distilled_lora", distilled_lora)]
            admit_model(admission, model, stages=chosen.stages, loras=files, required=False)
            admission.close()
            warn_if_unfit(chosen, model, strengths)
        distilled: LoRA | None = None
        distilled_lora = distilled_lora or model.distilled_lora
        if distilled_lora is not None:
            distilled = LoRA.from_file(distilled_lora, model.transformer_shapes)
        elif model.is_random:
            from ltxkern.pipeline.files.demo import demo_distilled_lora

            distilled = demo_distilled_lora()
        elif chosen.stages == 2 and any(strengths):
            raise ValueError(
                f"the {chosen.name} pipeline needs the distilled LoRA: give distilled_lora=PATH, or distilled_strengths=(0, 0)"
            )
        return cls(
            model.components(dtype),
            device=place,
            preset=preset,
            loras=[(LoRA.from_file(path, model.transformer_shapes), strength) for path, strength in pairs],
            distilled_lora=distilled,
            distilled_strengths=strengths,
            device_mode=device_mode,
            attention=attention,
            policy=policy,
            audio_stream=audio_stream,
            geometry=model.geometry if model.is_here else None,
            pristine=None if model.is_random else model.files,
            embedding_cache=open_embedding_cache(embedding_cache, model, dtype),
            keep_text_encoder=keep_text_encoder,
        )

    @classmethod
    def from_components(
        cls,
        transformer: Any = None,
        upsampler: Any = None,
        video_vae: Any = None,
        audio_vae: Any = None,
        vocoder: Any = None,
        connectors: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> HQTwoStagePipeline:
        """Compose modules that are already loaded; any may be None when its stage is not run.

        Norms and activations of VAEs and upsampler are fused in place (`ltxkern.patch`) until `close`; not by policy "exact".

        Args:
            transformer, upsampler, video_vae, audio_vae, vocoder, connectors, text_encoder, tokenizer: the modules.
            settings: keyword arguments of the constructor, e.g. device, preset, loras, distilled_lora, geometry.
        """
        policy = FusionPolicy.of(settings.pop("policy", None))
        modules = [module for module in (upsampler, video_vae, audio_vae) if isinstance(module, torch.nn.Module)]
        fused = [patch(module, policy.name) for module in modules]
        components = Components(
            transformer=transformer,
            upsampler=upsampler,
            video_vae=video_vae,
            audio_vae=audio_vae,
            vocoder=vocoder,
            connectors=connectors,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        if "device" not in settings and transformer is not None:
            settings["device"] = next(transformer.parameters()).device
        pipeline = cls(components, policy=policy, **settings)
        pipeline._patched = fused
        return pipeline

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] | None = None,
        images: Sequence[Any] = (),
        seed: int | Sequence[int] = 10,
        height: int = 1088,
        width: int = 1920,
        num_frames: int = 121,
        frame_rate: float = 24.0,
        steps: int | None = None,
        **keywords: Any,
    ) -> HQOutput:
        """`generate` with a request made of keywords, in the pipeline's preset.

        Args:
            prompt, negative_prompt, images, seed, height, width, num_frames, frame_rate, steps: fields of `GenerationRequest`;
                a negative prompt of None takes `DEFAULT_NEGATIVE_PROMPT`.
            keywords: its other fields, and the keyword arguments of `generate`.
        """
        others = {name: keywords.pop(name) for name in _REQUEST_FIELDS & keywords.keys()}
        negative = DEFAULT_NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
        request = GenerationRequest(
            prompt, negative, images, self.preset, seed, height, width, num_frames, frame_rate, steps, **others
        )
        return self.generate(request, **keywords)

    @torch.no_grad()
    def generate(
        self,
        request: GenerationRequest,
        *,
        guidance_policy: type[CFGPolicy] = MultiModalPolicy,
        tiling: Tiling = "auto",
        embeddings: PromptEmbeddings | Sequence[Tensor] | None = None,
        negative_embeddings: PromptEmbeddings | Sequence[Tensor] | None = None,
        initial_noise: Sequence[Tensor] | None = None,
        sde_noise: Sequence[Mapping[str, Sequence[Tensor]]] | None = None,
        image_latents: Sequence[Sequence[Tensor]] | None = None,
        output_type: str = "video",
        callback: StepCallback | None = None,
        progress: OnProgress | None = None,
        work_dir: str | Path | WorkFolder | None = None,
    ) -> HQOutput:
        """Generate what a request asks for.

        Args:
            request: made for this pipeline's preset.
            guidance_policy: what stage 1 makes of the scales: which branches run and how they combine.
            tiling: of the video decoder; see `decode_video`.
            embeddings, negative_embeddings: contexts (video, audio) in place of encoded prompts.
            initial_noise: stage-1 video, stage-1 audio, stage-2 video, stage-2 audio noise (B, T, C) in place of seeded draws.
            sde_noise: per stage a dict of ready sampler noise; see `res2s_sample`.
            image_latents: per stage the normalised latents of the request's images, in place of encoding them.
            output_type: "video", "latents", or "stream" (video decoded while it is consumed, its first chunk at once).
            callback: called after each step with (stage, done, total, latents); the clean last evaluation counts as one. Beside the
                packed "video" and "audio" stand "video_x0" and "audio_x0", the last predictions of the clean ones.
            progress: called with a `ProgressEvent` wherever something advances.
            work_dir: folder that keeps what is done as it is done; the same call goes on there after any end, to the same bits. A
                `WorkFolder` stays open, and its owner says when the result is safe; None keeps nothing.
        Returns:
            `HQOutput`.
        Raises:
            ValueError, TypeError: a parameter that cannot be served, before anything is loaded.
            NonFiniteError: a stage ended in NaN or infinity; the message names it.

        Contract: exact against the published algorithm within rounding (5e-5 in fp32 over a whole run, golden data).
        Source: the LTX-2 two-stage HQ pipeline, version 1.2.0.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if request.preset != self.preset:
            raise ValueError(
                f"preset: the request is for pipeline {request.preset.name}, and this one was opened as "
                f"{self.preset.name}: use preset=pipeline.preset"
            )
        strengths = request.distilled_strengths or self.distilled_strengths
        replace(request, distilled_strengths=strengths).validate(self.geometry, check_files=image_latents is None)
        encodes_images = bool(request.images) and image_latents is None
        decodes, streamed = output_type != "latents", output_type == "stream"
        self.components.require(self.preset.stages, encodes_images, embeddings is None, decodes)
        facts: dict[str, Any] = {}
        if work_dir is not None:
            given = (embeddings, negative_embeddings, initial_noise, sde_noise, image_latents, guidance_policy, tiling)
            facts = facts_of(self, replace(request, distilled_strengths=strengths), given)
        with KeptWork.opened(work_dir, self.device, facts) as work:
            stages, report = request.stages(self.geometry), None if progress is None else ProgressClock(progress)
            run = DenoisingRun(self, request, stages, initial_noise, sde_noise, image_latents, callback, report, work)
            phases = lora_phases(self.loras, self.distilled_lora, strengths)[: len(stages)]
            guidance = request.guidance(self.geometry)
            policies = self.prompts.policies(
                request, guidance, guidance_policy, embeddings, negative_embeddings, report, work
            )
            stages[0] = replace(stages[0], branches=len(policies[0].branches))
            if self._parallel is not None:
                phases = phases[: self._parallel.stages(policies[: len(stages)])]
            with use_attention(self.attention), use_fusions(self.policy), use_side_by_side(self._beside):
                latents = run.latents(policies, phases)
            output = HQOutput(None, None, latents, request.frame_rate, SAMPLE_RATE, request.seed, stages)
            if decodes and (self._parallel is None or self._parallel.rank == 0):
                how: dict[str, Any] = {"streamed": streamed, "work": work}
                videos, audio = decode(self.components, self.manager, latents, tiling, report, **how)
                one = isinstance(request.prompt, str)
                output.video, output.audio = (videos[0], audio[0]) if one else (videos, audio)
        output.backends = {n: sorted(names) for n, names in (served() | {"attention": self.attention.served}).items()}
        return output

    def detach(self) -> None:
        """Give the transformer its pristine weights again; the next call takes them up."""
        if self.manager.is_attached:
            self.manager.close()

    def share_branches(self, parallel: CFGParallel) -> None:
        """Run the guidance branches of every later call on several ranks.

        Each rank makes the same calls. Results are on rank 0; the others leave after the last stage that they take part in, with
        that stage's latents and neither video nor audio.

        Args:
            parallel: the ranks; one rank changes nothing.
        Raises:
            ValueError: more ranks than attention heads where tokens are shared out too.
        """
        if parallel.size > 1:
            if parallel.sequence is not None:
                config = self.components.config("transformer") or {}
                parallel.sequence.require(heads=min(int(config[f"{of}num_attention_heads"]) for of in ("", "audio_")))
            self._parallel = parallel
            self.denoiser_factory = parallel.denoiser

    def attach(self, request: GenerationRequest, phases: Sequence[LoRAPhase]) -> None:
        """Bring the transformer to the device, in the first of these phases."""
        if not self.manager.is_attached:
            transformer = self.components.transformer
            assert transformer is not None
            self.manager.attach(transformer, pristine=self._pristine)
        beside = 0
        if self.device.type == "cuda" and self.manager.mode is None:
            # "auto" leaves room for what a run needs beside the transformer's weights.
            from ltxkern.pipeline.planning.plan import plan

            beside = plan(self.components, request, device=self.device, geometry=self.geometry).beside_transformer
        self.manager.prepare(*phases, activation_bytes=beside)

    def close(self) -> None:
        """Release what is held, and give back what was given.

        A transformer from files is let go of: the next call reads it again. One that was given has its pristine weights
        again, where it was, and given modules have their plain norms.
        """
        is_ours = self.components.reloadable("transformer")
        self.manager.close(discard=is_ours)
        if is_ours:
            self.components.release("transformer")
        for patched in self._patched:
            patched.undo()

    def __enter__(self) -> HQTwoStagePipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
