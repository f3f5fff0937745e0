"""Small problems for every op: the public call, the result in fp64 by its own formula, and the torch composition's result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import ltxkern
from ltxkern import reference

HALF_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAMPLER_DTYPES = (*HALF_DTYPES, torch.float64)


@dataclass(frozen=True)
class Problem:
    """`call(out)` writes into poisoned outputs; `exact` is fp64; `composed` is the torch composition in the op's dtypes."""

    call: Callable[[list[Tensor]], object]
    outputs: Callable[[], list[Tensor]]
    exact: list[Tensor]
    composed: list[Tensor]


@dataclass(frozen=True)
class Case:
    """One op with one set of sizes; `make(device, dtype)` builds the problem."""

    name: str
    make: Callable[[str, torch.dtype], Problem]
    dtypes: tuple[torch.dtype, ...] = HALF_DTYPES

    def __str__(self) -> str:
        return self.name


class Draw:
    """Seeded tensors, the same numbers on every device."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, mean: float = 0.0, std: float = 1.0) -> Tensor:
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64) * std + mean
        return value.to(dtype or self.dtype).to(self.device)


def poisoned(models: Sequence[Tensor]) -> list[Tensor]:
    """Tensors like the models, full of NaN."""
    return [torch.full_like(model, float("nan")) for model in models]


def _problem(call: Callable[[list[Tensor]], object], exact: Sequence[Tensor], composed: Sequence[Tensor]) -> Problem:
    return Problem(call, lambda: poisoned(composed), list(exact), list(composed))


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
        return _problem(
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
        return _problem(
            lambda out: ltxkern.pixel_norm_silu(x, weight=factor, out=out[0]),
            [y / (1 + torch.exp(-y))],
            [reference.pixel_norm_silu(x, 1e-8, factor)],
        )

    return Case(f"pixel_norm_silu-{name}", make)


def _standardised(x: Tensor) -> Tensor:
    """In extended precision, since fp64 noise is held to fp64 arithmetic; twice, as the sampler's rule says, equals once."""
    v = x.detach().cpu().double().numpy().astype(np.longdouble)
    v = v - v.mean((-2, -1), keepdims=True)
    count = v.shape[-1] * v.shape[-2]
    v = v / np.sqrt((v * v).sum((-2, -1), keepdims=True) / (count - 1))
    return torch.from_numpy(v.astype(np.float64)).to(x.device)


def noise_case(
    name: str,
    shape: tuple[int, ...],
    *,
    mean: float = 0.0,
    std: float = 1.0,
    dtypes: tuple[torch.dtype, ...] = SAMPLER_DTYPES,
) -> list[Case]:
    """normalize_noise, channelwise_normalize and noise_statistics of a shape."""

    def normalize(device: str, dtype: torch.dtype) -> Problem:
        x = Draw(device, dtype)(*shape, mean=mean, std=std)
        return _problem(
            lambda out: ltxkern.normalize_noise(x, out=out[0]), [_standardised(x)], [reference.normalize_noise(x)]
        )

    def channelwise(device: str, dtype: torch.dtype) -> Problem:
        x = Draw(device, dtype)(*shape, mean=mean, std=std)
        return _problem(
            lambda out: ltxkern.channelwise_normalize(x, out=out[0]),
            [_standardised(x)],
            [reference.channelwise_normalize(x)],
        )

    def statistics(device: str, dtype: torch.dtype) -> Problem:
        x = Draw(device, dtype)(*shape, mean=mean, std=std)
        stats = reference.noise_statistics(x)
        return _problem(lambda out: ltxkern.noise_statistics(x, out=out[0]), [stats], [stats])

    makers = {"normalize_noise": normalize, "channelwise_normalize": channelwise, "noise_statistics": statistics}
    return [Case(f"{op}-{name}", make, dtypes) for op, make in makers.items()]


