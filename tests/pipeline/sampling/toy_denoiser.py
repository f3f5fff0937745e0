"""A small elementwise denoiser and its starting latents, for the sampler tests."""

from collections.abc import Mapping

import torch
from torch import Tensor

SIGMAS = (1.0, 0.95, 0.6, 0.1, 0.0)


class Toy:
    """A denoiser that works elementwise, recording its calls."""

    def __init__(self, shifts: Mapping[str, float] | None = None) -> None:
        self.shifts = shifts or {"video": 0.3, "audio": -0.2}
        self.calls: list[tuple[float, int, bool]] = []

    def __call__(self, latents: Mapping[str, Tensor], sigma: float, *, step: int, substep: bool) -> dict[str, Tensor]:
        self.calls.append((sigma, step, substep))
        return {
            name: (0.25 * x.float() + 0.5 * torch.tanh(x.float() + self.shifts[name])).to(x.dtype)
            for name, x in latents.items()
        }


def draw(seed: int = 10, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"video": (1, 6, 4), "audio": (1, 3, 4)}
    noise = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    return {name: (scale * value.float()).to(dtype) for name, value in noise.items()}
