"""Trains the distilled LoRA: right at a quarter in the first stage and a half in the second, the defaults, and at full strength."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ltxkern.pipeline.files.official_names import LORA_PREFIX, TRANSFORMER_PREFIX, official_name
from ltxkern.pipeline.model.inputs import Perturbation
from ltxkern.pipeline.run.presets import PRESETS
from ltxkern.pipeline.sampling.latents import VideoLatentShape, patchify, unpatchify
from ltxkern.pipeline.sampling.schedule import STAGE_2_SIGMAS
from tools.demo_model import drafts
from tools.demo_model.configuration import plain
from tools.demo_model.muon import Muon
from tools.demo_model.prompts import plain_prompt, write_prompt
from tools.demo_model.text import Encoder
from tools.demo_model.training import Part, load_modules
from tools.demo_model.transformer import (
    FIRST_FRAME,
    MORE_OFTEN,
    Clean,
    LatentScenes,
    Model,
    Transformer,
    draw_sigmas,
    mix,
)
from tools.demo_model.upsampler import Upsampler

RANK = 32
STRENGTHS = PRESETS["hq"].distilled_strengths
# Of two-stage and distilled pipelines; so many batches have it.
FULL_STRENGTH, _AT_FULL_STRENGTH = 1.0, 0.25
# What res2s evaluates in stage 2: the sigmas, their geometric means, and the last small steps.
_SIGMAS = STAGE_2_SIGMAS[:-1]
_EVALUATED = (*_SIGMAS, *(math.sqrt(a * b) for a, b in zip(_SIGMAS, (*_SIGMAS[1:], 0.0011), strict=True)), 0.0011)
# A prediction at a small sigma differs little from its input; its error in velocity would drown all others.
_LEAST_SIGMA = 0.4
# Errors well above this count by their size, not its square: outlines end at a place, not at the mean of several.
_ROUNDING = 0.3
# How many batches start from what stage 1 made of prompts. The others start from scenes at half size: from noise that leaves them
# where they are, in a few steps, to what sampling does to outlines.
_DRAFTS = 0.6
_NOISED_TO, _STEPS = (0.6, 0.92), 4


def _draw_strength(draws: Random, usual: float) -> float:
    return FULL_STRENGTH if draws.random() < _AT_FULL_STRENGTH else usual


class Factors(nn.Module):
    """Two thin matrices for every Linear of a transformer; their products start at zero."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        linears = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
        self.names = list(linears)
        shapes = [module.weight.shape for module in linears.values()]
        self.a = nn.ParameterList([torch.randn(RANK, shape[1]) / math.sqrt(shape[1]) for shape in shapes])
        self.b = nn.ParameterList([torch.zeros(shape[0], RANK) for shape in shapes])

    def merged(self, transformer: nn.Module, strength: float) -> dict[str, Tensor]:
        """Weights of the transformer with the LoRA in them, by name."""
        weights = {name: parameter.detach() for name, parameter in transformer.named_parameters()}
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + strength * (b @ a)
        return weights

    def official(self) -> dict[str, Tensor]:
        """Tensors under the names of the published LoRA files."""
        tensors = {}
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            key = LORA_PREFIX + official_name("transformer", f"{name}.").removeprefix(TRANSFORMER_PREFIX)
            tensors[f"{key}lora_A.weight"], tensors[f"{key}lora_B.weight"] = a.detach(), b.detach()
        return tensors


