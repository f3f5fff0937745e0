"""Writes the trained parts as the official files: one for the model, and the upsampler, the LoRA and the text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltxkern.pipeline.files.hub import DEMO_NAMES
from ltxkern.pipeline.files.official_names import official_name
from tools.demo_model.audio import AudioVAE, Vocoder
from tools.demo_model.configuration import SECTIONS, UPSAMPLER, plain
from tools.demo_model.latents import Statistics, keep_statistics, statistics
from tools.demo_model.lora import DistilledLora, Factors
from tools.demo_model.text import text_encoder, tokenizer
from tools.demo_model.training import Part, load_modules, save_modules
from tools.demo_model.transformer import Model, Transformer
from tools.demo_model.upsampler import Upsampler
from tools.demo_model.video_vae import VideoVAE

MODEL, UPSCALER, LORA, TEXT = DEMO_NAMES
MOST_BYTES = 12_000_000


class Trained:
    """All parts; with fresh weights until they are loaded."""

    def __init__(self) -> None:
        self.model = Model()
        self.video_vae: Any = plain("video_vae")
        self.audio_vae: Any = plain("audio_vae")
        self.vocoder: Any = plain("vocoder")
        self.upsampler: Any = plain("upsampler")
        self.factors = Factors(self.model.transformer)

    @classmethod
    def load(cls, folder: Path, *, lora: bool = True) -> Trained:
        """The parts as a training left them; the LoRA too, or one that changes nothing."""
        made = cls()
        for part, modules in made._checkpoints().items():
            if lora or part is not DistilledLora:
                load_modules(folder, part.name, modules)
        made.set_statistics(statistics(folder))
        return made

    @classmethod
    def read(cls, files: Path) -> Trained:
        """The parts as `write` left them, but for the LoRA; the audio encoder, which no file holds, has fresh weights."""
        made = cls()
        tensors = load_file(files / MODEL)
        for component, module in made._parts().items():
            names = {name: official_name(component, name) for name in module.state_dict()}
            missing, _ = module.load_state_dict(
                {name: tensors[key] for name, key in names.items() if key in tensors}, strict=False
            )
            if any(_is_kept(component, name) for name in missing):
                raise ValueError(f"{files / MODEL} lacks weights of the {component}: {missing}")
        made.upsampler.load_state_dict(load_file(files / UPSCALER))
        return made

    def statistics(self) -> Statistics:
        """What the VAEs normalise latents with."""
        buffers = ((vae.latents_mean, vae.latents_std) for vae in (self.video_vae, self.audio_vae))
        return Statistics(*(tensor.float() for pair in buffers for tensor in pair))

    def keep_checkpoints(self, folder: Path) -> None:
        """Leaves all parts but the LoRA in a folder as a training does, so that the LoRA can be trained anew."""
        folder.mkdir(parents=True, exist_ok=True)
        keep_statistics(folder, self.statistics())
        for part, modules in self._checkpoints().items():
            if part is not DistilledLora:
                save_modules(folder, part.name, modules, 0 if part is AudioVAE else part.steps)

    def set_statistics(self, values: Statistics) -> None:
        """Fills the buffers that the VAEs normalise latents with."""
        self.video_vae.latents_mean.copy_(values.video_mean)
        self.video_vae.latents_std.copy_(values.video_std)
        self.audio_vae.latents_mean.copy_(values.audio_mean)
        self.audio_vae.latents_std.copy_(values.audio_std)

    def _parts(self) -> dict[str, nn.Module]:
        """What the model's file holds, by component."""
        return {
            "transformer": self.model.transformer,
            "connectors": self.model.connectors,
            "video_vae": self.video_vae,
            "audio_vae": self.audio_vae,
            "vocoder": self.vocoder,
        }

    def _checkpoints(self) -> dict[type[Part], dict[str, nn.Module]]:
        return {
            VideoVAE: {"video_vae": self.video_vae},
            AudioVAE: {"audio_vae": self.audio_vae},
            Vocoder: {"vocoder": self.vocoder},
            Upsampler: {"upsampler": self.upsampler},
            Transformer: {"model": self.model},
            DistilledLora: {"factors": self.factors},
        }

    def write(self, target: Path) -> None:
        """Writes the files in bf16.

        Raises:
            ValueError: the model's file is larger than it may be.
        """
        tensors = {
            official_name(component, name): tensor
            for component, module in self._parts().items()
            for name, tensor in module.state_dict().items()
            if _is_kept(component, name)
        }
        target.mkdir(parents=True, exist_ok=True)
        _write(target / MODEL, tensors, SECTIONS)
        _write(target / UPSCALER, self.upsampler.state_dict(), UPSAMPLER)
        _write(target / LORA, self.factors.official(), None)
        text_encoder().bfloat16().save_pretrained(target / TEXT)
        tokenizer().save_pretrained(target / TEXT)
        size = (target / MODEL).stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"{MODEL} has {size} bytes: expected at most {MOST_BYTES}")


def _is_kept(component: str, name: str) -> bool:
    """Whether the model's file holds a weight. Nothing encodes sound: the audio encoder was for training."""
    return not (component == "audio_vae" and name.startswith("encoder.")) and not (
        component == "vocoder" and name.startswith("resampler.")
    )


def _write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> None:
    metadata = {"model_version": "2.3.0"}
    if config is not None:
        metadata["config"] = json.dumps(config)
    save_file(
        {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}, path, metadata
    )
