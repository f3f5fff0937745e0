"""Benchmark of qk_norm_rope at the attention shapes of the LTX-2.3 transformer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ltxkern
from cases import Call, Case, Suite, normal
from command_line import main

EPS = 1e-6


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Split rotation of (B, T, inner) by (B, heads, T, d/2) tables."""
    heads = cos.shape[1]
    first, second = x.unflatten(-1, (heads, 2, -1)).unbind(-2)
    c, s = cos.transpose(1, 2), sin.transpose(1, 2)
    return torch.stack([first * c - second * s, second * c + first * s], dim=-2).flatten(-3)


def composition(*args: Tensor) -> tuple[Tensor, ...]:
    """RMSNorm over the inner dim, then the rotation, each step rounded."""
    q, k, q_weight, k_weight, cos, sin = args
    return tuple(rotated(F.rms_norm(x, (x.shape[-1],), w, EPS), cos, sin) for x, w in ((q, q_weight), (k, k_weight)))


def load_comfy_kitchen() -> Callable[..., Any]:
    """comfy-kitchen's split rotation behind torch's RMSNorm; the matrices of the rotation are built beforehand, per table."""
    from comfy_kitchen import apply_rope_split_half

    tables: dict[int, Tensor] = {}

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        q, k, q_weight, k_weight, cos, sin = args
        if cos.data_ptr() not in tables:
            c, s = cos.transpose(1, 2), sin.transpose(1, 2)
            tables[cos.data_ptr()] = torch.stack([c, -s, s, c], dim=-1).unflatten(-1, (2, 2)).contiguous()
        heads = cos.shape[1]
        q = F.rms_norm(q, (q.shape[-1],), q_weight, EPS).unflatten(-1, (heads, -1))
        k = F.rms_norm(k, (k.shape[-1],), k_weight, EPS).unflatten(-1, (heads, -1))
        q, k = apply_rope_split_half(q, k, tables[cos.data_ptr()])
        return q.flatten(-2), k.flatten(-2)

    return call


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """Queries, keys, weights near one and tables of true rotations."""
    batch, tokens, inner = case.shape
    heads = 32
    random = normal(torch.float32, device, generator)
    angle = random(batch, heads, tokens, inner // heads // 2) * 3
    weights = [(1 + 0.1 * random(inner)).to(dtype) for _ in range(2)]
    q, k = (random(*case.shape).to(dtype) for _ in range(2))
    args = (q, k, *weights, angle.cos().to(dtype), angle.sin().to(dtype))
    peers = {"comfy-kitchen": load_comfy_kitchen} if device.type == "cuda" else {}
    return Call(args, op=ltxkern.qk_norm_rope, composition=composition, peers=peers)


SUITE = Suite(
    op="qk_norm_rope",
    cases=(
        Case("audio", (1, 126, 2048), "small"),
        Case("video_1k_tokens", (1, 1024, 4096), "small"),
        Case("stage1_video", (1, 8160, 4096)),
        Case("stage1_cross", (1, 8160, 2048)),
        Case("stage2_video", (1, 32640, 4096)),
    ),
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
