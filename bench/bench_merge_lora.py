"""Benchmark of merge_lora_ at the layer shapes of the LTX-2.3 transformer, with the distilled LoRA's rank and a user's."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import ltxkern
from cases import Call, Case, Suite
from command_line import main

SCALE = 0.25


def composition(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Delta first, then the sum: the usual fuse, with a temporary as large as the weight."""
    return weight.add_(b @ a, alpha=SCALE)


def with_addmm(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One in-place GEMM: fp32 accumulation, one rounding, no temporary."""
    return weight.addmm_(b, a, alpha=SCALE)


def official(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The published fuse: the delta rounded to the weight's dtype, then the sum."""
    return weight.add_((b * SCALE) @ a)


def fused(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The toolkit's op."""
    return ltxkern.merge_lora_(weight, a, b, SCALE)


def fused_reference(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The toolkit's op with the rounding of the published fuse."""
    return ltxkern.merge_lora_(weight, a, b, SCALE, rounding="reference")


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """A weight of the usual spread and factors whose delta is about a twentieth of it."""
    rows, columns = case.shape
    rank = case.options["rank"]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32, generator=generator)

    weight = (random(rows, columns) * columns**-0.5).to(dtype)
    a = (random(rank, columns) * columns**-0.5).to(dtype)
    b = (random(rows, rank) * 0.2 * rank**-0.5).to(dtype)
    return Call(
        args=(weight, a, b),
        op=fused_reference if case.options.get("reference") else fused,
        composition=official if case.options.get("reference") else composition,
        other={"torch addmm_": with_addmm},
        changes=(0,),
        flops=2 * rows * columns * rank,
    )


SUITE = Suite(
    op="merge_lora",
    cases=(
        Case("audio_attn_r384", (2048, 2048), "small", {"rank": 384}),
        Case("audio_attn_r32", (2048, 2048), "small", {"rank": 32}),
        Case("video_attn_r32", (4096, 4096), options={"rank": 32}),
        Case("video_attn_r384", (4096, 4096), options={"rank": 384}),
        Case("video_attn_r384_reference", (4096, 4096), options={"rank": 384, "reference": True}),
        Case("video_attn_r128", (4096, 4096), options={"rank": 128}),
        Case("a2v_q_r384", (2048, 4096), options={"rank": 384}),
        Case("video_ff_up_r384", (16384, 4096), options={"rank": 384}),
        Case("video_ff_down_r384", (4096, 16384), options={"rank": 384}),
        Case("adaln_r384", (36864, 4096), "large", {"rank": 384}),
    ),
    prepare=prepare,
    cpu_dtypes=("fp32",),
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
