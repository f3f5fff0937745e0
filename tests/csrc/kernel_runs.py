"""The kernels of the norm ops that a call would not choose by itself, run through the public ops: on the shim and on GPUs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ltxkern
from ltxkern.compiled import group_norm_silu as group_norm
from ltxkern.compiled.steps import Step
from tests.ops.contract import channels_last, noise

Planner = Callable[[group_norm.Case], tuple[tuple[Step, ...], int]]

CONTIGUOUS: dict[str, Planner] = {
    "two_pass": lambda case: group_norm.two_pass(case, chunk_bytes=256, threads=64),
    "two_pass_one_warp": lambda case: group_norm.two_pass(case, chunk_bytes=1000, threads=32),
    "two_pass_256": lambda case: group_norm.two_pass(case, threads=256),
}
CHANNELS_LAST: dict[str, Planner] = {
    "columns": lambda case: group_norm.columns(case, blocks=3, threads=64),
    "columns_one_block": lambda case: group_norm.columns(case, blocks=1, threads=256),
    "columns_narrow": lambda case: group_norm.columns(case, blocks=64, threads=4),
}
# Of blocks that wait for one another: all rows kept, some, none; few threads, so that a warp has several rows.
COLUMNS_ON_CHIP: dict[str, Planner] = {
    "columns_kept": lambda case: group_norm.columns_on_chip(case, 3, 1 << 16, threads=64),
    "columns_partly_kept": lambda case: group_norm.columns_on_chip(case, 4, 6 << 10, threads=32),
    "columns_nothing_kept": lambda case: group_norm.columns_on_chip(case, 64, 0, threads=128),
}
PLANNERS = CONTIGUOUS | CHANNELS_LAST | COLUMNS_ON_CHIP


def planners_of(shape: tuple[int, ...]) -> list[str]:
    """Those that serve a shape."""
    if shape[1] % 256 == 0:
        return [*CHANNELS_LAST, *COLUMNS_ON_CHIP]
    return [*CONTIGUOUS, *(CHANNELS_LAST if len(shape) > 2 else ())]


@contextmanager
def forced(planner: Planner) -> Iterator[None]:
    """group_norm_silu takes the launches of this planner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_norm, "choose", lambda case, limits, **threads: planner(case))
        # Not the launches that another planner made for the same case.
        for cached in (group_norm._chosen, group_norm.program):
            patch.setattr(group_norm, cached.__name__, inspect.unwrap(cached))
        yield


class GroupNorm(NamedTuple):
    """Every tensor of a call."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor
    conv_bias: Tensor

    def run(self, groups: int, out: Tensor | None = None) -> Tensor:
        """The public op."""
        options = {"residual": self.residual, "conv_bias": self.conv_bias, "out": out}
        return ltxkern.group_norm_silu(self.x, self.weight, self.bias, groups, **options)

    def exact(self, groups: int) -> Tensor:
        """In fp64."""
        x, weight, bias, residual, conv_bias = (tensor.double() for tensor in self)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return F.silu(F.group_norm(x + conv_bias.reshape(shape), groups, weight, bias, 1e-5) + residual)


def group_norm_of(planner: str, shape: tuple[int, ...], dtype: torch.dtype) -> GroupNorm:
    """Tensors of a mean far from zero, as a planner's kernels take them."""
    x, residual = (3 * noise(*shape) + 5).to(dtype), noise(*shape, seed=1).to(dtype)
    weight, bias, conv_bias = (noise(shape[1], seed=seed) for seed in (2, 3, 4))
    if planner in CHANNELS_LAST | COLUMNS_ON_CHIP:
        x, residual = channels_last(x), channels_last(residual)
    return GroupNorm(x, weight, bias, residual, conv_bias)


def exact_pixel_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """In fp64."""
    wide = x.double()
    wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    return F.silu(wide if weight is None else wide * weight.double().reshape((1, -1) + (1,) * (x.dim() - 2)))
