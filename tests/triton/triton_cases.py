"""Small problems for every op: the public call, the result in fp64 by its own formula, and the torch composition's result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from problems import Case, Draw, Problem, problem
from sampler_cases import dual_add_case, guidance_case, half_step_cases, merge_case, noise_case, sde_case
from torch import Tensor

import ltxkern
from ltxkern import reference
from ltxkern.ops.row_index import taken


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.double().reshape((1, -1) + (1,) * (x.dim() - 2))


def group_norm_case(
    name: str,
    shape: tuple[int, ...],
    groups: int,
    *,
    channels_last: bool = False,
    residual: bool = False,
    conv_bias: bool = False,
    affine: torch.dtype | str | None = "same",
    mean: float = 0.0,
    std: float = 1.0,
    eps: float = 1e-5,
) -> Case:
    """GroupNorm + SiLU of a shape; `affine` "same" is x's dtype, a dtype is that one, None is no affine part."""

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
        shift = draw(channels) if conv_bias else None
        v = x.double() if shift is None else x.double() + _per_channel(shift, x)
        grouped = v.reshape(shape[0], groups, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        y = (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(shape)
        if weight is not None:
            y = y * _per_channel(weight, x) + _per_channel(bias, x)
        if added is not None:
            y = y + added.double()
        composed = reference.group_norm_silu(x, weight, bias, groups, eps, added, shift)
        options = {"residual": added, "conv_bias": shift}
        return problem(
            lambda out: ltxkern.group_norm_silu(x, weight, bias, groups, eps, **options, out=out[0]),
            [y / (1 + torch.exp(-y))],
            [composed],
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
        y = x.double()
        y = y / (y.square().mean(1, keepdim=True) + 1e-8).sqrt()
        if factor is not None:
            y = y * _per_channel(factor, x)
        return problem(
            lambda out: ltxkern.pixel_norm_silu(x, weight=factor, out=out[0]),
            [y / (1 + torch.exp(-y))],
            [reference.pixel_norm_silu(x, 1e-8, factor)],
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
        size = torch.Size(lead).numel()
        return (
            None
            if index is None
            else torch.arange(size, device=device, dtype=index).mul(3).remainder(rows[0]).view(lead)
        )

    def plain(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        x, scale, shift = draw(*lead, width, std=std), draw(*rows, width), draw(*rows, width)
        factor = draw(width) if weight else None
        places = draw_index(device)
        return problem(
            lambda out: ltxkern.rms_norm_modulate(x, scale, shift, weight=factor, rows=places, out=out[0]),
            [_modulated(x, *taken(places, scale, shift), factor)],
            [reference.rms_norm_modulate(x, scale, shift, 1e-6, factor, places)],
        )

    def gated(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        x, y = draw(*lead, width), draw(*lead, width)
        gate, scale, shift = (draw(*rows, width) for _ in range(3))
        factor = draw(width) if weight else None
        places = draw_index(device)
        composed = reference.gated_residual_rms_norm_modulate(x, y, gate, scale, shift, 1e-6, factor, places)
        each = taken(places, gate, scale, shift)
        return problem(
            lambda out: ltxkern.gated_residual_rms_norm_modulate(
                x, y, gate, scale, shift, weight=factor, rows=places, out=tuple(out)
            ),
            [x.double() + y.double() * each[0].double(), _modulated(composed[0], *each[1:], factor)],
            composed,
        )

    return [Case(f"rms_norm_modulate-{name}", plain), Case(f"gated_residual_rms_norm_modulate-{name}", gated)]


def _modulated(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None) -> Tensor:
    v = x.double()
    v = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (v if weight is None else v * weight.double()) * (1 + scale.double()) + shift.double()


def gate_cases() -> list[Case]:
    """gated_residual with gates of several shapes, and head_gate."""

    def residual(gate_shape: tuple[int, ...], indexed: bool = False) -> Callable[[str, torch.dtype], Problem]:
        def make(device: str, dtype: torch.dtype) -> Problem:
            draw = Draw(device, dtype)
            x, y, gate = draw(2, 5, 37), draw(2, 5, 37), draw(*gate_shape)
            rows = torch.arange(10, device=device).remainder(gate_shape[0]).view(2, 5) if indexed else None
            (each,) = taken(rows, gate)
            return problem(
                lambda out: ltxkern.gated_residual(x, y, gate, rows=rows, out=out[0]),
                [x.double() + y.double() * each.double()],
                [reference.gated_residual(x, y, gate, rows)],
            )

        return make

    def head(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        x, logits = draw(2, 5, 3, 24), draw(2, 5, 3, std=3.0)
        return problem(
            lambda out: ltxkern.head_gate(x, logits, out=out[0]),
            [x.double() * 2 * torch.sigmoid(logits.double())[..., None]],
            [reference.head_gate(x, logits)],
        )

    shapes = {"row": (2, 1, 37), "full": (2, 5, 37), "token": (5, 1), "scalar": (1,), "number": ()}
    return [Case(f"gated_residual-{name}", residual(shape)) for name, shape in shapes.items()] + [
        Case("gated_residual-index", residual((3, 37), indexed=True)),
        Case("head_gate-odd", head),
    ]


def rope_case(name: str, batch: int, tokens: int, heads: int, depth: int, layout: str, tables: int) -> Case:
    """qk_norm_rope; `tables`: batch size of the rotation tables."""

    def make(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        q, k = draw(batch, tokens, heads * depth), draw(batch, tokens, heads * depth)
        weights = draw(heads * depth), draw(heads * depth)
        angle = draw(tables, heads, tokens, depth // 2, dtype=torch.float64, std=3.0)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        exact = []
        for v, weight in ((q, weights[0]), (k, weights[1])):
            v = v.double()
            v = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
            v = v.reshape(batch, tokens, heads, depth)
            c, s = cos.double().transpose(1, 2), sin.double().transpose(1, 2)
            first, second = v.chunk(2, -1) if layout == "split" else (v[..., 0::2], v[..., 1::2])
            pair = (first * c - second * s, second * c + first * s)
            joined = torch.cat(pair, -1) if layout == "split" else torch.stack(pair, -1).flatten(-2)
            exact.append(joined.flatten(-2))
        return problem(
            lambda out: ltxkern.qk_norm_rope(q, k, *weights, cos, sin, layout=layout, out=tuple(out)),
            exact,
            reference.qk_norm_rope(q, k, *weights, cos, sin, 1e-6, layout),
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
    *noise_case("packed", (2, 13, 12)),
    *noise_case("slices", (1, 3, 2, 5, 7), mean=0.5, std=2.0),
    *noise_case("mean1000std", (2, 2, 5, 7), mean=100.0, std=0.1, dtypes=(torch.float32, torch.float64)),
    *noise_case("one", (7, 11)),
    guidance_case("cfg", (2, 13, 7), 1, 0.7),
    guidance_case("all", (2, 13, 7), 3, 0.45, mean=5.0),
    guidance_case("no-rescale", (3, 5), 2, 0.0),
    guidance_case("rescale-only", (3, 5), 0, 0.5),
    sde_case("same", (2, 5, 7), wide=False, raw=False),
    sde_case("wide-raw", (2, 5, 7), wide=True, raw=True),
    *half_step_cases("plain", [(2, 7, 6)], step=0, masked=False, raw=False, compute=torch.float64),
    *half_step_cases("masked-raw", [(2, 7, 6)], step=1, masked=True, raw=True, compute=torch.float64),
    *half_step_cases("two", [(2, 7, 6), (2, 3, 8)], step=2, masked=False, raw=True, compute=torch.float64),
    *half_step_cases("two-fp32", [(1, 7, 6), (1, 3, 8)], step=0, masked=True, raw=True, compute=torch.float32),
    *half_step_cases("three", [(1, 2, 5)] * 3, step=1, masked=False, raw=False, compute=torch.float64),
    dual_add_case("odd", (37, 53)),
    dual_add_case("scalar", ()),
    merge_case("one", (37, 53), [5], None),
    merge_case("several", (37, 53), [5, 40, 3], None),
    merge_case("fp32-factors", (37, 53), [5, 8], torch.float32),
    *modulate_case("row", (2, 5), (2, 1), 37, weight=False),
    *modulate_case("tokens", (2, 5), (2, 5), 64, weight=True),
    *modulate_case("flat", (7,), (), 9, weight=False, std=1e-3),
    *modulate_case("index", (2, 5), (3,), 37, weight=True, index=torch.int64),
    *modulate_case("index32", (7,), (2,), 64, weight=False, index=torch.int32),
    *gate_cases(),
    rope_case("split", 2, 5, 3, 8, "split", 2),
    rope_case("shared", 2, 3, 4, 12, "split", 1),
    rope_case("interleaved", 2, 3, 3, 8, "interleaved", 2),
]


def assert_close_to_exact(results: list[Tensor], problem: Problem, label: str) -> None:
    """Error against fp64 at most 1.5 times that of the torch composition, on RMS and on the maximum."""
    for index, (result, exact, composed) in enumerate(zip(results, problem.exact, problem.composed, strict=True)):
        assert result.shape == composed.shape
        assert result.dtype == composed.dtype
        error, allowed = (result.double() - exact).abs(), (composed.double() - exact).abs()
        # Where the composition happens to be exact, the resolution of the compute dtype is the measure.
        floor = exact.abs().max() * (2e-15 if result.dtype == torch.float64 else 6e-8)
        for name, measure in (("RMS", lambda e: e.square().mean().sqrt()), ("maximum", lambda e: e.max())):
            got, limit = measure(error), 1.5 * measure(allowed) + floor
            assert got <= limit, f"{label}[{index}]: {name} error {got:.3e}, at most {limit:.3e} allowed"
