"""A model that was looked up once, for the check of a request, the planner and the loader alike; nothing of it is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ltxkern.pipeline.files.checkpoint import (
    ModelFiles,
    component_config,
    component_shapes,
    find_model,
    load_components,
)
from ltxkern.pipeline.files.hub import DEMO, RANDOM, require_parts
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.sampling.latents import Geometry


@dataclass(frozen=True)
class FoundModel:
    """What a name stands for.

    Args:
        name: "demo", "demo-random", an official file, a diffusers folder or a hub id, as it was given.
        own: where the model lies; None for "demo-random", and for a hub id, which only `files` downloads.
        upsampler, text_encoder: files, folders or hub ids of parts that do not lie with it.
        parts: those of the other components, by name.
        variant: of the weights in a diffusers folder.
    """

    name: str
    own: ModelFiles | None = None
    upsampler: str | Path | None = None
    text_encoder: str | Path | None = None
    parts: Mapping[str, str | Path] = field(default_factory=dict)
    variant: str | None = None

    @classmethod
    def of(
        cls,
        model: FoundModel | str | Path,
        *,
        upsampler: str | Path | None = None,
        text_encoder: str | Path | None = None,
        variant: str | None = None,
        **parts: str | Path | None,
    ) -> FoundModel:
        """Look a name up, from names and headers alone; one that was found already is handed through.

        Args:
            model: what `find_model` takes, "demo-random", or what was found; parts in place of a demo make a model of their own.
            upsampler, text_encoder, variant, parts: as for `find_model`.

        Raises:
            CheckpointError: the path does not exist, or holds no usable model.
        """
        if isinstance(model, FoundModel):
            return model
        name = str(model)
        require_parts(parts)
        given = {part: path for part, path in parts.items() if path is not None}
        if name in (DEMO, RANDOM) and given:
            here = ModelFiles(variant=variant).with_parts(None, None, **given)
            return cls(str(next(iter(here.parts.values()))), here, upsampler, text_encoder, {}, variant)
        on_hub = "/" in name and not name.endswith(".safetensors") and not Path(os.path.expanduser(model)).exists()
        own = None if name == RANDOM or on_hub else find_model(model, variant=variant, **given)
        return cls(name, own, upsampler, text_encoder, given, variant)

    @property
    def is_demo(self) -> bool:
        """Whether it is built in, and brings all its parts."""
        return self.name in (DEMO, RANDOM)

    @property
    def is_random(self) -> bool:
        """Whether it is the built-in model of random weights, which has no files."""
        return self.name == RANDOM

    @property
    def distilled_lora(self) -> Path | None:
        """The file of the distilled LoRA that goes with it; only the trained demo has one."""
        return None if self.own is None else self.own.distilled_lora

    @property
    def is_here(self) -> bool:
        """Whether its configurations can be read without a download."""
        return self.is_random or self.own is not None

    @property
    def path(self) -> Path | None:
        """The model's own file or folder; None for what is built in and for a hub id."""
        path = Path(os.path.expanduser(self.name))
        return None if self.is_demo or not path.exists() else path

    @cached_property
    def files(self) -> ModelFiles:
        """Where all components lie; downloads what is not on this machine. The random demo has none."""
        own = self.own or find_model(self.name, variant=self.variant, **self.parts)
        return own.with_parts(self.upsampler, self.text_encoder)

    @cached_property
    def geometry(self) -> Geometry:
        """How latents relate to pixels; LTX-2.3's where the model is not here."""
        return geometry_from_configs(self.config("transformer"), self.config("audio_vae"))

    @cached_property
    def transformer_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the transformer's parameters by diffusers name, from headers; downloads what is not on this machine."""
        if self.is_random:
            from ltxkern.pipeline.files.demo import DEMO_CONFIGS
            from ltxkern.pipeline.model.shapes import expected_shapes

            return expected_shapes("transformer", DEMO_CONFIGS["transformer"])
        return component_shapes(self.files, "transformer")

    def config(self, component: str) -> Mapping[str, Any] | None:
        """Constructor arguments of a component; None where the model is not here."""
        if self.is_random:
            from ltxkern.pipeline.files.demo import DEMO_CONFIGS

            return DEMO_CONFIGS[component]
        return None if self.own is None else component_config(self.own, component)

    def components(self, dtype: torch.dtype) -> Components:
        """The components, each loaded when it is first read."""
        return load_components(RANDOM if self.is_random else self.files, dtype=dtype)


def geometry_from_configs(transformer: Mapping[str, Any] | None, audio_vae: Mapping[str, Any] | None) -> Geometry:
    """Geometry that the modules' configurations describe; LTX-2.3's where one is not given."""
    geometry = Geometry()
    if transformer is not None:
        ratios = transformer.get("vae_scale_factors", (geometry.temporal_ratio, geometry.spatial_ratio))
        geometry = replace(
            geometry,
            temporal_ratio=ratios[0],
            spatial_ratio=ratios[1],
            video_channels=transformer["in_channels"],
            audio_channels=max(1, transformer["audio_in_channels"] // geometry.mel_bins),
            blocks=transformer["num_layers"],
        )
    if audio_vae is not None:
        # The audio VAE halves the mel axis twice.
        geometry = replace(geometry, audio_channels=audio_vae["latent_channels"], mel_bins=audio_vae["mel_bins"] // 4)
    return geometry
