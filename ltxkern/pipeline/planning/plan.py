"""Memory and forwards of a request before any weight is loaded, checked against what is free, with the nearest that fits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ltxkern.pipeline.files.found import FoundModel
from ltxkern.pipeline.files.lora import LoRA
from ltxkern.pipeline.memory.host_memory import device_available, host_available
from ltxkern.pipeline.memory.modes import MODES, OFFLOADED, ModeNeeds, gib, needs_of
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.planning import activations as _sizes
from ltxkern.pipeline.planning.activations import Activations
from ltxkern.pipeline.planning.weights import ModelSizes, model_sizes
from ltxkern.pipeline.run.request import GenerationRequest
from ltxkern.pipeline.sampling.latents import Geometry

logger = logging.getLogger(__name__)

# Context, libraries' workspaces and what the allocator cannot hand out again; a round figure, not a measurement.
CUDA_OVERHEAD = 1 << 30


@dataclass(frozen=True)
class StageMemory:
    """One part of a run: the components it reads besides the transformer, its activations, its forwards."""

    name: str
    components: tuple[str, ...]
    activations: Activations
    forwards: int = 0


@dataclass(frozen=True)
class Plan:
    """What a request needs.

    Args:
        request: what is asked for.
        sizes: of the model.
        stages: in order.
        device: where it would run.
        mode: asked for; "auto" takes the first that fits.
        device_free, host_free: bytes that can be taken.
        kept: bytes of latents and contexts kept through the run.
        keeps_source: pristine weights stay on the host where a mode needs them.
    """

    request: GenerationRequest
    sizes: ModelSizes
    stages: tuple[StageMemory, ...]
    device: torch.device
    mode: str
    device_free: int
    host_free: int
    kept: int
    keeps_source: bool = True

    @property
    def unified(self) -> bool:
        """Device and host are one memory."""
        return self.device.type == "cpu"

    @property
    def needs(self) -> Mapping[str, ModeNeeds]:
        """Bytes of the transformer's weights in every mode."""
        return needs_of(self.sizes.transformer, keeps_source=self.keeps_source)

    @property
    def forwards(self) -> int:
        """Transformer forwards of the run."""
        return sum(stage.forwards for stage in self.stages)

    def stage_bytes(self, stage: StageMemory, mode: str) -> int:
        """Peak bytes on the device in one part of a run; on a CPU of everything."""
        need = self.needs[mode]
        if self.unified:
            others = sum(nbytes for name, nbytes in self.sizes.nbytes.items() if name != "transformer")
            return need.device_bytes + need.host_bytes + others + self.kept + stage.activations.device
        return need.device_bytes + self._beside(stage)

    @property
    def beside_transformer(self) -> int:
        """Peak bytes on a GPU of everything but the transformer's weights."""
        return max(map(self._beside, self.stages))

    def _beside(self, stage: StageMemory) -> int:
        components = sum(self.sizes.nbytes.get(name, 0) for name in stage.components)
        return components + self.kept + stage.activations.device + CUDA_OVERHEAD

    def peak_bytes(self, mode: str | None = None) -> int:
        """Peak bytes on the device over the run; on a CPU of everything."""
        chosen = mode or self.chosen_mode
        return max(self.stage_bytes(stage, chosen) for stage in self.stages)

    def host_bytes(self, mode: str | None = None) -> int:
        """Bytes on the host: what the mode keeps there, the components between their turns, finished frames."""
        if self.unified:
            return self.peak_bytes(mode)
        components = sum(nbytes for name, nbytes in self.sizes.nbytes.items() if name != "transformer")
        results = max(stage.activations.host for stage in self.stages)
        return self.needs[mode or self.chosen_mode].host_bytes + components + results

    def fits(self, mode: str) -> bool:
        """Whether the run fits in this mode; "original" may leave its blocks on the host."""
        if mode == "original" and not self.unified and self.fits(OFFLOADED):
            return True
        return self.peak_bytes(mode) <= self.device_free and self.host_bytes(mode) <= self.host_free

    @property
    def chosen_mode(self) -> str:
        """The mode asked for; with "auto" the first that fits, "original" where none does."""
        if self.mode != "auto":
            return self.mode
        return next((mode for mode in MODES if self.fits(mode)), "original")

    def check(self) -> None:
        """Refuses a request that cannot fit.

        Raises:
            ValueError: what is needed and free, and the nearest mode, resolution or number of frames that fits.
        """
        if self.fits(self.chosen_mode):
            return
        mode = self.chosen_mode
        needed, free = self.peak_bytes(mode), self.device_free
        where = "memory" if self.unified else "device memory"
        if needed <= free:
            needed, free, where = self.host_bytes(mode), self.host_free, "host memory"
        worst = max(self.stages, key=lambda stage: self.stage_bytes(stage, mode)).name
        size = f"{self.request.height}x{self.request.width}, {self.request.num_frames} frames"
        raise ValueError(
            f"{size} in device mode {mode} needs {gib(needed)} of {where} at its peak ({worst}), "
            f"and {gib(free)} are free: {' or '.join(self.advice())}"
        )

    def advice(self) -> list[str]:
        """What fits: another mode, a smaller picture, fewer frames; or that nothing does."""
        found = [f'use device mode "{mode}"' for mode in MODES if mode != self.chosen_mode and self.fits(mode)][:1]
        tracer = _Tracer(self.sizes, unified=self.unified)
        smaller = _largest(self, tracer, list(_smaller_pictures(self)))
        if smaller is not None:
            found.append(f"use {smaller.height}x{smaller.width}")
        shorter = _largest(self, tracer, list(_fewer_frames(self)))
        if shorter is not None:
            found.append(f"use {shorter.num_frames} frames")
        if found:
            return found
        weights = min(need.device_bytes for need in self.needs.values())
        return [f"nothing smaller fits, the transformer's weights alone take {gib(weights)}; use a larger device"]

    def table(self) -> Any:
        """A rich Table: peak per stage and mode, host bytes, forwards."""
        from rich.table import Table

        title = f"{self.request.height}x{self.request.width}, {self.request.num_frames} frames on {self.device}"
        table = Table(title=title, caption=self._caption())
        table.add_column("stage")
        for heading in ("components", "activations", "forwards", *MODES):
            table.add_column(heading, justify="right")
        for stage in self.stages:
            components = sum(self.sizes.nbytes.get(name, 0) for name in stage.components)
            table.add_row(
                stage.name,
                gib(components),
                gib(stage.activations.device),
                str(stage.forwards or ""),
                *(gib(self.stage_bytes(stage, mode)) for mode in MODES),
            )
        table.add_section()
        table.add_row("peak", "", "", str(self.forwards), *(gib(self.peak_bytes(mode)) for mode in MODES))
        table.add_row("host", "", "", "", *(gib(self.host_bytes(mode)) for mode in MODES))
        table.add_row("fits", "", "", "", *("yes" if self.fits(mode) else "no" for mode in MODES))
        return table

    def _caption(self) -> str:
        weights = ", ".join(f"{name} {gib(nbytes)}" for name, nbytes in self.sizes.nbytes.items())
        free = f"{gib(self.device_free)} free on {self.device}, {gib(self.host_free)} on the host"
        return f"device mode {self.chosen_mode}; {free}; weights: {weights}"


