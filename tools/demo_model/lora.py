"""Trains the distilled LoRA: right at the default strengths, a quarter in the first stage and a half in the second."""

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
from ltxkern.pipeline.sampling.latents import patchify, unpatchify
from ltxkern.pipeline.sampling.schedule import STAGE_2_SIGMAS
from tools.demo_model.configuration import plain
from tools.demo_model.muon import Muon
from tools.demo_model.prompts import plain_prompt, write_prompt
from tools.demo_model.text import Encoder
from tools.demo_model.training import Part, load_modules
from tools.demo_model.transformer import FIRST_FRAME, Clean, LatentScenes, Model, Transformer, draw_sigmas, mix
from tools.demo_model.upsampler import Upsampler

RANK = 32
STRENGTHS = PRESETS["hq"].distilled_strengths
# What res2s evaluates in stage 2: the sigmas, their geometric means, and the last small steps.
_SIGMAS = STAGE_2_SIGMAS[:-1]
_EVALUATED = (*_SIGMAS, *(math.sqrt(a * b) for a, b in zip(_SIGMAS, (*_SIGMAS[1:], 0.0011), strict=True)), 0.0011)
# A prediction at a small sigma differs little from its input; its error in velocity would drown all others.
_LEAST_SIGMA = 0.4


# Errors above this count by their size, not its square: a prediction is a likely video then, not the blurred mean of all.
_LARGE = 0.3


def _robust(error: Tensor) -> Tensor:
    """Charbonnier's loss, element by element."""
    return (error.square() + _LARGE**2).sqrt() - _LARGE


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
    steps = 1500
    batch, half_batch = 4, 12
    first = 0.5  # how many draws are of the first step of stage 2

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

    def _run(self, strength: float, *inputs: Any) -> tuple[Tensor, Tensor]:
        names = {f"transformer.{n}": w for n, w in self.factors.merged(self.model.transformer, strength).items()}
        return functional_call(self.model, names, inputs)

    @torch.no_grad()
    def _enlarged(self, data: LatentScenes, half: Clean, sigma: Tensor, contexts: tuple[Tensor, Tensor]) -> Tensor:
        """Tokens of the full size as stage 2 gets them: the transformer's guess at half size, through the upsampler."""
        noisy = [mix(part, torch.randn_like(part), sigma) for part in half[:2]]
        velocity, _ = self._run(STRENGTHS[0], (noisy[0], noisy[1]), sigma, half.grid, contexts)
        guess = unpatchify(noisy[0] - sigma.view(-1, 1, 1) * velocity, half.grid)
        shape = (1, -1, 1, 1, 1)
        raw = guess * data.statistics.video_std.view(shape) + data.statistics.video_mean.view(shape)
        return patchify(data.statistics.video(self.upsampler(raw)))

    def losses(self, draws: Random, step: int) -> dict[str, Tensor]:
        if step % 3 == 2:
            return self._first_stage(draws)
        numbers = self.data.draw(draws, self.batch, full=True)
        clean = self.data.batch(numbers, full=True)
        half = self.data.batch([self.data.with_full[number] for number in numbers])
        contexts = self.model.contexts(*self.encoder([write_prompt(scene, draws) for scene in clean.scenes]))
        level = draws.choice(_EVALUATED)
        if draws.random() < self.first:
            level = _EVALUATED[0]
        first_frame = draws.random() < FIRST_FRAME
        guess_sigma = torch.tensor([draws.uniform(0.1, 0.7) for _ in range(self.batch)])
        video, audio = self._enlarged(self.data, half, guess_sigma, contexts), clean.audio
        if level < _EVALUATED[0]:
            # Later steps start from what the first one makes, as they do in a run.
            with torch.no_grad():
                video, audio = self._predicted((video, audio), clean, _EVALUATED[0], contexts, first_frame)
        made = self._predicted((video, audio), clean, level, contexts, first_frame)
        given = clean.grid.height * clean.grid.width if first_frame else 0
        errors = (made[0] - clean.video)[:, given:], made[1] - clean.audio
        names = "full", "full_audio"
        return {
            name: _robust(error).mean() / max(level, _LEAST_SIGMA) for name, error in zip(names, errors, strict=True)
        }

    def _predicted(
        self,
        start: tuple[Tensor, Tensor],
        clean: Clean,
        level: float,
        contexts: tuple[Tensor, Tensor],
        first_frame: bool,
    ) -> tuple[Tensor, Tensor]:
        """What stage 2 makes of video and audio at a noise level; a first frame that is given is the clean one."""
        sigma = torch.full((len(start[0]),), level)
        video, audio = (mix(part, torch.randn_like(part), sigma) for part in start)
        given = clean.grid.height * clean.grid.width if first_frame else 0
        video[:, :given] = clean.video[:, :given]
        velocity = self._run(STRENGTHS[1], (video, audio), sigma, clean.grid, contexts, Perturbation(), first_frame)
        made = video - level * velocity[0]
        if first_frame:
            made = torch.cat([clean.video[:, :given], made[:, given:]], dim=1)
        return made, audio - level * velocity[1]

    def _first_stage(self, draws: Random) -> dict[str, Tensor]:
        clean = self.data.batch(self.data.draw(draws, self.half_batch))
        contexts = self.model.contexts(*self.encoder([write_prompt(scene, draws) for scene in clean.scenes]))
        sigma = draw_sigmas(draws, self.half_batch)
        noise = [torch.randn_like(part) for part in clean[:2]]
        noisy = mix(clean.video, noise[0], sigma), mix(clean.audio, noise[1], sigma)
        made = self._run(STRENGTHS[0], noisy, sigma, clean.grid, contexts)
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
        start = self._enlarged(self.test, half, torch.full((24,), 0.4), contexts)
        figures = {}
        for name, strength in (("with", STRENGTHS[1]), ("without", 0.0)):
            for level in _SIGMAS[:2]:
                sigma = torch.full((24,), level)
                torch.manual_seed(0)
                noisy = (
                    mix(start, torch.randn_like(start), sigma),
                    mix(clean.audio, torch.randn_like(clean.audio), sigma),
                )
                velocity, _ = self._run(strength, noisy, sigma, clean.grid, contexts)
                figures[f"{name}_{level:.2f}"] = float((noisy[0] - level * velocity - clean.video).square().mean())
        return figures
