"""Benchmark of merge_lora_ at the layer shapes of the LTX-2.3 transformer, with the distilled LoRA's rank and a user's."""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

import ltxkern
from cases import Call, Case, Suite, normal
from command_line import main

SCALE = 0.25
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
Factors = list[Tensor]


def composition(weight: Tensor, a: Factors, b: Factors) -> Tensor:
    """Each delta first, then the sum: the usual fuse, with a temporary as large as the weight."""
    for one, other in zip(a, b, strict=True):
        weight.add_(other @ one, alpha=SCALE)
    return weight


def float8_composition(weight: Tensor, a: Factors, b: Factors) -> Tensor:
    """The sum in the dtype of the factors, rounded once more."""
    total = weight.to(a[0].dtype)
    for one, other in zip(a, b, strict=True):
        total.add_(other @ one, alpha=SCALE)
    return weight.copy_(total.clamp_(-E4M3_MAX, E4M3_MAX))


def with_addmm(weight: Tensor, a: Factors, b: Factors) -> Tensor:
    """In-place GEMMs: fp32 accumulation, one rounding each, no temporary."""
    for one, other in zip(a, b, strict=True):
        weight.addmm_(other, one, alpha=SCALE)
    return weight


def official(weight: Tensor, a: Factors, b: Factors) -> Tensor:
    """The published fuse of one LoRA: the delta rounded to the weight's dtype, then the sum."""
    return weight.add_((b[0] * SCALE) @ a[0])


def fused(rounding: str, weight: Tensor, a: Factors, b: Factors) -> Tensor:
    """The toolkit's op."""
    return ltxkern.merge_lora_(weight, a, b, SCALE, rounding=rounding)


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """A weight of the usual spread and factors whose delta is about a twentieth of it; with "float8" the weight alone is e4m3."""
    rows, columns = case.shape
    rank, count = case.options["rank"], case.options.get("loras", 1)
    float8 = case.options.get("float8", False)
    random = normal(torch.float32, device, generator)
    weight = (random(rows, columns) * columns**-0.5).to(torch.float8_e4m3fn if float8 else dtype)
    a = [(random(rank, columns) * columns**-0.5).to(dtype) for _ in range(count)]
    b = [(random(rows, rank) * 0.2 * rank**-0.5).to(dtype) for _ in range(count)]
    reference = case.options.get("reference")
    return Call(
        args=(weight, a, b),
        op=functools.partial(fused, "reference" if reference else "single"),
        composition=official if reference else float8_composition if float8 else composition,
        other={} if float8 else {"torch addmm_": with_addmm},
        changes=(0,),
        flops=2 * rows * columns * rank * count,
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
        Case("video_attn_r384_float8", (4096, 4096), options={"rank": 384, "float8": True}),
        Case("video_attn_two_r384", (4096, 4096), options={"rank": 384, "loras": 2}),
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
