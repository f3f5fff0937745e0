"""Benchmark of rms_norm_modulate and its gated-residual form at the widths of the LTX-2.3 transformer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ltxkern
from cases import Call, Case, Suite
from command_line import main

EPS = 1e-6


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Norm and modulation, each step rounded."""
    return F.rms_norm(x, (x.shape[-1],), None, EPS) * (1 + scale) + shift


def gated(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Gated residual, then the same."""
    summed = x + y * gate
    return summed, modulated(summed, scale, shift)


def load_flashinfer() -> Callable[..., Any]:
    """flashinfer's RMSNorm with the modulation in torch."""
    from flashinfer.norm import rmsnorm

    def call(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ones = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)
        return rmsnorm(x.reshape(-1, x.shape[-1]), ones, EPS).reshape(x.shape) * (1 + scale) + shift

    return call


def load_liger() -> Callable[..., Any]:
    """Liger's RMSNorm with the modulation in torch."""
    from liger_kernel.transformers.functional import liger_rms_norm

    def call(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ones = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)
        return liger_rms_norm(x, ones, EPS, 0.0, "llama", False) * (1 + scale) + shift

    return call


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """One modulation row per sample, as in text-to-video, or one per token."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32, generator=generator).to(dtype)

    batch, tokens, width = case.shape
    rows = tokens if case.options.get("per_token") else 1
    x, scale, shift = random(*case.shape), random(batch, rows, width) * 0.2, random(batch, rows, width) * 0.2
    if case.options.get("gated"):
        args = (x, random(*case.shape), random(batch, rows, width), scale, shift)
        return Call(args, op=ltxkern.gated_residual_rms_norm_modulate, composition=gated)
    peers = {"flashinfer": load_flashinfer, "Liger": load_liger} if device.type == "cuda" else {}
    return Call((x, scale, shift), op=ltxkern.rms_norm_modulate, composition=modulated, peers=peers)


GATED = {"gated": True}
SUITE = Suite(
    op="rms_norm_modulate",
    cases=(
        Case("audio", (1, 126, 2048), "small"),
        Case("video_1k_tokens", (1, 1024, 4096), "small"),
        Case("video_1k_tokens_gated", (1, 1024, 4096), "small", GATED),
        Case("stage1_video", (1, 8160, 4096)),
        Case("stage1_video_gated", (1, 8160, 4096), options=GATED),
        Case("stage1_video_per_token", (1, 8160, 4096), options={"per_token": True}),
        Case("stage2_video", (1, 32640, 4096)),
        Case("stage2_video_gated", (1, 32640, 4096), options=GATED),
    ),
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
