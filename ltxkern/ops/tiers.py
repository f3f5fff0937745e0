"""How an op is served: its entries of the compiled tiers and of Triton, and the constraints that several ops share.

A constraint takes the op's arguments and returns in words why a tier cannot serve them, or None. It imports no triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ltxkern import triton as triton_tier
from ltxkern.compiled.programs import refuse_elsewhere
from ltxkern.dispatch import Backend
from ltxkern.layout import channel_view, rows_of, unit_rows
from ltxkern.ops.checks import ACTIVATION_DTYPES

Constraint = Callable[[Any], str | None]
# Elements of a row that a Triton program keeps in registers.
MAX_WIDTH = 16384


def compiled(
    run: Callable[..., None], *details: Any, refuse: Constraint | None = None, refuse_cuda: Constraint | None = None
) -> list[Backend]:
    """Entries of the compiled tiers.

    Args:
        run: one call, `run(tier, *details, out, args)`; of an in-place op `run(tier, *details, args)`.
        details: what tells ops that share `run` apart.
        refuse: what the tiers do not serve; asked after the device.
        refuse_cuda: asked in its place by the tiers "cuda" and "nvrtc".
    """

    def entry(tier: str) -> Backend:
        constraint = refuse if tier == "cpu" else refuse_cuda or refuse

        def reason(args: Any) -> str | None:
            return refuse_elsewhere(tier, args) or (constraint(args) if constraint else None)

        return Backend(tier, reason, lambda: functools.partial(run, tier, *details))

    return [entry(tier) for tier in ("cuda", "nvrtc", "cpu")]


def triton(stem: str, refuse: Constraint, entry: str = "launch") -> Backend:
    """The entry of Triton: `ltxkern.triton.<stem>.<entry>(out, args)`, refused first by device, then by `refuse`."""

    def reason(args: Any) -> str | None:
        return triton_tier.refuse_elsewhere(args) or refuse(args)

    return Backend("triton", reason, lambda: triton_tier.load(stem, entry))


def _named_tensors(args: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in zip(args._fields, args, strict=True):
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}[{i}]", entry) for i, entry in enumerate(value) if isinstance(entry, Tensor))


def strided(name: str, value: Tensor) -> str:
    """How a tensor lies, for a refusal."""
    return f"{name} has strides {tuple(value.stride())}"


def not_contiguous(args: Any) -> str | None:
    """All tensors contiguous."""
    for name, value in _named_tensors(args):
        if not value.is_contiguous():
            return f"{strided(name, value)}: the kernel takes contiguous tensors"
    return None


def split_positions(**tensors: Tensor | None) -> str | None:
    """(N, C, *) whose positions collapse to one stride."""
    for name, value in tensors.items():
        if value is not None and value.numel() and channel_view(value) is None:
            return f"{strided(name, value)}: the dims after the channels must collapse to one (contiguous or channels-last)"
    return None


def split_rows(
    over_x: Sequence[Tensor], modulation: Sequence[Tensor], index: Tensor | None, *, dense: bool = True
) -> str | None:
    """Dense rows (of the modulation too, unless not `dense`), leading dims that collapse to two."""
    x = over_x[0]
    if x.numel() == 0 or x.dim() == 0:
        return None
    if not unit_rows(*over_x, *(modulation if dense else ())):
        return "the last dim of an operand is not dense"
    if rows_of(over_x, modulation, index) is None:
        return f"the leading dims of the operands do not collapse to two: x is {tuple(x.shape)} with {x.stride()}"
    return None


def wide_rows(x: Tensor) -> str | None:
    """Rows of bounded width."""
    if x.shape[-1] > MAX_WIDTH:
        return f"rows of {x.shape[-1]}: the kernel keeps at most {MAX_WIDTH} in registers"
    return None


def unlike_channels(x: Tensor, same: tuple[Tensor | None, ...], per_channel: tuple[Tensor | None, ...]) -> str | None:
    """x (N, C, *) in fp16, bf16 or fp32; `same` like x in shape, dtype and device; `per_channel` (C,), on x's device."""
    if x.dtype not in ACTIVATION_DTYPES:
        return f"serves float16, bfloat16 and float32, got {x.dtype}"
    shape, device = x.shape, x.device
    for tensor in same:
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != device):
            return f"needs tensors like x, {tuple(shape)} {x.dtype}; got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
    channels = shape[1:2]
    for tensor in per_channel:
        if tensor is not None and (
            tensor.shape != channels or tensor.device != device or tensor.dtype == torch.float64
        ):
            return f"needs {shape[1]} values per parameter, got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
    return None
