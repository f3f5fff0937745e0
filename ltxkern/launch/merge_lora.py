"""How each compiled tier merges LoRAs: tensor-core addmm, the tile kernel, or the chain of the official rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltxkern.launch.plans import THREADS, planned
from ltxkern.launch.tensors import PARAM_CODES, ceil_div
from ltxkern.steps import Argument, Launch, Parameter

# LoRAs of one launch (kLoras in csrc/include/ltxkern/merge_lora.cuh): more could not share one rounding.
LORAS = 4
TILE = 64
# Up to this rank the tile kernel's products, on the plain cores, cost less than reading and writing the weight.
SMALL_RANK = 16
# Bytes of a rounded delta on a CPU that are still in its cache when they are added to the weight.
CPU_CHUNK = 4 << 20
CODES = {**PARAM_CODES, torch.float8_e4m3fn: 4}
HALVES = (torch.float16, torch.bfloat16)
Composition = Callable[..., None]


@dataclass(frozen=True)
class Case:
    """Everything of a call that its launch depends on; one entry of codes, ranks and scales a LoRA."""

    type_code: int
    rows: int
    columns: int
    strides: tuple[int, int]
    codes: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    stochastic: bool
    seed: int


def device_steps(case: Case, threads: int = THREADS) -> list[Launch]:
    """One block a tile of the weight."""
    fields: list[Parameter] = []
    for index, ((a_code, b_code), rank, scale) in enumerate(zip(case.codes, case.ranks, case.scales, strict=True)):
        fields += [Argument(1 + 2 * index), Argument(2 + 2 * index), a_code, b_code, rank, scale]
    fields += [None, None, 0, 0, 0, 0.0] * (LORAS - len(case.ranks))
    tiles = ceil_div(case.columns, TILE)
    weight = (Argument(0), case.type_code, case.rows, case.columns, *case.strides, tiles)
    parameters = (*weight, *fields, len(case.ranks), int(case.stochastic), case.seed)
    return [Launch("ltxk::merge_lora", (ceil_div(case.rows, TILE) * tiles,), threads, parameters)]


def describe(
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float],
    rounding: str,
    seed: int,
) -> Case:
    """The case of contiguous factors."""
    return Case(
        type_code=CODES[weight.dtype],
        rows=weight.shape[0],
        columns=weight.shape[1],
        strides=(weight.stride(0), weight.stride(1)),
        codes=tuple((CODES[a.dtype], CODES[b.dtype]) for a, b in zip(lora_a, lora_b, strict=True)),
        ranks=tuple(a.shape[0] for a in lora_a),
        scales=tuple(map(float, scale)),
        stochastic=rounding == "stochastic",
        # Only there does it count: layers of one shape share a plan otherwise.
        seed=seed if rounding == "stochastic" else 0,
    )


def refuse(
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float],
    chunk_bytes: int,
    rounding: str,
    seed: int = 0,
) -> str | None:
    """What the CUDA tiers decline: fp64, and more LoRAs than share one rounding."""
    if rounding == "reference":
        return None
    if any(tensor.dtype == torch.float64 for tensor in (weight, *lora_a, *lora_b)):
        return "torch.float64 weights or factors: the kernel accumulates in fp32"
    if len(lora_a) > LORAS:
        return f"{len(lora_a)} LoRAs at once: the kernel merges at most {LORAS} with one rounding"
    return None


@contextmanager
def full_precision_reduction() -> Iterator[None]:
    """Products of the block add their parts in fp32, whatever the process allows otherwise."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_reduced_precision_reduction, settings.allow_bf16_reduced_precision_reduction
    settings.allow_fp16_reduced_precision_reduction = settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_fp16_reduced_precision_reduction, settings.allow_bf16_reduced_precision_reduction = before


def one_product(weight: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]) -> bool:
    """Whether one addmm merges with one rounding: a 16-bit weight with dense rows, and one LoRA of its dtype."""
    dense = weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1]
    same = weight.dtype in HALVES and all(factor.dtype == weight.dtype for factor in (*lora_a, *lora_b))
    return len(lora_a) == 1 and dense and same


def run_device(
    tier: str,
    composition: Composition,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float],
    chunk_bytes: int,
    rounding: str,
    seed: int = 0,
) -> None:
    """CUDA: the official chain by torch, addmm on tensor cores for one large LoRA, else the tile kernel."""
    if rounding == "reference":
        composition(weight, lora_a, lora_b, scale, chunk_bytes, rounding, seed)
        return
    if rounding == "single" and lora_a[0].shape[0] > SMALL_RANK and one_product(weight, lora_a, lora_b):
        with torch.no_grad(), full_precision_reduction():
            weight.addmm_(lora_b[0], lora_a[0], alpha=scale[0])
        return
    factors_a, factors_b = [a.contiguous() for a in lora_a], [b.contiguous() for b in lora_b]
    case = describe(weight, factors_a, factors_b, scale, rounding, seed)
    pairs: list[Any] = [factor for pair in zip(factors_a, factors_b, strict=True) for factor in pair]
    target = weight.detach()
    if weight.dtype == torch.float8_e4m3fn:
        target = target.view(torch.uint8)
    planned(tier, device_steps, case, 1 + len(pairs))(target, *pairs)


def cpu_has_bfloat16_products() -> bool:
    """Whether torch multiplies bf16 matrices with the processor's own instructions; without them it is a hundred times slower."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def run_cpu(
    tier: str,
    composition: Composition,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float],
    chunk_bytes: int,
    rounding: str,
    seed: int = 0,
) -> None:
    """CPU: addmm where the processor has bf16 products, else fp32 products in chunks with one rounding."""
    bfloat16 = weight.dtype == torch.bfloat16 and cpu_has_bfloat16_products()
    if rounding == "single" and bfloat16 and one_product(weight, lora_a, lora_b):
        with torch.no_grad():
            weight.addmm_(lora_b[0], lora_a[0], alpha=scale[0])
        return
    composition(weight, lora_a, lora_b, scale, chunk_bytes, rounding, seed)


def run(tier: str, composition: Composition, *args: Any) -> None:
    """One merge on a tier; `composition` is the op's torch reference."""
    (run_cpu if tier == "cpu" else run_device)(tier, composition, *args)
