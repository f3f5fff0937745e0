"""Problems of the VAE and transformer ops: the result in fp64 by its own formula, and the composition's; the tables of all ops."""

from __future__ import annotations

import sampler_cases
import torch
from problems import Case, Draw, Launches, Problem
from torch import Tensor

import ltxkern
from ltxkern import reference
from ltxkern.ops.rms_norm_modulate import taken


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.double().reshape((1, -1) + (1,) * (x.dim() - 2))


def group_norm_case(
    name: str,
    shape: tuple[int, ...],
    groups: int,
    *,
    channels_last: bool = False,
    residual: bool | str = False,
    conv_bias: torch.dtype | bool = False,
    affine: torch.dtype | str | None = "same",
    mean: float = 0.0,
    std: float = 1.0,
    eps: float = 1e-5,
) -> Case:
    """GroupNorm + SiLU of a shape.

    `affine` "same" is x's dtype, a dtype is that one, None is no affine part; a residual is contiguous, or lies "like x".
    """

    def make(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        x = draw(*shape, mean=mean, std=std)
        if channels_last:
            x = x.to(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)
        channels = shape[1]
        kind = dtype if affine == "same" else affine
        weight = bias = None
        if kind is not None:
            kind = torch.promote_types(kind, dtype)
            weight, bias = draw(channels, dtype=kind, mean=1.0), draw(channels, dtype=kind)
        added = draw(*shape) if residual else None
        added = torch.empty_like(x).copy_(added) if residual == "like x" else added
        shift = draw(channels, dtype=None if conv_bias is True else conv_bias) if conv_bias else None

        def exact() -> list[Tensor]:
            v = x.double() if shift is None else x.double() + _per_channel(shift, x)
            grouped = v.reshape(shape[0], groups, -1)
            centred = grouped - grouped.mean(-1, keepdim=True)
            y = (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(shape)
            if weight is not None:
                y = y * _per_channel(weight, x) + _per_channel(bias, x)
            if added is not None:
                y = y + added.double()
            return [y / (1 + torch.exp(-y))]

        given, options = (x, weight, bias, groups, eps), {"residual": added, "conv_bias": shift}
        return Problem(
            lambda out: ltxkern.group_norm_silu(*given, **options, out=out[0]),
            [x],
            exact,
            lambda: [reference.group_norm_silu(*given, **options)],
        )

    return Case(f"group_norm_silu-{name}", make)


def pixel_norm_case(
    name: str,
    shape: tuple[int, ...],
    *,
    channels_last: bool = False,
    weight: torch.dtype | None = None,
    std: float = 1.0,
) -> Case:
    """PixelNorm + SiLU of a shape."""

    def make(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        x = draw(*shape, std=std)
        if channels_last:
            x = x.to(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)
        factor = None if weight is None else draw(shape[1], dtype=torch.promote_types(weight, dtype))

        def exact() -> list[Tensor]:
            y = x.double()
            y = y / (y.square().mean(1, keepdim=True) + 1e-8).sqrt()
            if factor is not None:
                y = y * _per_channel(factor, x)
            return [y / (1 + torch.exp(-y))]

        return Problem(
            lambda out: ltxkern.pixel_norm_silu(x, weight=factor, out=out[0]),
            [x],
            exact,
            lambda: [reference.pixel_norm_silu(x, 1e-8, factor)],
        )

    return Case(f"pixel_norm_silu-{name}", make)


def modulate_case(
    name: str,
    lead: tuple[int, ...],
    rows: tuple[int, ...],
    width: int,
    *,
    weight: bool,
    std: float = 1.0,
    index: torch.dtype | None = None,
) -> list[Case]:
    """rms_norm_modulate and its gated form; `rows`: leading dims of scale, shift and gate; an `index` points into them."""

    def draw_index(device: str) -> Tensor | None:
        return None if index is None else _row_index(device, lead, rows[0], index)

    def plain(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        x, scale, shift = draw(*lead, width, std=std), draw(*rows, width), draw(*rows, width)
        factor = draw(width) if weight else None
        places = draw_index(device)
        return Problem(
            lambda out: ltxkern.rms_norm_modulate(x, scale, shift, weight=factor, rows=places, out=out[0]),
            [x],
            lambda: [_modulated(x, *taken(places, scale, shift), factor)],
            lambda: [reference.rms_norm_modulate(x, scale, shift, 1e-6, factor, places)],
        )

    def gated(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        x, y = draw(*lead, width), draw(*lead, width)
        gate, scale, shift = (draw(*rows, width) for _ in range(3))
        factor = draw(width) if weight else None
        places = draw_index(device)
        given = (x, y, gate, scale, shift)

        def composed() -> tuple[Tensor, Tensor]:
            return reference.gated_residual_rms_norm_modulate(*given, 1e-6, factor, places)

        def exact() -> list[Tensor]:
            each = taken(places, gate, scale, shift)
            return [x.double() + y.double() * each[0].double(), _modulated(composed()[0], *each[1:], factor)]

        return Problem(
            lambda out: ltxkern.gated_residual_rms_norm_modulate(*given, weight=factor, rows=places, out=tuple(out)),
            [x, x],
            exact,
            composed,
        )

    return [Case(f"rms_norm_modulate-{name}", plain), Case(f"gated_residual_rms_norm_modulate-{name}", gated)]


def _modulated(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None) -> Tensor:
    v = x.double()
    v = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (v if weight is None else v * weight.double()) * (1 + scale.double()) + shift.double()


def _row_index(device: str, lead: tuple[int, ...], count: int, dtype: torch.dtype) -> Tensor:
    size = torch.Size(lead).numel()
    return torch.arange(size, device=device, dtype=dtype).mul(3).remainder(count).view(lead)


def residual_case(name: str, shape: tuple[int, ...], gate_shape: tuple[int, ...], *, indexed: bool = False) -> Case:
    """gated_residual; where `indexed` the gate is a table."""

    def make(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        x, y, gate = draw(*shape), draw(*shape), draw(*gate_shape)
        rows = _row_index(device, shape[:-1], gate_shape[0], torch.int64) if indexed else None
        return Problem(
            lambda out: ltxkern.gated_residual(x, y, gate, rows=rows, out=out[0]),
            [x],
            lambda: [x.double() + y.double() * taken(rows, gate)[0].double()],
            lambda: [reference.gated_residual(x, y, gate, rows)],
        )

    return Case(f"gated_residual-{name}", make)


def head_gate_case(name: str, shape: tuple[int, ...]) -> Case:
    """head_gate of (..., heads, head_dim)."""

    def make(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        x, logits = draw(*shape), draw(*shape[:-1], std=3.0)
        return Problem(
            lambda out: ltxkern.head_gate(x, logits, out=out[0]),
            [x],
            lambda: [x.double() * 2 * torch.sigmoid(logits.double())[..., None]],
            lambda: [reference.head_gate(x, logits)],
        )

    return Case(f"head_gate-{name}", make)


def rope_case(
    name: str,
    batch: int,
    tokens: int,
    heads: int,
    depth: int,
    layout: str,
    tables: int,
    table_dtype: torch.dtype | None = None,
) -> Case:
    """qk_norm_rope; `tables`: batch size of the rotation tables, which have q's dtype unless another is given."""

    def make(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        q, k = draw(batch, tokens, heads * depth), draw(batch, tokens, heads * depth)
        weights = draw(heads * depth), draw(heads * depth)
        angle = draw(tables, heads, tokens, depth // 2, dtype=torch.float64, std=3.0)
        cos, sin = angle.cos().to(table_dtype or dtype), angle.sin().to(table_dtype or dtype)

        def rotated(v: Tensor, weight: Tensor) -> Tensor:
            v = v.double()
            v = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
            v = v.reshape(batch, tokens, heads, depth)
            c, s = cos.double().transpose(1, 2), sin.double().transpose(1, 2)
            first, second = v.chunk(2, -1) if layout == "split" else (v[..., 0::2], v[..., 1::2])
            pair = (first * c - second * s, second * c + first * s)
            joined = torch.cat(pair, -1) if layout == "split" else torch.stack(pair, -1).flatten(-2)
            return joined.flatten(-2)

        return Problem(
            lambda out: ltxkern.qk_norm_rope(q, k, *weights, cos, sin, layout=layout, out=tuple(out)),
            [q, k],
            lambda: [rotated(q, weights[0]), rotated(k, weights[1])],
            lambda: reference.qk_norm_rope(q, k, *weights, cos, sin, 1e-6, layout),
        )

    return Case(f"qk_norm_rope-{name}", make)


SMALL_CASES: list[Case] = [
    group_norm_case("2d", (3, 12), 4),
    group_norm_case("3d-prime", (2, 6, 13), 3, affine=None),
    group_norm_case("5d", (2, 12, 3, 5, 7), 4, residual=True, conv_bias=True, affine=torch.float32),
    group_norm_case("5d-last", (2, 12, 3, 5, 7), 4, channels_last=True, residual=True, conv_bias=True),
    group_norm_case("4d-last-depth1", (1, 8, 5, 3), 8, channels_last=True),
    group_norm_case("mean1e4", (1, 8, 2, 9, 7), 2, mean=1e4),
    group_norm_case("near-eps", (1, 8, 2, 9, 7), 2, std=3e-3),
    group_norm_case("one-position", (2, 8, 1, 1, 1), 2, residual=True),
    pixel_norm_case("5d", (2, 12, 3, 3, 5)),
    pixel_norm_case("5d-last", (2, 12, 3, 3, 5), channels_last=True, weight=torch.float32),
    pixel_norm_case("near-eps", (2, 12, 3, 5), std=1e-4),
    pixel_norm_case("2d", (5, 7), weight=torch.bfloat16),
    pixel_norm_case("1024", (1, 1024, 1, 3, 3)),
    pixel_norm_case("1024-last", (1, 1024, 1, 3, 3), channels_last=True),
    *modulate_case("row", (2, 5), (2, 1), 37, weight=False),
    *modulate_case("tokens", (2, 5), (2, 5), 64, weight=True),
    *modulate_case("flat", (7,), (), 9, weight=False, std=1e-3),
    *modulate_case("index", (2, 5), (3,), 37, weight=True, index=torch.int64),
    *modulate_case("index32", (7,), (2,), 64, weight=False, index=torch.int32),
    residual_case("row", (2, 5, 37), (2, 1, 37)),
    residual_case("full", (2, 5, 37), (2, 5, 37)),
    residual_case("token", (2, 5, 37), (5, 1)),
    residual_case("scalar", (2, 5, 37), (1,)),
    residual_case("number", (2, 5, 37), ()),
    residual_case("index", (2, 5, 37), (3, 37), indexed=True),
    head_gate_case("odd", (2, 5, 3, 24)),
    rope_case("split", 2, 5, 3, 8, "split", 2),
    rope_case("shared", 2, 3, 4, 12, "split", 1),
    rope_case("interleaved", 2, 3, 3, 8, "interleaved", 2),
    *sampler_cases.SMALL,
]
MIDDLE_CASES: list[Case] = [
    group_norm_case("8x45x80", (1, 64, 8, 45, 80), 32, residual=True, conv_bias=True, affine=torch.float32),
    group_norm_case("17x30-last", (1, 128, 16, 17, 30), 32, channels_last=True, residual=True, conv_bias=True),
    group_norm_case("prime", (2, 48, 7, 31, 37), 3),
    group_norm_case("prime-last", (2, 48, 7, 31, 37), 16, channels_last=True),
    group_norm_case("mean1e4", (1, 32, 8, 45, 80), 8, mean=1e4),
    group_norm_case("single", (3, 128, 5, 9), 32, residual=True),
    pixel_norm_case("512", (1, 512, 3, 17, 30)),
    pixel_norm_case("512-last", (1, 512, 3, 17, 30), channels_last=True, weight=torch.float32),
    *modulate_case("4096", (1, 513), (1, 1), 4096, weight=False),
    rope_case("32x128", 1, 513, 32, 128, "split", 1),
    *sampler_cases.MIDDLE,
]
BF16, FP32 = torch.bfloat16, torch.float32


def _upsampler(*shape: int, last: bool = False, full: bool = False) -> list[Case]:
    options = {"channels_last": last, "residual": "like x" if full else False, "conv_bias": FP32 if full else False}
    return [group_norm_case("", (1, *shape), 32, affine=FP32, **options)]


def _decoder(*shape: int, last: bool = False) -> list[Case]:
    return [pixel_norm_case("", (1, *shape), channels_last=last)]


TOKENS = (1, 32640)
PRODUCTION_CASES: Launches = {
    "group_norm-8x45x80": (_upsampler(512, 8, 45, 80), BF16),
    "group_norm-16x180x320": (_upsampler(512, 16, 180, 320), BF16),
    "group_norm-1024-16x34x60-full": (_upsampler(1024, 16, 34, 60, full=True), BF16),
    "group_norm-1024-16x34x60-last-full": (_upsampler(1024, 16, 34, 60, last=True, full=True), BF16),
    "group_norm-fp32-8x45x80": (_upsampler(512, 8, 45, 80), FP32),
    "group_norm-single-512-8x8x8": (_upsampler(512, 8, 8, 8, full=True), BF16),
    "pixel_norm-128": (_decoder(128, 9, 272, 480), BF16),
    "pixel_norm-1024": (_decoder(1024, 9, 68, 120), BF16),
    "pixel_norm-128-last": (_decoder(128, 9, 272, 480, last=True), BF16),
    "pixel_norm-1024-last": (_decoder(1024, 9, 68, 120, last=True), BF16),
    **sampler_cases.PRODUCTION,
    "block-4096": (
        [
            *modulate_case("", TOKENS, (1, 1), 4096, weight=False),
            residual_case("", (*TOKENS, 4096), (1, 1, 4096)),
            head_gate_case("", (*TOKENS, 32, 128)),
            rope_case("", *TOKENS, 32, 128, "split", 1, FP32),
        ],
        BF16,
    ),
    "block-by-rows-4096": (
        [
            *modulate_case("", TOKENS, (2,), 4096, weight=False, index=torch.int64),
            residual_case("", (*TOKENS, 4096), (2, 4096), indexed=True),
        ],
        BF16,
    ),
}
