"""Benchmark of dual_add: a weight of the LTX-2.3 transformer, or a chunk of it, with the deltas of two LoRA phases."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import ltxkern
from cases import Call, Case, Suite, normal
from command_line import main


def two_adds(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """One add for each sum; x is read twice."""
    return x + first, x + second


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """Deltas of about a twentieth and a tenth of the weight."""
    random = normal(torch.float32, device, generator)
    args = tuple((random(*case.shape) * scale).to(dtype) for scale in (0.02, 0.001, 0.002))
    return Call(args, op=ltxkern.dual_add, composition=two_adds)


SUITE = Suite(
    op="dual_add",
    cases=(
        Case("audio_attn_chunk", (1024, 2048), "small"),
        Case("video_attn", (4096, 4096)),
        Case("video_ff_up", (16384, 4096), "large"),
    ),
    prepare=prepare,
    contract="exact",
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
