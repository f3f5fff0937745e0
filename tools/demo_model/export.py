"""Writes the trained parts as the official files: one for the model, and the upsampler, the LoRA and the text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ltxkern.pipeline.files.hub import DEMO_NAMES
from ltxkern.pipeline.files.official_names import official_name
from tools.demo_model.audio import AudioVAE, Vocoder
from tools.demo_model.configuration import SECTIONS, UPSAMPLER, plain
from tools.demo_model.latents import Statistics, statistics
from tools.demo_model.lora import DistilledLora, Factors
from tools.demo_model.text import text_encoder, tokenizer
from tools.demo_model.training import load_modules
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
    def load(cls, folder: Path) -> Trained:
        """The parts as a training left them."""
        made = cls()
        for name, modules in (
            (VideoVAE.name, {"video_vae": made.video_vae}),
            (AudioVAE.name, {"audio_vae": made.audio_vae}),
            (Vocoder.name, {"vocoder": made.vocoder}),
            (Upsampler.name, {"upsampler": made.upsampler}),
            (Transformer.name, {"model": made.model}),
            (DistilledLora.name, {"factors": made.factors}),
        ):
            load_modules(folder, name, modules)
        made.set_statistics(statistics(folder))
        return made

    def set_statistics(self, values: Statistics) -> None:
        """Fills the buffers that the VAEs normalise latents with."""
        self.video_vae.latents_mean.copy_(values.video_mean)
        self.video_vae.latents_std.copy_(values.video_std)
        self.audio_vae.latents_mean.copy_(values.audio_mean)
        self.audio_vae.latents_std.copy_(values.audio_std)

    def write(self, target: Path) -> None:
        """Writes the files in bf16.

        Raises:
            ValueError: the model's file is larger than it may be.
        """
        parts: dict[str, nn.Module] = {
            "transformer": self.model.transformer,
            "connectors": self.model.connectors,
            "video_vae": self.video_vae,
            "audio_vae": self.audio_vae,
            "vocoder": self.vocoder,
        }
        tensors = {
            official_name(component, name): tensor
            for component, module in parts.items()
            for name, tensor in module.state_dict().items()
            # Nothing encodes sound: the audio encoder was for training.
            if not (component == "audio_vae" and name.startswith("encoder."))
            and not (component == "vocoder" and name.startswith("resampler."))
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


def _write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> None:
    metadata = {"model_version": "2.3.0"}
    if config is not None:
        metadata["config"] = json.dumps(config)
    save_file(
        {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}, path, metadata
    )
