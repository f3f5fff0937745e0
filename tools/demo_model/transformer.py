"""Trains the transformer and the text connectors by flow matching, at both sizes and with all that guidance leaves out."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltxkern.pipeline.model.components import build
from ltxkern.pipeline.model.inputs import Batch, ModalityTensors, Perturbation
from ltxkern.pipeline.sampling.latents import (
    AudioLatentShape,
    VideoLatentShape,
    audio_positions,
    patchify,
    video_positions,
)
from tools.demo_model.audio import FRAME_RATE
from tools.demo_model.configuration import CONFIGS
from tools.demo_model.latents import load, statistics, stored
from tools.demo_model.muon import Muon
from tools.demo_model.prompts import plain_prompt, write_prompt
from tools.demo_model.text import DROPPED, Encoder, with_filler, without_meaning
from tools.demo_model.training import Part
from tools.demo_model.world import Scene

SIGMA_SHIFT = 3.0
ISOLATED, SKIPPED, FIRST_FRAME = 0.15, 0.05, 0.15
# Rows of the modulation tables that are gates of residuals.
_GATES = {"scale_shift_table": (2, 5, 8), "audio_scale_shift_table": (2, 5, 8)}
_CROSS_GATES = ("video_a2v_cross_attn_scale_shift_table", "audio_a2v_cross_attn_scale_shift_table")


def start_open(transformer: Any) -> None:
    """Gates of residuals start open and the output at zero: closed gates learn nothing."""
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            for name, rows in _GATES.items():
                table = getattr(block, name)
                table.zero_()
                table[list(rows)] = 1.0
            for name in _CROSS_GATES:
                table = getattr(block, name)
                table.zero_()
                table[4] = 0.5
        for name in ("scale_shift_table", "audio_scale_shift_table"):
            getattr(transformer, name).zero_()
        for projection in (transformer.proj_out, transformer.audio_proj_out):
            projection.weight.zero_()
            projection.bias.zero_()


class Clean(NamedTuple):
    """Normalised packed latents of some scenes: video (B, T, C), audio (B, Ta, Ca), and the grid of the video."""

    video: Tensor
    audio: Tensor
    grid: VideoLatentShape
    scenes: list[Scene]


class LatentScenes:
    """All encoded scenes in memory, as batches of normalised tokens."""

    def __init__(self, folder: Path, *, test: bool = False) -> None:
        numbers = stored(folder)
        files = [load(folder, number) for number in (numbers[:1] if test else numbers[1:])]
        self.statistics = statistics(folder)
        self.scenes = [scene for latents in files for scene in latents.scenes]
        self.half = torch.cat([latents.half for latents in files])
        self.audio = torch.cat([latents.audio for latents in files])
        self.full = torch.cat([latents.full for latents in files if latents.full is not None])
        sizes = [len(latents.scenes) for latents in files]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self.with_full = [
            start + place
            for latents, start, size in zip(files, starts, sizes, strict=True)
            if latents.full is not None
            for place in range(size)
        ]

    def batch(self, chosen: list[int], *, full: bool = False) -> Clean:
        """Scenes by number; with `full` numbers count those that have the full size."""
        scenes = [self.with_full[index] for index in chosen] if full else chosen
        video = self.statistics.video((self.full if full else self.half)[chosen])
        frames, height, width = video.shape[2:]
        audio = self.statistics.audio(patchify(self.audio[scenes]))
        grid = VideoLatentShape(frames, height, width, video.shape[1], len(chosen))
        return Clean(patchify(video), audio, grid, [self.scenes[index] for index in scenes])


class Model(nn.Module):
    """Connectors and transformer as one: prompts and noisy tokens to velocities."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer: Any = build("transformer", CONFIGS["transformer"], device="cpu")
        self.connectors: Any = build("connectors", CONFIGS["connectors"], device="cpu")
        self.requires_grad_(True)
        start_open(self.transformer)

    def contexts(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        video, audio, _ = self.connectors(hidden, mask)
        return video, audio

    def forward(
        self,
        noisy: tuple[Tensor, Tensor],
        sigma: Tensor,
        grid: VideoLatentShape,
        contexts: tuple[Tensor, Tensor],
        perturbation: Perturbation = Perturbation(),  # noqa: B008
        first_frame: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Velocities (video, audio) of noisy tokens at sigmas (B,); with `first_frame` those of the first frame are clean."""
        video, audio = noisy
        scaled = sigma * self.transformer.config.timestep_scale_multiplier
        timestep, rows = scaled[:, None], None
        if first_frame:
            timestep = torch.stack([scaled, torch.zeros_like(scaled)], 1)
            rows = (torch.arange(video.shape[1]) < grid.height * grid.width).long()
            rows = rows + 2 * torch.arange(len(sigma))[:, None]
        sound = AudioLatentShape(audio.shape[1], 1, audio.shape[2], len(sigma))
        return self.transformer(
            ModalityTensors(video, timestep, scaled, video_positions(grid, FRAME_RATE), (contexts[0],), rows),
            ModalityTensors(audio, scaled[:, None], scaled, audio_positions(sound), (contexts[1],)),
            (Batch((perturbation,)),),
        )


def draw_sigmas(draws: Random, count: int) -> Tensor:
    """Noise levels from 0 to 1, evenly on a shifted scale: most of a clip is decided where noise prevails."""
    even = torch.tensor([draws.uniform(0.001, 1.0) for _ in range(count)])
    return SIGMA_SHIFT * even / (1 + (SIGMA_SHIFT - 1) * even)


def mix(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    share = sigma.view(-1, 1, 1)
    return clean * (1 - share) + noise * share


class Transformer(Part):
    """Transformer and connectors together."""

    name = "transformer"
    steps = 7000
    decay_share = 0.5
    batch, full_batch = 16, 4
    full_every = 3

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = Model()
        self.modules = {"model": self.model}
        self.optimiser = Muon(self.parameters().items(), 3e-3, vector_lr=2e-3, tables=("table", "registers"))
        self.encoder = Encoder()
        self.data, self.test = LatentScenes(folder), LatentScenes(folder, test=True)

    def losses(self, draws: Random, step: int) -> dict[str, Tensor]:
        full = step % self.full_every == self.full_every - 1
        count, most = (self.full_batch, len(self.data.with_full)) if full else (self.batch, len(self.data.scenes))
        clean = self.data.batch([draws.randrange(most) for _ in range(count)], full=full)
        prompts = [
            without_meaning(draws) if draws.random() < DROPPED else with_filler(write_prompt(scene, draws), draws)
            for scene in clean.scenes
        ]
        contexts = self.model.contexts(*self.encoder(prompts))
        sigma = draw_sigmas(draws, count)
        kind = draws.random()
        perturbation = Perturbation()
        if kind < ISOLATED:
            perturbation = Perturbation(disable_a2v_cross_attn=True, disable_v2a_cross_attn=True)
        elif kind < ISOLATED + SKIPPED:
            block = (draws.randrange(len(self.model.transformer.transformer_blocks)),)
            perturbation = Perturbation(skip_video_self_attn_blocks=block, skip_audio_self_attn_blocks=block)
        first_frame = kind > 1 - FIRST_FRAME
        noise = torch.randn_like(clean.video), torch.randn_like(clean.audio)
        noisy = mix(clean.video, noise[0], sigma), mix(clean.audio, noise[1], sigma)
        given = clean.grid.height * clean.grid.width if first_frame else 0
        noisy[0][:, :given] = clean.video[:, :given]
        video, audio = self.model(noisy, sigma, clean.grid, contexts, perturbation, first_frame)
        wrong = (video - (noise[0] - clean.video))[:, given:]
        return {
            ("full" if full else "half"): wrong.square().mean(),
            "audio": (audio - (noise[1] - clean.audio)).square().mean(),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean squared errors of clean latents as predicted at some sigmas; a latent's variance is the square of `SPREAD`.

        "another" is with the prompts of other scenes: as much greater as the prompt counts.
        """
        figures = {}
        for name, full, level in (
            ("half", False, 1.0),
            ("another", False, 1.0),
            ("half", False, 0.95),
            ("half", False, 0.7),
            ("half", False, 0.3),
            ("full", True, 0.909375),
            ("full", True, 0.421875),
        ):
            clean = self.test.batch(list(range(24)), full=full)
            prompts = [plain_prompt(scene) for scene in clean.scenes]
            contexts = self.model.contexts(*self.encoder(prompts[::-1] if name == "another" else prompts))
            sigma = torch.full((24,), level)
            noisy = tuple(mix(part, torch.randn_like(part), sigma) for part in (clean.video, clean.audio))
            made = self.model((noisy[0], noisy[1]), sigma, clean.grid, contexts)
            for kind, noise, velocity, truth in zip(("video", "audio"), noisy, made, clean[:2], strict=True):
                figures[f"{kind}_{name}_{level:.2f}"] = float((noise - level * velocity - truth).square().mean())
        return figures
