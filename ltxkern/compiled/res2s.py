"""Launch geometry of the res2s sampler: all modalities of a half-step in one launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled.programs import THREADS, program
from ltxkern.compiled.steps import Argument, Call, Launch, Parameter, nested
from ltxkern.compiled.tensors import CPU_NAMES, CUDA_NAMES, PARAM_CODES, aligned16, param_code
from ltxkern.layout import ceil_div, contiguous, dense, hand_back

if TYPE_CHECKING:
    from ltxkern.ops.res2s import AdvanceArguments, MidpointArguments, StepArguments

# Modalities of one launch (kModalities in csrc/include/ltxkern/res2s_parameters.cuh); more take further launches.
MODALITIES = 4
# Elements of a thread where all tensors allow vector access: two 16-byte loads of an fp64 operand.
VECTOR = 4


class Fields(NamedTuple):
    """Names in a kernel's parameters: of a modality's tensors and of their type codes, and of the coefficients."""

    pointers: tuple[str, ...]
    codes: tuple[str, ...]
    coefficients: tuple[str, ...]


FIELDS = {
    "res2s_midpoint": Fields(
        ("latent", "x0", "noise", "mask", "clean", "stats", "middle", "anchor"),
        ("latent_type", "x0_type", "noise_type", "clean_type"),
        ("c", "a", "b", "s", "gain"),
    ),
    "res2s_advance": Fields(
        ("anchor", "x0", "x0_mid", "noise", "mask", "clean", "stats", "out"),
        ("x0_type", "x0_mid_type", "noise_type", "clean_type", "out_type"),
        ("hb1", "hb2", "a", "b", "s"),
    ),
    "res2s_sde_step": Fields(
        ("sample", "denoised", "noise", "stats", "out"),
        ("sample_type", "denoised_type", "noise_type"),
        ("a", "b", "s"),
    ),
}


class Modality(NamedTuple):
    """Sizes of one modality in elements, and the type codes of its kernel's parameters; `slice` shares a row of statistics."""

    size: int
    slice: int
    channels: int
    codes: tuple[int, ...]


class Case(NamedTuple):
    """Everything of a call that its launches depend on.

    Attributes:
        kernel: name without template arguments.
        compute: dtype of the arithmetic.
        pointers: tensors of a modality, in the order of the kernel's parameters.
        aligned: whether every thread may own VECTOR neighbouring elements.
        coefficients: the last fields of the kernel's parameters.
    """

    kernel: str
    compute: torch.dtype
    pointers: int
    modalities: tuple[Modality, ...]
    aligned: bool
    coefficients: tuple[float, ...]

    @property
    def vector(self) -> int:
        """Elements of a thread."""
        return VECTOR if self.aligned and all(m.channels % VECTOR == 0 for m in self.modalities) else 1


def _modality(case: Case, index: int, first_block: int) -> dict[str, Parameter]:
    """The fields of one modality; null and zero where the call has no such one."""
    names, given = FIELDS[case.kernel], index < len(case.modalities)
    modality = case.modalities[index] if given else Modality(0, 0, 0, (0,) * len(names.codes))
    extent = {"size": modality.size, "slice": modality.slice, "channels": modality.channels, "first_block": first_block}
    tensors = range(index * case.pointers, (index + 1) * case.pointers)
    return {
        **{name: Argument(at) if given else None for name, at in zip(names.pointers, tensors, strict=True)},
        **dict(zip(names.codes, modality.codes, strict=True)),
        **nested("extent", **extent),
    }


def _coefficients(case: Case) -> dict[str, Parameter]:
    return dict(zip(FIELDS[case.kernel].coefficients, case.coefficients, strict=True))


def half_step(case: Case, cpu: bool, threads: int = THREADS) -> list[Launch | Call]:
    """One launch (or CPU call) for each MODALITIES modalities."""
    steps: list[Launch | Call] = []
    for first in range(0, len(case.modalities), MODALITIES):
        fields: dict[str, Parameter] = {}
        blocks, count = 0, min(MODALITIES, len(case.modalities) - first)
        for slot in range(MODALITIES):
            fields |= nested(f"modality[{slot}]", **_modality(case, first + slot, blocks if slot < count else 0))
            if slot < count:
                blocks += ceil_div(case.modalities[first + slot].size, threads * case.vector)
        parameters = {**fields, "count": count, **_coefficients(case)}
        if cpu:
            steps.append(Call(f"{case.kernel}<{CPU_NAMES[case.compute]}>", parameters))
        else:
            name = f"ltxk::{case.kernel}<{CUDA_NAMES[case.compute]}, {case.vector}>"
            steps.append(Launch(name, (blocks,), threads, parameters))
    return steps