def plan(
    model: str | Path | FoundModel | Components,
    request: GenerationRequest,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    mode: str = "auto",
    device_free: int | None = None,
    host_free: int | None = None,
    loras: Sequence[str | Path | LoRA] | None = None,
    upsampler: str | Path | None = None,
    text_encoder: str | Path | None = None,
    geometry: Geometry | None = None,
) -> Plan:
    """What a request needs, from configurations and headers alone.

    Weights are counted; activations come from running the real modules on the meta device, in seconds.

    Args:
        model: "demo", an official file, a diffusers folder or hub id, one that was found, or components.
        request: validated here against the model's geometry.
        device: where it would run.
        dtype: of the model.
        mode: a device mode, or "auto".
        device_free, host_free: bytes that can be taken; measured where None.
        loras: files or LoRAs of the phases; None: one of rank 384 over every Linear.
        upsampler, text_encoder: of a model that is named; as for `find_model`.
        geometry: of components whose configurations do not say it.

    Raises:
        ValueError: the request or the mode is not legal. That it does not fit is said by `Plan.check`.
        CheckpointError: the model is not usable.

    Numerical contract: within 10 % of the measured peak (demo model, CPU).
    """
    if mode not in ("auto", *MODES):
        raise ValueError(f"mode must be one of auto, {', '.join(MODES)}, got {mode!r}")
    place = torch.device(device)
    if not isinstance(model, Components):
        model = FoundModel.of(model, upsampler=upsampler, text_encoder=text_encoder)
    sizes = model_sizes(model, dtype=dtype, loras=loras, geometry=geometry)
    request.validate(sizes.geometry, check_files=False)
    host = host_available() if host_free is None else host_free
    free = (host if place.type == "cpu" else device_available(place)) if device_free is None else device_free
    return Plan(
        request,
        sizes,
        _Tracer(sizes, unified=place.type == "cpu").stages(request),
        place,
        mode,
        free,
        free if place.type == "cpu" else host,
        _sizes.latent_bytes(sizes, request),
        # A model on disk is its own pristine source.
        keeps_source=isinstance(model, Components) or model.is_demo,
    )


