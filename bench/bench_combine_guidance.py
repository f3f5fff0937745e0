"""Benchmark of combine_guidance with the scales of the HQ preset, at the latents of both stages."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import ltxkern
from cases import Call, Case, Suite, normal
from command_line import main


def composition(*args: Any) -> Tensor:
    """The guider as samplers write it: fp32 for low precisions, global standard deviations."""
    cond, uncond, perturbed, isolated, cfg, stg, mod, rescale = args
    wide = torch.promote_types(cond.dtype, torch.float32)
    base = cond.to(wide)
    pred = base + (cfg - 1) * (base - uncond.to(wide)) + (mod - 1) * (base - isolated.to(wide))
    if perturbed is not None:
        pred = pred + stg * (base - perturbed.to(wide))
    factor = rescale * (base.std() / pred.std()) + (1 - rescale)
    return (pred * factor).to(cond.dtype)


def fused(*args: Any) -> Tensor:
    """The toolkit's op."""
    names = ("cfg_scale", "stg_scale", "modality_scale", "rescale_scale")
    return ltxkern.combine_guidance(*args[:4], **dict(zip(names, args[4:], strict=True)))


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """Branches that differ by a tenth of their spread."""
    random, stg = normal(torch.float32, device, generator), case.options.get("stg")
    base = random(*case.shape)
    uncond, isolated, perturbed = ((base + 0.1 * random(*case.shape)).to(dtype) for _ in range(3))
    scales = (7.0, 0.0, 3.0, 1.0) if case.options.get("audio") else (3.0, 1.0 if stg else 0.0, 3.0, 0.45)
    args = (base.to(dtype), uncond, perturbed if stg else None, isolated, *scales)
    return Call(args, op=fused, composition=composition)


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