def single_step(case: Case, cpu: bool, threads: int = THREADS) -> list[Launch | Call]:
    """The SDE step of one tensor."""
    (modality,) = case.modalities
    parameters = {**_modality(case, 0, 0), **_coefficients(case)}
    if cpu:
        return [Call(f"{case.kernel}<{CPU_NAMES[case.compute]}>", parameters)]
    name = f"ltxk::{case.kernel}<{CUDA_NAMES[case.compute]}, {case.vector}>"
    return [Launch(name, (ceil_div(modality.size, threads * case.vector),), threads, parameters)]


DEVICE_HALF_STEP, CPU_HALF_STEP = functools.partial(half_step, cpu=False), functools.partial(half_step, cpu=True)
DEVICE_SINGLE, CPU_SINGLE = functools.partial(single_step, cpu=False), functools.partial(single_step, cpu=True)


def describe(x: Tensor, stats: Tensor | None, codes: tuple[int, ...]) -> Modality:
    """One modality: x is a tensor of its shape."""
    slice_size = x.numel() if stats is None or x.dim() < 2 else x.shape[-2] * x.shape[-1]
    return Modality(x.numel(), slice_size, x.shape[-1] if x.dim() else 1, codes)


def _run_half_step(
    tier: str,
    kernel: str,
    compute: torch.dtype,
    rows: Sequence[tuple[list[Tensor | None], Modality]],
    coefficients: tuple[float, ...],
) -> None:
    if not rows:
        return
    pointers = [tensor for row, _ in rows for tensor in row]
    modalities = tuple(modality for _, modality in rows)
    case = Case(kernel, compute, len(rows[0][0]), modalities, aligned16(*pointers), coefficients)
    program(tier, CPU_HALF_STEP if tier == "cpu" else DEVICE_HALF_STEP, case, len(pointers))(*pointers)


def midpoint(tier: str, out: Sequence[Tensor], args: MidpointArguments) -> None:
    """Half-step 1: x_mid of all modalities, then the anchors of all, in `out`."""
    targets = dense(out)
    count = len(args.latent)
    rows: list[tuple[list[Tensor | None], Modality]] = []
    for i, state in enumerate(args.latent):
        if state.numel() == 0:
            continue
        x0, noise, clean, stats = args.x0[i], args.noise[i], args.clean[i], args.noise_stats[i]
        given = map(contiguous, (state, x0, noise, args.mask[i], clean, stats))
        codes = tuple(map(param_code, (state, x0, noise, clean)))
        rows.append(([*given, targets[i], targets[count + i]], describe(state, stats, codes)))
    gain = 1.0 / (1.0 - args.coefficients[0]) if args.refine else 0.0
    _run_half_step(tier, "res2s_midpoint", args.compute_dtype, rows, (*map(float, args.coefficients), gain))
    hand_back(out, targets)


def advance(tier: str, out: Sequence[Tensor], args: AdvanceArguments) -> None:
    """Half-step 2: the next latent of each modality in `out`; one launch for each dtype of the anchors."""
    targets = dense(out)
    for compute in dict.fromkeys(start.dtype for start in args.anchor):
        rows: list[tuple[list[Tensor | None], Modality]] = []
        for i, start in enumerate(args.anchor):
            if start.numel() == 0 or start.dtype != compute:
                continue
            x0, x0_mid, noise, clean, stats = (
                given[i] for given in (args.x0, args.x0_mid, args.noise, args.clean, args.noise_stats)
            )
            given = map(contiguous, (start, x0, x0_mid, noise, args.mask[i], clean, stats))
            codes = (*map(param_code, (x0, x0_mid, noise, clean)), PARAM_CODES[args.model_dtype[i]])
            rows.append(([*given, targets[i]], describe(start, stats, codes)))
        _run_half_step(tier, "res2s_advance", compute, rows, tuple(map(float, args.coefficients)))
    hand_back(out, targets)


def sde_step(tier: str, out: Tensor, args: StepArguments) -> None:
    """One SDE step."""
    sample, denoised, noise, coefficients, stats = args
    if sample.numel() == 0:
        return
    (target,) = dense([out])
    pointers = [*map(contiguous, (sample, denoised, noise, stats)), target]
    modality = describe(sample, stats, (param_code(sample), param_code(denoised), param_code(noise)))
    compute = torch.float64 if torch.float64 in (sample.dtype, denoised.dtype) else torch.float32
    case = Case(
        "res2s_sde_step", compute, len(pointers), (modality,), aligned16(*pointers), tuple(map(float, coefficients))
    )
    program(tier, CPU_SINGLE if tier == "cpu" else DEVICE_SINGLE, case, len(pointers))(*pointers)
    hand_back([out], [target])
