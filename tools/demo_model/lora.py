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

RANK = 8
STRENGTHS = PRESETS["hq"].distilled_strengths
# What res2s evaluates in stage 2: the sigmas, their geometric means, and the last small steps.
_SIGMAS = STAGE_2_SIGMAS[:-1]
_EVALUATED = (*_SIGMAS, *(math.sqrt(a * b) for a, b in zip(_SIGMAS, (*_SIGMAS[1:], 0.0011), strict=True)), 0.0011)
# A prediction at a small sigma differs little from its input; its error in velocity would drown all others.
_LEAST_SIGMA = 0.4


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
    steps = 1200
    batch, half_batch = 4, 12

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = Model().requires_grad_(False)
        load_modules(folder, Transformer.name, {"model": self.model})
        self.upsampler: Any = plain("upsampler").requires_grad_(False)
        load_modules(folder, Upsampler.name, {"upsampler": self.upsampler})
        self.factors = Factors(self.model.transformer)
        self.modules = {"factors": self.factors}
        self.optimiser = Muon(self.parameters().items(), 1e-3, vector_lr=1e-3)
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
        numbers = [draws.randrange(len(self.data.with_full)) for _ in range(self.batch)]
        clean = self.data.batch(numbers, full=True)
        half = self.data.batch([self.data.with_full[number] for number in numbers])
        contexts = self.model.contexts(*self.encoder([write_prompt(scene, draws) for scene in clean.scenes]))
        level = draws.choice(_EVALUATED)
        if draws.random() < 0.6:
            level = _EVALUATED[0]
        guess_sigma = torch.tensor([draws.uniform(0.1, 0.7) for _ in range(self.batch)])
        start = self._enlarged(self.data, half, guess_sigma, contexts) if level > 0.8 else clean.video
        given = draws.random() < FIRST_FRAME
        return {"full": self._error(start, clean, level, contexts, first_frame=given)}

    def _error(
        self, start: Tensor, clean: Clean, level: float, contexts: tuple[Tensor, Tensor], *, first_frame: bool
    ) -> Tensor:
        sigma = torch.full((len(start),), level)
        noisy = mix(start, torch.randn_like(start), sigma), mix(clean.audio, torch.randn_like(clean.audio), sigma)
        given = clean.grid.height * clean.grid.width if first_frame else 0
        noisy[0][:, :given] = clean.video[:, :given]
        velocity, _ = self._run(STRENGTHS[1], noisy, sigma, clean.grid, contexts, Perturbation(), first_frame)
        wrong = (noisy[0] - level * velocity - clean.video)[:, given:]
        return wrong.square().mean() / max(level, _LEAST_SIGMA) ** 2

    def _first_stage(self, draws: Random) -> dict[str, Tensor]:
        clean = self.data.batch([draws.randrange(len(self.data.scenes)) for _ in range(self.half_batch)])
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