class DistilledLora(Part):
    """Full size from what stage 1 makes and the upsampler enlarges; half size as before, so that stage 1 stays what it is."""

    name = "lora"
    steps = 2200
    batch, half_batch = 4, 12
    half_every = 4

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = Model().requires_grad_(False)
        load_modules(folder, Transformer.name, {"model": self.model})
        self.upsampler: Any = plain("upsampler").requires_grad_(False)
        load_modules(folder, Upsampler.name, {"upsampler": self.upsampler})
        self.factors = Factors(self.model.transformer)
        self.modules = {"factors": self.factors}
        self.optimiser = Muon(self.parameters().items(), 2e-3, vector_lr=1e-3)
        self.encoder = Encoder()
        self.data, self.test = LatentScenes(folder), LatentScenes(folder, test=True)
        self.drafts = drafts.load(folder)
        self.draft_weights = [MORE_OFTEN.get(scene.background, 1.0) for scene in self.drafts.scenes]

    def _contexts(self, clean: Clean, draws: Random) -> tuple[Tensor, Tensor]:
        """Of sentences that name the scenes."""
        return self.model.contexts(*self.encoder([write_prompt(scene, draws) for scene in clean.scenes]))

    def run(self, strength: float, *inputs: Any) -> tuple[Tensor, Tensor]:
        names = {f"transformer.{n}": w for n, w in self.factors.merged(self.model.transformer, strength).items()}
        return functional_call(self.model, names, inputs)

    @torch.no_grad()
    def _enlarged(self, data: LatentScenes, half: Clean, sigma: Tensor, contexts: tuple[Tensor, Tensor]) -> Tensor:
        """Tokens of the full size as stage 2 gets them: what stage 1 makes from noise of sigma, through the upsampler."""
        video, audio = (mix(part, torch.randn_like(part), sigma) for part in half[:2])
        step = (sigma / _STEPS).view(-1, 1, 1)
        for left in range(_STEPS, 0, -1):
            made = self.run(STRENGTHS[0], (video, audio), sigma * left / _STEPS, half.grid, contexts)
            video, audio = video - step * made[0], audio - step * made[1]
        raw = data.statistics.raw_video(unpatchify(video, half.grid))
        return patchify(data.statistics.video(self.upsampler(raw)))

    def _drafted(self, numbers: list[int]) -> tuple[Tensor, Clean]:
        """What stage 2 starts from, and what it shall reach, of drafts by number."""
        start, video, audio = (part[numbers].float() for part in self.drafts[1:])
        frames, height, width = video.shape[2:]
        grid = VideoLatentShape(frames, height, width, video.shape[1], len(numbers))
        scenes = [self.drafts.scenes[number] for number in numbers]
        return patchify(start), Clean(patchify(video), patchify(audio), grid, scenes)

    def losses(self, draws: Random, step: int) -> dict[str, Tensor]:
        if step % self.half_every == self.half_every - 1:
            return self._first_stage(draws)
        drafted = draws.random() < _DRAFTS and bool(self.drafts.scenes)
        if drafted:
            numbers = draws.choices(range(len(self.drafts.scenes)), self.draft_weights, k=self.batch)
            video, clean = self._drafted(numbers)
        else:
            numbers = self.data.draw(draws, self.batch, full=True)
            clean = self.data.batch(numbers, full=True)
        contexts = self._contexts(clean, draws)
        if not drafted:
            half = self.data.batch([self.data.with_full[number] for number in numbers])
            sigma = torch.tensor([draws.uniform(*_NOISED_TO) for _ in range(self.batch)])
            video = self._enlarged(self.data, half, sigma, contexts)
        strength = _draw_strength(draws, STRENGTHS[1])
        first_frame = draws.random() < FIRST_FRAME
        stage = SecondStage(self, clean, contexts, strength=strength, first_frame=first_frame)
        audio = clean.audio
        level = _EVALUATED[0]
        if draws.random() < 0.5:
            # A later step starts from what the first one made, as it does when sampling.
            with torch.no_grad():
                video, audio = stage(video, audio, level)
            level = draws.choice(_EVALUATED[1:])
        wrong = (stage(video, audio, level)[0] - clean.video)[:, stage.given :]
        rounded = (wrong.square() + _ROUNDING**2).sqrt() - _ROUNDING
        return {"full": rounded.mean() / max(level, _LEAST_SIGMA)}

    def _first_stage(self, draws: Random) -> dict[str, Tensor]:
        clean = self.data.batch(self.data.draw(draws, self.half_batch))
        contexts = self._contexts(clean, draws)
        sigma = draw_sigmas(draws, self.half_batch)
        noise = [torch.randn_like(part) for part in clean[:2]]
        noisy = mix(clean.video, noise[0], sigma), mix(clean.audio, noise[1], sigma)
        made = self.run(_draw_strength(draws, STRENGTHS[0]), noisy, sigma, clean.grid, contexts)
        wrong = [
            (velocity - (draw - truth)).square().mean()
            for velocity, draw, truth in zip(made, noise, clean[:2], strict=True)
        ]
        return {"half": wrong[0], "audio": wrong[1]}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Errors of stage 2 from guesses of stage 1, with the LoRA and without it."""
        numbers = list(range(24))
        clean = self.test.batch(numbers, full=True)
        half = self.test.batch(numbers)
        contexts = self.model.contexts(*self.encoder([plain_prompt(scene) for scene in clean.scenes]))
        start = self._enlarged(self.test, half, torch.full((24,), 0.9), contexts)
        figures = {}
        for name, strength in (
            ("with", STRENGTHS[1]),
            ("not_switched", STRENGTHS[0]),
            ("without", 0.0),
            ("full", FULL_STRENGTH),
        ):
            stage = SecondStage(self, clean, contexts, strength=strength)
            torch.manual_seed(0)
            video, audio = start, clean.audio
            for level in _SIGMAS:
                video, audio = stage(video, audio, level)
                figures[f"{name}_{level:.2f}"] = float((video - clean.video).abs().mean())
        return figures


class SecondStage:
    """What the second stage predicts of a batch: clean tokens (video, audio) from those that it is given, noised to a level.

    Args:
        part: what predicts.
        clean: the truth, whose first frame may be given.
        contexts: of the prompts.
        strength: of the LoRA.
        first_frame: whether it is given.
    """

    def __init__(
        self,
        part: DistilledLora,
        clean: Clean,
        contexts: tuple[Tensor, Tensor],
        *,
        strength: float = STRENGTHS[1],
        first_frame: bool = False,
    ) -> None:
        self.part, self.clean, self.contexts, self.strength = part, clean, contexts, strength
        self.first_frame = first_frame
        self.given = clean.grid.height * clean.grid.width if first_frame else 0

    def __call__(self, video: Tensor, audio: Tensor, level: float) -> tuple[Tensor, Tensor]:
        sigma = torch.full((len(video),), level)
        noisy = mix(video, torch.randn_like(video), sigma), mix(audio, torch.randn_like(audio), sigma)
        noisy[0][:, : self.given] = self.clean.video[:, : self.given]
        made = self.part.run(
            self.strength, noisy, sigma, self.clean.grid, self.contexts, Perturbation(), self.first_frame
        )
        return noisy[0] - level * made[0], noisy[1] - level * made[1]
