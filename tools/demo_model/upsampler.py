"""Trains the latent upsampler on pairs of one scene at both sizes."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from torch import Tensor

from tools.demo_model.configuration import plain
from tools.demo_model.latents import load, statistics, stored
from tools.demo_model.muon import Muon
from tools.demo_model.training import Part


class Upsampler(Part):
    """From half to full size in latents as they are encoded; errors are counted in units of each channel's spread."""

    name = "upsampler"
    steps = 3000
    batch = 8
    noise = 0.1

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.upsampler = plain("upsampler")
        self.modules = {"upsampler": self.upsampler}
        self.optimiser = Muon(self.parameters().items(), 1.5e-3, vector_lr=1e-3)
        pairs = [latents for number in stored(folder) if (latents := load(folder, number)).full is not None]
        self.half = torch.cat([latents.half for latents in pairs])
        self.full = torch.cat([latents.full for latents in pairs if latents.full is not None])
        self.test = len(pairs[0].half)
        self.std = statistics(folder).video_std.view(1, -1, 1, 1, 1)

    def _error(self, half: Tensor, full: Tensor) -> Tensor:
        return ((self.upsampler(half) - full.float()) / self.std).square().mean()

    def losses(self, draws: Random, step: int) -> dict[str, Tensor]:
        chosen = torch.tensor([draws.randrange(self.test, len(self.half)) for _ in range(self.batch)])
        half = self.half[chosen].float()
        half = half + self.noise * self.std * torch.randn_like(half)
        return {"error": self._error(half, self.full[chosen])}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        return {"test": float(self._error(self.half[: self.test].float(), self.full[: self.test]))}
