"""Benchmark of gated_residual and head_gate at the widths of the LTX-2.3 transformer."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import ltxkern
from cases import Call, Case, Suite, normal
from command_line import main


def residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + y gate`."""
    return x + y * gate


def heads(x: Tensor, logits: Tensor) -> Tensor:
    """`x 2 sigmoid(logits)` per head."""
    return x * (2.0 * torch.sigmoid(logits)).unsqueeze(-1)


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """One gate row per sample; logits per token and head."""
    random = normal(dtype, device, generator)
    if len(case.shape) == 4:
        return Call((random(*case.shape), random(*case.shape[:-1])), op=ltxkern.head_gate, composition=heads)
    args = (random(*case.shape), random(*case.shape), random(case.shape[0], 1, case.shape[2]))
    return Call(args, op=ltxkern.gated_residual, composition=residual)


SUITE = Suite(
    op="gated_residual",
    cases=(
        Case("audio", (1, 126, 2048)),
        Case("video_1k_tokens", (1, 1024, 4096), "small"),
        Case("video_1k_tokens_head_gate", (1, 1024, 32, 128), "small"),
        Case("stage1_video", (1, 8160, 4096)),
        Case("stage1_video_head_gate", (1, 8160, 32, 128)),
        Case("stage2_video", (1, 32640, 4096)),
        Case("stage2_video_head_gate", (1, 32640, 32, 128)),
    ),
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
