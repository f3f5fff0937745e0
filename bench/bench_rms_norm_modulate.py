"""Benchmark of rms_norm_modulate and its gated-residual form at the widths of the LTX-2.3 transformer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ltxkern
from cases import Call, Case, Suite, normal
from command_line import main

EPS = 1e-6
MATERIALISED = "materialised rows"


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Norm and modulation, each step rounded."""
    return F.rms_norm(x, (x.shape[-1],), None, EPS) * (1 + scale) + shift


def gated(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Gated residual, then the same."""
    summed = x + y * gate
    return summed, modulated(summed, scale, shift)


def gated_twice(x: Tensor, y: Tensor, gate: Tensor, *modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gated residual, then its norm with two modulations."""
    summed = x + y * gate
    normed = F.rms_norm(summed, (x.shape[-1],), None, EPS)
    scale, shift, scale2, shift2 = modulation
    return summed, normed * (1 + scale) + shift, normed * (1 + scale2) + shift2


def with_norm(norm: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """Another library's RMSNorm of rows, `norm(rows, weight)`, with the modulation in torch."""

    def call(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ones = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)
        return norm(x.reshape(-1, x.shape[-1]), ones).reshape(x.shape) * (1 + scale) + shift

    return call


def load_flashinfer() -> Callable[..., Any]:
    """flashinfer's."""
    from flashinfer.norm import rmsnorm

    return with_norm(lambda rows, weight: rmsnorm(rows, weight, EPS))


def load_liger() -> Callable[..., Any]:
    """Liger's."""
    from liger_kernel.transformers.functional import liger_rms_norm

    return with_norm(lambda rows, weight: liger_rms_norm(rows, weight, EPS, 0.0, "llama", False))


def by_rows(function: Callable[..., Any], activations: int) -> Callable[..., Any]:
    """The function of materialised rows, taking `activations` tensors, then tables (N, D), then a row index into these."""

    def call(*args: Tensor) -> Any:
        *given, index = args
        rows = (t.index_select(0, index.flatten()).unflatten(0, index.shape) for t in given[activations:])
        return function(*given[:activations], *rows)

    return call


def prepare_index(activations: Sequence[Tensor], tables: Sequence[Tensor]) -> Call:
    """Tokens of the first of 16 latent frames take one row of the tables and all others the other one, as with an image."""
    batch, tokens, _ = activations[0].shape
    index = (torch.arange(tokens, device=activations[0].device) >= tokens // 16).long().expand(batch, tokens)
    operation, composition = ltxkern.rms_norm_modulate, modulated
    if len(activations) == 2:
        operation, composition = ltxkern.gated_residual_rms_norm_modulate, gated
    return Call(
        (*activations, *tables, index),
        op=lambda *args: operation(*args[:-1], rows=args[-1]),
        composition=by_rows(composition, len(activations)),
        other={MATERIALISED: by_rows(operation, len(activations))},
    )


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """One modulation row per sample, as in text-to-video, two that a row index chooses from, or one per token."""
    random = normal(dtype, device, generator)
    batch, tokens, width = case.shape
    if case.options.get("two_rows"):
        count = 2 if case.options.get("gated") else 1
        tables = (0.2 * random(2, count + 1, width)).unbind(1)
        return prepare_index([random(*case.shape) for _ in range(count)], tables)
    rows = tokens if case.options.get("per_token") else 1
    x, scale, shift = random(*case.shape), random(batch, rows, width) * 0.2, random(batch, rows, width) * 0.2
    if case.options.get("twice"):
        args = (x, random(*case.shape), *(random(batch, rows, width) * 0.2 for _ in range(5)))
        return Call(args, op=ltxkern.gated_residual_rms_norm_modulate_twice, composition=gated_twice)
    if case.options.get("gated"):
        args = (x, random(*case.shape), random(batch, rows, width), scale, shift)
        return Call(args, op=ltxkern.gated_residual_rms_norm_modulate, composition=gated)
    peers = {"flashinfer": load_flashinfer, "Liger": load_liger} if device.type == "cuda" else {}
    return Call((x, scale, shift), op=ltxkern.rms_norm_modulate, composition=modulated, peers=peers)


GATED, TWO_ROWS = {"gated": True}, {"two_rows": True}
SUITE = Suite(
    op="rms_norm_modulate",
    cases=(
        Case("audio", (1, 126, 2048), "small"),
        Case("video_1k_tokens", (1, 1024, 4096), "small"),
        Case("video_1k_tokens_gated", (1, 1024, 4096), "small", GATED),
        Case("video_1k_tokens_gated_twice", (1, 1024, 4096), "small", {"twice": True}),
        Case("video_1k_tokens_two_rows", (1, 1024, 4096), "small", TWO_ROWS),
        Case("stage1_video", (1, 8160, 4096)),
        Case("stage1_video_gated", (1, 8160, 4096), options=GATED),
        Case("stage1_video_per_token", (1, 8160, 4096), options={"per_token": True}),
        Case("stage2_video", (1, 32640, 4096)),
        Case("stage2_video_gated", (1, 32640, 4096), options=GATED),
        Case("stage2_video_two_rows", (1, 32640, 4096), options=TWO_ROWS),
        Case("stage2_video_gated_two_rows", (1, 32640, 4096), options=GATED | TWO_ROWS),
    ),
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
