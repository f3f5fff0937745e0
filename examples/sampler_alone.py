"""The res2s sampler without any model: `python examples/sampler_alone.py`.

The denoiser here knows the answer for Gaussian data: with `x = (1 - sigma) x0 + sigma n` the best guess of `x0` is linear in `x`.
The samples come out with the data's own mean and, but for what a schedule of finite steps loses, its deviation.
"""

import torch
from torch import Tensor

from ltxkern.pipeline import res2s_sample

MEAN, DEVIATION = 0.7, 0.2


def denoise(latents: dict[str, Tensor], sigma: float, *, step: int, substep: bool) -> dict[str, Tensor]:
    """E[x0 | x] for x = (1 - sigma) x0 + sigma n, x0 of mean MEAN and deviation DEVIATION."""
    signal, noise = (1 - sigma) * DEVIATION, sigma
    gain = DEVIATION * signal / (signal**2 + noise**2)
    return {name: MEAN + gain * (x - (1 - sigma) * MEAN) for name, x in latents.items()}


def main() -> None:
    start = {"video": torch.randn(1, 256, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    steps = []
    result = res2s_sample(
        denoise, start, torch.linspace(1, 0, 31), callback=lambda done, total, latents: steps.append(done)
    )["video"]
    print(f"{len(steps)} steps; mean {result.mean():.3f} for {MEAN}, deviation {result.std():.3f} for {DEVIATION}")


if __name__ == "__main__":
    main()
