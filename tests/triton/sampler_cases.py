"""Problems of the noise, guidance, sampler and LoRA ops: the result in fp64 by a formula, and the composition's; their tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from problems import SAMPLER_DTYPES, Case, Draw, Launches, Problem
from torch import Tensor

import ltxkern
from ltxkern import reference


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
        return Problem(
            lambda out: ltxkern.normalize_noise(x, out=out[0]),
            [x],
            lambda: [_standardised(x)],
            lambda: [reference.normalize_noise(x)],
        )

    def channelwise(device: str, dtype: torch.dtype) -> Problem:
        x = Draw(device, dtype)(*shape, mean=mean, std=std)
        return Problem(
            lambda out: ltxkern.channelwise_normalize(x, out=out[0]),
            [x],
            lambda: [_standardised(x)],
            lambda: [reference.channelwise_normalize(x)],
        )

    def statistics(device: str, dtype: torch.dtype) -> Problem:
        x = Draw(device, dtype)(*shape, mean=mean, std=std)
        stats = reference.noise_statistics(x)
        return Problem(lambda out: ltxkern.noise_statistics(x, out=out[0]), [stats], lambda: [stats], lambda: [stats])

    makers = {"normalize_noise": normalize, "channelwise_normalize": channelwise, "noise_statistics": statistics}
    return [Case(f"{op}-{name}", make, dtypes) for op, make in makers.items()]


def guidance_case(name: str, shape: tuple[int, ...], branches: int, rescale: float, mean: float = 0.0) -> Case:
    """combine_guidance with one to three further branches."""

    def make(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        cond, *others = [draw(*shape, mean=mean) for _ in range(4)]
        used = [other if i < branches else None for i, other in enumerate(others)]
        scales = [3.0 if branches > 0 else 1.0, 1.25 if branches > 1 else 0.0, 2.5 if branches > 2 else 1.0]

        def exact() -> list[Tensor]:
            base = cond.double()
            pred = base.clone()
            for other, factor in zip(used, (scales[0] - 1, scales[1], scales[2] - 1), strict=True):
                if other is not None:
                    pred += factor * (base - other.double())
            return [pred * (rescale * base.std() / pred.std() + 1 - rescale) if rescale else pred]

        names = ("cfg_scale", "stg_scale", "modality_scale")
        return Problem(
            lambda out: ltxkern.combine_guidance(
                cond, *used, **dict(zip(names, scales, strict=True)), rescale_scale=rescale, out=out[0]
            ),
            [cond],
            exact,
            lambda: [reference.combine_guidance(cond, *used, *scales, rescale)],
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

        def exact() -> list[Tensor]:
            ready = _standardised(noise) if raw else noise.double()
            return [a * sample.double() + b * denoised.double() + s * ready]

        return Problem(
            lambda out: ltxkern.res2s_sde_step(
                sample, denoised, STEPS[1].sigma, STEPS[1].sigma_next, noise, noise_stats=stats, out=out[0]
            ),
            [denoised],
            exact,
            lambda: [reference.res2s_sde_step(sample, denoised, noise, [a, b, s], stats)],
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
    taken = STEPS[step]

    def columns(parts: list[Modality], *names: str) -> list[list[Tensor | None]]:
        return [[getattr(part, name) for part in parts] for name in names]

    def midpoint(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        parts = [_modality(draw, shape, masked, raw) for shape in shapes]
        c, (a, b, s) = taken.contraction, taken.substep

        def exact() -> list[Tensor]:
            mids, anchors = [], []
            for part in parts:
                x, d = part.state.double(), part.masked(part.x0.double())
                moved = part.masked(a * x + b * (x + c * (d - x)) + s * part.ready())
                mids.append(moved)
                anchors.append((moved - c * d) / (1 - c) if taken.refine else x)
            return mids + anchors

        given = columns(parts, "state", "x0", "noise", "mask", "clean", "stats")
        latent, x0, noise, mask, clean, stats = given
        count = len(parts)
        return Problem(
            lambda out: ltxkern.res2s_midpoint(
                latent, x0, noise, taken, mask=mask, clean=clean, noise_stats=stats, compute_dtype=compute,
                out=(out[:count], out[count:]),
            ),
            [*latent, *(state.to(compute) for state in latent)],
            exact,
            lambda: reference.res2s_midpoint(*given, [c, a, b, s], taken.refine, compute),
        )  # fmt: skip

    def advance(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        parts = [_modality(draw, shape, masked, raw) for shape in shapes]
        parts = [replace(part, state=draw(*shape, dtype=compute)) for part, shape in zip(parts, shapes, strict=True)]
        hb1, hb2, (a, b, s) = taken.h * taken.b1, taken.h * taken.b2, taken.advance

        def exact() -> list[Tensor]:
            results = []
            for part in parts:
                x, first, second = (value.double() for value in (part.state, part.x0, part.second))
                moved = x + (hb1 * (part.masked(first) - x) + hb2 * (part.masked(second) - x))
                results.append(part.masked(a * x + b * moved + s * part.ready()))
            return results

        names = ("state", "x0", "second", "noise", "mask", "clean", "stats")
        given = columns(parts, *names)
        anchor, x0, second, noise, mask, clean, stats = given
        return Problem(
            lambda out: ltxkern.res2s_advance(
                anchor, x0, second, noise, taken, mask=mask, clean=clean, noise_stats=stats, model_dtype=dtype, out=out
            ),
            x0,
            exact,
            lambda: reference.res2s_advance(*given, [hb1, hb2, a, b, s], [dtype] * len(parts)),
        )

    return [
        Case(f"res2s_midpoint-{name}", midpoint, SAMPLER_DTYPES),
        Case(f"res2s_advance-{name}", advance, SAMPLER_DTYPES),
    ]


def dual_add_case(name: str, shape: tuple[int, ...]) -> Case:
    """dual_add of a shape."""

    def make(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        x, first, second = draw(*shape), draw(*shape, std=0.05), draw(*shape, std=0.1)
        return Problem(
            lambda out: ltxkern.dual_add(x, first, second, out=(out[0], out[1])),
            [x, x],
            lambda: [x.double() + first.double(), x.double() + second.double()],
            lambda: reference.dual_add(x, first, second),
        )

    return Case(f"dual_add-{name}", make, SAMPLER_DTYPES, bit_equal=True)


def merge_case(name: str, shape: tuple[int, int], ranks: list[int], factor: torch.dtype | None) -> Case:
    """merge_lora_; `factor`: dtype of the factors, the weight's if None."""

    def make(device: str, dtype: torch.dtype) -> Problem:
        draw = Draw(device, dtype)
        weight = draw(*shape)
        a = [draw(rank, shape[1], dtype=factor, std=0.3) for rank in ranks]
        b = [draw(shape[0], rank, dtype=factor, std=0.3) for rank in ranks]
        scales = [0.7, -0.4, 1.3, 0.25][: len(ranks)]

        def exact() -> list[Tensor]:
            products = (s * (b_k.double() @ a_k.double()) for a_k, b_k, s in zip(a, b, scales, strict=True))
            return [sum(products, weight.double())]

        def composed() -> list[Tensor]:
            merged = weight.clone()
            reference.merge_lora_(merged, a, b, scales, 32 << 20, "single")
            return [merged]

        def call(out: list[Tensor]) -> None:
            out[0].copy_(weight)
            ltxkern.merge_lora_(out[0], a, b, scales)

        return Problem(call, [weight], exact, composed)

    return Case(f"merge_lora-{name}", make)


