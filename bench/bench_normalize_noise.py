"""Benchmark of normalize_noise, channelwise_normalize and noise_statistics on the fp64 latents of both stages."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import ltxkern
from cases import Call, Case, Suite
from command_line import main


def normalize(noise: Tensor) -> Tensor:
    """Whole tensor, then the last two dims."""
    return channelwise((noise - noise.mean()) / noise.std())


def channelwise(x: Tensor) -> Tensor:
    """The last two dims."""
    return (x - x.mean(dim=(-2, -1), keepdim=True)) / x.std(dim=(-2, -1), keepdim=True)


def statistics(noise: Tensor) -> Tensor:
    """Count, mean and M2 of every slice."""
    slices = noise.reshape(-1, noise.shape[-2] * noise.shape[-1])
    mean = slices.mean(dim=1)
    deviation = (slices - mean[:, None]).square().sum(dim=1)
    return torch.stack([torch.full_like(mean, slices.shape[1]), mean, deviation], dim=1)


FUNCTIONS = {
    "normalize": (ltxkern.normalize_noise, normalize),
    "channelwise": (ltxkern.channelwise_normalize, channelwise),
    "statistics": (ltxkern.noise_statistics, statistics),
}


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """Normal noise with a mean, so that the first standardisation has work to do."""
    noise = torch.randn(case.shape, device=device, dtype=torch.float64, generator=generator).to(dtype) * 1.1 + 0.2
    op, composed = FUNCTIONS[case.options["function"]]
    return Call(args=(noise,), op=op, composition=composed)


STAGE1, STAGE2, AUDIO = (1, 8160, 128), (1, 32640, 128), (1, 126, 128)
SUITE = Suite(
    op="normalize_noise",
    cases=(
        Case("stage1_video_normalize", STAGE1, "small", {"function": "normalize"}),
        Case("stage1_video_statistics", STAGE1, "small", {"function": "statistics"}),
        Case("stage1_audio_normalize", AUDIO, options={"function": "normalize"}),
        Case("stage1_video_unpacked_channelwise", (1, 128, 16, 17, 30), options={"function": "channelwise"}),
        Case("stage2_video_normalize", STAGE2, options={"function": "normalize"}),
        Case("stage2_video_statistics", STAGE2, options={"function": "statistics"}),
    ),
    prepare=prepare,
    dtypes=("fp64",),
    allowed_dtypes=("fp64", "fp32"),
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