_Trace = Callable[[], Activations]
_Part = tuple[str, tuple[str, ...], _Trace, int]


class _Tracer:
    """The parts of runs of one model; a part whose shapes came up before is not traced again."""

    def __init__(self, sizes: ModelSizes, *, unified: bool) -> None:
        self._sizes = sizes
        self._unified = unified
        self._known: dict[tuple[Any, ...], Activations] = {}

    def _once(self, key: tuple[Any, ...], trace: Callable[..., Activations], *args: Any, **kwargs: Any) -> _Trace:
        def traced() -> Activations:
            if key not in self._known:
                self._known[key] = trace(*args, **kwargs)
            return self._known[key]

        return traced

    def stages(self, request: GenerationRequest, names: Collection[str] | None = None) -> tuple[StageMemory, ...]:
        """The parts of a run in order; with `names` only these."""
        return tuple(
            StageMemory(name, components, trace(), forwards)
            for name, components, trace, forwards in self._parts(request)
            if names is None or name in names
        )

    def _parts(self, request: GenerationRequest) -> Iterator[_Part]:
        sizes, present, unified = self._sizes, self._sizes.nbytes, self._unified
        stages = request.stages(sizes.geometry)
        last = stages[-1]
        if "text_encoder" in present and "connectors" in present:
            text = self._once(("text", request.batch), _sizes.text_activations, sizes, 2 * request.batch)
            yield "text", ("text_encoder", "connectors"), text, 0
        for index, stage in enumerate(stages):
            if request.images and "video_vae" in present:
                side = (stage.height, stage.width)
                picture = self._once(("image", *side), _sizes.encode_activations, sizes, *side, unified=unified)
                yield f"images for {stage.name}", ("video_vae",), picture, 0
            if index and "upsampler" in present:
                source = stages[0]
                larger = self._once(
                    ("upsampling", source.video), _sizes.upsample_activations, sizes, source, unified=unified
                )
                yield "upsampling", ("upsampler",), larger, 0
            key = (stage.name, stage.video, stage.audio)
            denoising = self._once(key, _sizes.stage_activations, sizes, request, stage, index == 0)
            yield stage.name, (), denoising, stage.forwards
        if "audio_vae" in present and "vocoder" in present:
            audio = self._once(("audio", last.audio), _sizes.audio_activations, sizes, last, unified=unified)
            yield "audio decoding", ("audio_vae", "vocoder"), audio, 0
        if "video_vae" in present:
            video = self._once(("video", last.video), _sizes.video_activations, sizes, request, last, unified=unified)
            yield "video decoding", ("video_vae",), video, 0


def _smaller_pictures(plan: Plan) -> Iterator[GenerationRequest]:
    """Requests of about the same aspect ratio, largest first."""
    request = plan.request
    multiple = plan.sizes.geometry.spatial_ratio * request.preset.stages
    longer, shorter = max(request.height, request.width), min(request.height, request.width)
    for side in range(longer - multiple, multiple - 1, -multiple):
        other = max(multiple, round(side * shorter / longer / multiple) * multiple)
        height, width = (side, other) if request.height >= request.width else (other, side)
        yield replace(request, height=height, width=width)


def _fewer_frames(plan: Plan) -> Iterator[GenerationRequest]:
    """Requests with fewer frames, longest first."""
    step = plan.sizes.geometry.temporal_ratio
    for frames in range(plan.request.num_frames - step, step, -step):
        yield replace(plan.request, num_frames=frames)


def _largest(plan: Plan, tracer: _Tracer, candidates: Sequence[GenerationRequest]) -> GenerationRequest | None:
    """The first candidate that fits, by bisection: a smaller one needs no more in any part.

    So only the parts that do not fit now are traced, and the last one, which may fill the host.
    """
    mode = plan.chosen_mode
    mode = OFFLOADED if mode == "original" and not plan.unified else mode
    stages = [stage for stage in plan.stages if plan.stage_bytes(stage, mode) > plan.device_free]
    names = {stage.name for stage in (*stages, plan.stages[-1])}
    idle = [replace(stage, activations=Activations(0)) for stage in stages]
    if any(plan.stage_bytes(stage, mode) > plan.device_free for stage in idle):
        return None
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        request = candidates[middle]
        kept = _sizes.latent_bytes(plan.sizes, request)
        smaller = replace(plan, request=request, stages=tracer.stages(request, names), kept=kept)
        if smaller.fits(mode):
            high = middle
        else:
            low = middle + 1
    return candidates[low] if low < len(candidates) else None