def guidance_case(name: str, shape: tuple[int, ...], branches: int, rescale: float, mean: float = 0.0) -> Case:
    """combine_guidance with one to three further branches."""

    def make(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        cond, *others = [draw(*shape, mean=mean) for _ in range(4)]
        used = [other if i < branches else None for i, other in enumerate(others)]
        scales = [3.0 if branches > 0 else 1.0, 1.25 if branches > 1 else 0.0, 2.5 if branches > 2 else 1.0]
        base = cond.double()
        pred = base.clone()
        for other, factor in zip(used, (scales[0] - 1, scales[1], scales[2] - 1), strict=True):
            if other is not None:
                pred += factor * (base - other.double())
        if rescale:
            pred = pred * (rescale * base.std() / pred.std() + 1 - rescale)
        names = ("cfg_scale", "stg_scale", "modality_scale")
        return _problem(
            lambda out: ltxkern.combine_guidance(
                cond, *used, **dict(zip(names, scales, strict=True)), rescale_scale=rescale, out=out[0]
            ),
            [pred],
            [reference.combine_guidance(cond, *used, *scales, rescale)],
        )

    return Case(f"combine_guidance-{name}", make, SAMPLER_DTYPES)


STEPS = ltxkern.res2s_steps([1.0, 0.93, 0.6, 0.31])


def sde_case(name: str, shape: tuple[int, ...], *, wide: bool, raw: bool) -> Case:
    """One SDE step; `wide`: sample and noise in fp64; `raw`: unnormalised noise with its statistics."""

    def make(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        kind = torch.float64 if wide else dtype
        sample, denoised = draw(*shape, dtype=kind), draw(*shape)
        noise = draw(*shape, dtype=kind, mean=0.2 if raw else 0.0, std=1.3 if raw else 1.0)
        stats = reference.noise_statistics(noise) if raw else None
        a, b, s = STEPS[1].advance
        ready = _standardised(noise) if raw else noise.double()
        return _problem(
            lambda out: ltxkern.res2s_sde_step(
                sample, denoised, STEPS[1].sigma, STEPS[1].sigma_next, noise, noise_stats=stats, out=out[0]
            ),
            [a * sample.double() + b * denoised.double() + s * ready],
            [reference.res2s_sde_step(sample, denoised, noise, [a, b, s], stats)],
        )

    return Case(f"res2s_sde_step-{name}", make, SAMPLER_DTYPES)


@dataclass(frozen=True)
class Modality:
    """Inputs of a half-step for one modality, and their mask in fp64."""

    state: Tensor
    x0: Tensor
    second: Tensor
    noise: Tensor
    mask: Tensor | None
    clean: Tensor | None
    stats: Tensor | None

    def masked(self, value: Tensor) -> Tensor:
        if self.mask is None:
            return value
        return value * self.mask.double() + self.clean.double() * (1 - self.mask.double())

    def ready(self) -> Tensor:
        return self.noise.double() if self.stats is None else _standardised(self.noise)


def _modality(draw: Draw, shape: tuple[int, ...], masked: bool, raw: bool) -> Modality:
    noise = draw(*shape, dtype=torch.float64, mean=0.2 if raw else 0.0, std=1.3 if raw else 1.0)
    mask = None
    if masked:
        mask = (torch.rand((*shape[:-1], 1), generator=draw.generator) > 0.4).float().to(draw.device)
    return Modality(
        draw(*shape), draw(*shape), draw(*shape), noise, mask, draw(*shape) if masked else None,
        reference.noise_statistics(noise) if raw else None,
    )  # fmt: skip


def half_step_cases(
    name: str, shapes: list[tuple[int, ...]], *, step: int, masked: bool, raw: bool, compute: torch.dtype
) -> list[Case]:
    """Both half-steps for one or several modalities."""
    plan = STEPS[step]

    def columns(parts: list[Modality], *names: str) -> list[list[Tensor | None]]:
        return [[getattr(part, name) for part in parts] for name in names]

    def midpoint(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        parts = [_modality(draw, shape, masked, raw) for shape in shapes]
        c, (a, b, s) = plan.contraction, plan.substep
        mids, anchors = [], []
        for part in parts:
            x, d = part.state.double(), part.masked(part.x0.double())
            moved = part.masked(a * x + b * (x + c * (d - x)) + s * part.ready())
            mids.append(moved)
            anchors.append((moved - c * d) / (1 - c) if plan.refine else x)
        latent, x0, noise, mask, clean, stats = columns(parts, "state", "x0", "noise", "mask", "clean", "stats")
        composed = reference.res2s_midpoint(latent, x0, noise, mask, clean, stats, [c, a, b, s], plan.refine, compute)
        count = len(parts)
        return _problem(
            lambda out: ltxkern.res2s_midpoint(
                latent, x0, noise, plan, mask=mask, clean=clean, noise_stats=stats, compute_dtype=compute,
                out=(out[:count], out[count:]),
            ),
            mids + anchors,
            composed,
        )  # fmt: skip

    def advance(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        parts = [_modality(draw, shape, masked, raw) for shape in shapes]
        parts = [replace(part, state=draw(*shape, dtype=compute)) for part, shape in zip(parts, shapes, strict=True)]
        hb1, hb2, (a, b, s) = plan.h * plan.b1, plan.h * plan.b2, plan.advance
        results = []
        for part in parts:
            x, first, second = (
                part.state.double(), part.masked(part.x0.double()), part.masked(part.second.double())
            )  # fmt: skip
            moved = x + (hb1 * (first - x) + hb2 * (second - x))
            results.append(part.masked(a * x + b * moved + s * part.ready()))
        names = ("state", "x0", "second", "noise", "mask", "clean", "stats")
        anchor, x0, second, noise, mask, clean, stats = columns(parts, *names)
        composed = reference.res2s_advance(
            anchor, x0, second, noise, mask, clean, stats, [hb1, hb2, a, b, s], [dtype] * len(parts)
        )
        return _problem(
            lambda out: ltxkern.res2s_advance(
                anchor, x0, second, noise, plan, mask=mask, clean=clean, noise_stats=stats, model_dtype=dtype, out=out
            ),
            results,
            composed,
        )

    return [
        Case(f"res2s_midpoint-{name}", midpoint, SAMPLER_DTYPES),
        Case(f"res2s_advance-{name}", advance, SAMPLER_DTYPES),
    ]


def merge_case(name: str, shape: tuple[int, int], ranks: list[int], factor: torch.dtype | None) -> Case:
    """merge_lora_; `factor`: dtype of the factors, the weight's if None."""

    def make(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        weight = draw(*shape)
        a = [draw(rank, shape[1], dtype=factor, std=0.3) for rank in ranks]
        b = [draw(shape[0], rank, dtype=factor, std=0.3) for rank in ranks]
        scales = [0.7, -0.4, 1.3, 0.25][: len(ranks)]
        exact = weight.double()
        for a_k, b_k, s in zip(a, b, scales, strict=True):
            exact = exact + s * (b_k.double() @ a_k.double())
        composed = weight.clone()
        reference.merge_lora_(composed, a, b, scales, 32 << 20, "single")

        def call(out: list[Tensor]) -> None:
            out[0].copy_(weight)
            ltxkern.merge_lora_(out[0], a, b, scales)

        return _problem(call, [exact], [composed])

    return Case(f"merge_lora-{name}", make)


def modulate_case(
    name: str, lead: tuple[int, ...], rows: tuple[int, ...], width: int, *, weight: bool, std: float = 1.0
) -> list[Case]:
    """rms_norm_modulate and its gated form; `rows`: leading dims of scale, shift and gate."""

    def plain(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        x, scale, shift = draw(*lead, width, std=std), draw(*rows, width), draw(*rows, width)
        factor = draw(width) if weight else None
        return _problem(
            lambda out: ltxkern.rms_norm_modulate(x, scale, shift, weight=factor, out=out[0]),
            [_modulated(x, scale, shift, factor)],
            [reference.rms_norm_modulate(x, scale, shift, 1e-6, factor)],
        )

    def gated(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        x, y = draw(*lead, width), draw(*lead, width)
        gate, scale, shift = (draw(*rows, width) for _ in range(3))
        factor = draw(width) if weight else None
        composed = reference.gated_residual_rms_norm_modulate(x, y, gate, scale, shift, 1e-6, factor)
        return _problem(
            lambda out: ltxkern.gated_residual_rms_norm_modulate(
                x, y, gate, scale, shift, weight=factor, out=tuple(out)
            ),
            [x.double() + y.double() * gate.double(), _modulated(composed[0], scale, shift, factor)],
            composed,
        )

    return [Case(f"rms_norm_modulate-{name}", plain), Case(f"gated_residual_rms_norm_modulate-{name}", gated)]


def _modulated(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None) -> Tensor:
    v = x.double()
    v = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (v if weight is None else v * weight.double()) * (1 + scale.double()) + shift.double()


def gate_cases() -> list[Case]:
    """gated_residual with gates of several shapes, and head_gate."""

    def residual(gate_shape: tuple[int, ...]) -> Callable[[str, torch.dtype], Problem]:
        def make(device: str, dtype: torch.dtype) -> Problem:
            draw = Draw(device, dtype)
            x, y, gate = draw(2, 5, 37), draw(2, 5, 37), draw(*gate_shape)
            return _problem(
                lambda out: ltxkern.gated_residual(x, y, gate, out=out[0]),
                [x.double() + y.double() * gate.double()],
                [reference.gated_residual(x, y, gate)],
            )

        return make

    def head(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        x, logits = draw(2, 5, 3, 24), draw(2, 5, 3, std=3.0)
        return _problem(
            lambda out: ltxkern.head_gate(x, logits, out=out[0]),
            [x.double() * 2 * torch.sigmoid(logits.double())[..., None]],
            [reference.head_gate(x, logits)],
        )

    shapes = {"row": (2, 1, 37), "full": (2, 5, 37), "token": (5, 1), "scalar": (1,)}
    return [Case(f"gated_residual-{name}", residual(shape)) for name, shape in shapes.items()] + [
        Case("head_gate-odd", head)
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
        return _problem(
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
    merge_case("one", (37, 53), [5], None),
    merge_case("several", (37, 53), [5, 40, 3], None),
    merge_case("fp32-factors", (37, 53), [5, 8], torch.float32),
    *modulate_case("row", (2, 5), (2, 1), 37, weight=False),
    *modulate_case("tokens", (2, 5), (2, 5), 64, weight=True),
    *modulate_case("flat", (7,), (), 9, weight=False, std=1e-3),
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
