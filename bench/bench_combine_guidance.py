"""Benchmark of combine_guidance with the scales of the HQ preset, at the latents of both stages."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import ltxkern
from cases import Call, Case, Suite
from command_line import main


def composition(
    cond: Tensor,
    uncond: Tensor,
    perturbed: Tensor | None,
    isolated: Tensor,
    cfg: float,
    stg: float,
    mod: float,
    rescale: float,
) -> Tensor:
    """The guider as samplers write it: fp32 for low precisions, global standard deviations."""
    wide = torch.promote_types(cond.dtype, torch.float32)
    base = cond.to(wide)
    pred = base + (cfg - 1) * (base - uncond.to(wide)) + (mod - 1) * (base - isolated.to(wide))
    if perturbed is not None:
        pred = pred + stg * (base - perturbed.to(wide))
    factor = rescale * (base.std() / pred.std()) + (1 - rescale)
    return (pred * factor).to(cond.dtype)


def fused(
    cond: Tensor,
    uncond: Tensor,
    perturbed: Tensor | None,
    isolated: Tensor,
    cfg: float,
    stg: float,
    mod: float,
    rescale: float,
) -> Tensor:
    """The toolkit's op."""
    return ltxkern.combine_guidance(
        cond, uncond, perturbed, isolated, cfg_scale=cfg, stg_scale=stg, modality_scale=mod, rescale_scale=rescale
    )


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """Branches that differ by a tenth of their spread."""

    def random() -> Tensor:
        return torch.randn(case.shape, device=device, dtype=torch.float32, generator=generator)

    base = random()
    cond, uncond, isolated = (base.to(dtype), (base + 0.1 * random()).to(dtype), (base + 0.1 * random()).to(dtype))
    perturbed = (base + 0.1 * random()).to(dtype) if case.options.get("stg") else None
    scales = (
        (7.0, 0.0, 3.0, 1.0) if case.options.get("audio") else (3.0, 1.0 if perturbed is not None else 0.0, 3.0, 0.45)
    )
    return Call((cond, uncond, perturbed, isolated, *scales), op=fused, composition=composition)


SUITE = Suite(
    op="combine_guidance",
    cases=(
        Case("stage1_video", (1, 8160, 128), "small"),
        Case("stage1_audio", (1, 126, 128), "small", {"audio": True}),
        Case("stage1_video_four_branches", (1, 8160, 128), options={"stg": True}),
        Case("stage2_video", (1, 32640, 128)),
    ),
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
