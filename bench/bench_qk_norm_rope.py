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
from ltxkern.ops.qk_norm_rope import RotaryTables

EPS = 1e-6
HEADS = 32


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Split rotation of (B, T, inner) by (B, heads, T, d/2) tables."""
    heads = cos.shape[1]
    first, second = x.unflatten(-1, (heads, 2, -1)).unbind(-2)
    c, s = cos.transpose(1, 2), sin.transpose(1, 2)
    return torch.stack([first * c - second * s, second * c + first * s], dim=-2).flatten(-3)


def composition(*args: Any) -> tuple[Tensor, ...]:
    """RMSNorm over the inner dim, then the rotation, each step rounded; tables by row are spread over the tokens first."""
    q, k, q_weight, k_weight, tables, k_tables = args
    sides = (q, q_weight, tables), (k, k_weight, k_tables or tables)
    pairs = q.shape[-1] // (2 * HEADS)
    return tuple(
        rotated(F.rms_norm(x, (x.shape[-1],), weight, EPS), *RotaryTables(*own).by_token(HEADS, pairs)).to(x.dtype)
        for x, weight, own in sides
    )


def op(*args: Any) -> tuple[Tensor, Tensor]:
    """The op on tables (cos, sin) by token or (cos, sin, rows); those of k are None where they are those of q."""
    q, k, q_weight, k_weight, tables, k_tables = args
    cos, sin, rows = RotaryTables(*tables)
    heads = None if rows is None else HEADS
    k_cos, k_sin, k_rows = RotaryTables(*k_tables) if k_tables else (None, None, None)
    return ltxkern.qk_norm_rope(
        q, k, q_weight, k_weight, cos, sin, rows=rows, heads=heads, k_cos=k_cos, k_sin=k_sin, k_rows=k_rows
    )


def load_comfy_kitchen() -> Callable[..., Any]:
    """comfy-kitchen's split rotation behind torch's RMSNorm; the matrices of the rotation are built beforehand, per table."""
    from comfy_kitchen import apply_rope_split_half

    tables: dict[int, Tensor] = {}

    def call(*args: Any) -> tuple[Tensor, Tensor]:
        q, k, q_weight, k_weight, (cos, sin), _ = args
        if cos.data_ptr() not in tables:
            c, s = cos.transpose(1, 2), sin.transpose(1, 2)
            tables[cos.data_ptr()] = torch.stack([c, -s, s, c], dim=-1).unflatten(-1, (2, 2)).contiguous()
        heads = cos.shape[1]
        q = F.rms_norm(q, (q.shape[-1],), q_weight, EPS).unflatten(-1, (heads, -1))
        k = F.rms_norm(k, (k.shape[-1],), k_weight, EPS).unflatten(-1, (heads, -1))
        q, k = apply_rope_split_half(q, k, tables[cos.data_ptr()])
        return q.flatten(-2), k.flatten(-2)

    return call


def tables_of(
    case: Case,
    tokens: int,
    grid: tuple[int, ...],
    dtype: torch.dtype,
    random: Callable[..., Tensor],
    *,
    by_time: bool = False,
) -> tuple[Tensor, ...]:
    """True rotations, by token, or by row of each axis of a grid; of the attention between modalities by its first axis alone."""
    pairs, fp32 = case.shape[-1] // (2 * HEADS), case.options.get("fp32", False)
    if not grid:
        angle = random(case.shape[0], HEADS, tokens, pairs) * 3
        kind = torch.float32 if fp32 else dtype
        return angle.cos().to(kind), angle.sin().to(kind)
    axes = 1 if by_time else len(grid)
    angle = random(sum(grid[:axes]), -(-HEADS * pairs // axes)) * 3
    numbers = torch.arange(sum(grid), dtype=torch.int32, device=angle.device).split(grid)
    rows = torch.stack([axis.flatten() for axis in torch.meshgrid(*numbers, indexing="ij")][:axes])[None]
    tables = RotaryTables(angle.cos(), angle.sin(), rows)
    # As the pipeline makes them.
    return tables.side_by_side() if axes > 1 else tables


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """Queries, keys, weights near one and tables of true rotations."""
    batch, tokens, inner = case.shape
    random = normal(torch.float32, device, generator)
    grid, keys = case.options.get("grid", ()), case.options.get("keys", tokens)
    tables = tables_of(case, tokens, grid, dtype, random, by_time=keys != tokens)
    k_tables = tables_of(case, keys, (keys,), dtype, random) if keys != tokens else None
    weights = [(1 + 0.1 * random(inner)).to(dtype) for _ in range(2)]
    q, k = (random(batch, count, inner).to(dtype) for count in (tokens, keys))
    args = (q, k, *weights, tables, k_tables)
    peers = {"comfy-kitchen": load_comfy_kitchen} if device.type == "cuda" and not grid else {}
    return Call(args, op=op, composition=composition, peers=peers)


GRIDS: dict[str, Any] = {"small": (8, 8, 16), "stage2": (16, 34, 60)}
SUITE = Suite(
    op="qk_norm_rope",
    cases=(
        Case("audio", (1, 126, 2048), "small"),
        Case("video_1k_tokens", (1, 1024, 4096), "small"),
        Case("video_1k_tokens_fp32_tables", (1, 1024, 4096), "small", {"fp32": True}),
        Case("video_1k_tokens_by_row", (1, 1024, 4096), "small", {"grid": GRIDS["small"]}),
        Case("video_1k_tokens_to_audio", (1, 1024, 2048), "small", {"grid": GRIDS["small"], "keys": 126}),
        Case("stage1_video", (1, 8160, 4096)),
        Case("stage1_cross", (1, 8160, 2048)),
        Case("stage2_video", (1, 32640, 4096)),
        Case("stage2_video_fp32_tables", (1, 32640, 4096), options={"fp32": True}),
        Case("stage2_video_by_row", (1, 32640, 4096), options={"grid": GRIDS["stage2"]}),
        Case("stage2_video_to_audio", (1, 32640, 2048), options={"grid": GRIDS["stage2"], "keys": 126}),
    ),
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