SMALL: list[Case] = [
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
]
MIDDLE: list[Case] = [
    *noise_case("packed", (1, 8160, 128)),
    *noise_case("slices", (1, 128, 4, 34, 60)),
    guidance_case("packed", (1, 8160, 128), 3, 0.45),
    *half_step_cases("packed", [(1, 8160, 128), (1, 126, 128)], step=0, masked=True, raw=True, compute=torch.float64),
    merge_case("rank384", (512, 768), [384], None),
    merge_case("odd", (515, 771), [37, 5], None),
]
LATENT, BF16, FP32, FP64 = (1, 32640, 128), torch.bfloat16, torch.float32, torch.float64


def _half_steps(masked: bool, compute: torch.dtype) -> list[Case]:
    return half_step_cases("packed", [LATENT, (1, 126, 128)], step=0, masked=masked, raw=True, compute=compute)


PRODUCTION: Launches = {
    "noise-32640x128": (noise_case("", LATENT)[::2], FP64),
    "noise-128x16x34x60": (noise_case("", (1, 128, 16, 34, 60))[::2], FP64),
    "noise-small": (noise_case("", (1, 126, 32))[::2], FP32),
    "guidance-bf16": ([guidance_case("", LATENT, 3, 0.7)], BF16),
    "guidance-fp64": ([guidance_case("", LATENT, 3, 0.7)], FP64),
    "half-steps": (_half_steps(False, FP64), BF16),
    "half-steps-masked": (_half_steps(True, FP64), BF16),
    "half-steps-fp32": (_half_steps(False, FP32), BF16),
    "sde-step": ([sde_case("", LATENT, wide=True, raw=False)], BF16),
    "merge-bf16": ([merge_case("", (4096, 4096), [384], None)], BF16),
    "merge-bf16-2": ([merge_case("", (4096, 4096), [384, 384], None)], BF16),
    "merge-fp32": ([merge_case("", (4096, 4096), [384], None)], FP32),
    "dual-add-bf16": ([dual_add_case("", (4096, 4096))], BF16),
    "dual-add-fp32": ([dual_add_case("", (4096, 4096))], FP32),
}
