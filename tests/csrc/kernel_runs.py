"""One run of each CUDA kernel of the norm ops on the shim, against fp64: shared by the plain, the sanitised and the GPU tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxkern.compiled import extension
from ltxkern.compiled import group_norm_silu as group_norm
from ltxkern.compiled import pixel_norm_silu as pixel_norm
from ltxkern.compiled.steps import Step
from ltxkern.ops.group_norm_silu import reference
from tests.ops.contract import assert_as_close, noise, poisoned

Plan = tuple[tuple[Step, ...], int]
Planner = Callable[[group_norm.Case], Plan]

CONTIGUOUS: dict[str, Planner] = {
    "two_pass": lambda case: group_norm.two_pass(case, chunk_bytes=256, threads=64),
    "two_pass_one_warp": lambda case: group_norm.two_pass(case, chunk_bytes=1000, threads=32),
    "two_pass_256": lambda case: group_norm.two_pass(case, threads=256),
    "resident": lambda case: group_norm.resident(case, 1, threads=64),
    "resident_cluster_2": lambda case: group_norm.resident(case, 2, threads=32),
    "resident_cluster_8": lambda case: group_norm.resident(case, 8, threads=64),
}
PIPELINES: dict[str, Planner] = {
    "pipeline": lambda case: group_norm.pipeline(case, 2, 2, kept_bytes=1 << 16, threads=64),
    "pipeline_partly_kept": lambda case: group_norm.pipeline(case, 3, 1, kept_bytes=64, threads=32),
    "pipeline_nothing_kept": lambda case: group_norm.pipeline(case, 2, 3, kept_bytes=0, threads=64),
}
CHANNELS_LAST: dict[str, Planner] = {
    "columns": lambda case: group_norm.columns(case, blocks=3, threads=64),
    "columns_one_block": lambda case: group_norm.columns(case, blocks=1, threads=256),
    "columns_narrow": lambda case: group_norm.columns(case, blocks=64, threads=4),
}


def channels_last(x: Tensor) -> Tensor:
    """The same values, channels innermost in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def exact_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, residual: Tensor, conv_bias: Tensor
) -> Tensor:
    """fp64 result."""
    double = (t.double() for t in (x, weight, bias, residual, conv_bias))
    x, weight, bias, residual, conv_bias = double
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return F.silu(F.group_norm(x + conv_bias.reshape(shape), groups, weight, bias, 1e-5) + residual)


def group_norm_planners(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, Planner]]:
    """The planners that serve a shape."""
    yield from CONTIGUOUS.items()
    positions = torch.Size(shape[2:]).numel()
    if positions % (16 // dtype.itemsize) == 0:
        yield from PIPELINES.items()
    if len(shape) > 2:
        yield from CHANNELS_LAST.items()


def run_group_norm(
    module: ModuleType,
    name: str,
    planner: Planner,
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    *,
    misalign: bool = False,
) -> Tensor:
    """One call with every optional argument, in poisoned memory, held to the numerical contract; returns the result."""
    x, residual = 3 * noise(*shape) + 5, noise(*shape, seed=1)
    weight, bias, conv_bias = (noise(shape[1], seed=seed) for seed in (2, 3, 4))
    x, residual = x.to(dtype), residual.to(dtype)
    if name in CHANNELS_LAST:
        x, residual = channels_last(x), channels_last(residual)
    if misalign:
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
    out = poisoned(x).as_strided(x.shape, x.stride())
    case = group_norm.describe(out, x, weight, bias, groups, 1e-5, residual, conv_bias)
    steps, workspace_bytes = planner(case)
    workspace = torch.full((workspace_bytes,), 0xCD, dtype=torch.uint8)
    extension.device_program(module, steps, group_norm.ARGUMENTS)(out, x, weight, bias, residual, conv_bias, workspace)
    composition = reference(x, weight, bias, groups, 1e-5, residual, conv_bias)
    assert_as_close(out, composition, exact_group_norm(x, weight, bias, groups, residual, conv_bias))
    return out


def run_pixel_norm(module: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, *, last: bool, threads: int) -> None:
    """One call in one layout, held to an error of a few ulp against fp64."""
    x, weight = noise(*shape, scale=3.0).to(dtype), noise(shape[1], seed=1)
    x = channels_last(x) if last else x
    out = poisoned(x).as_strided(x.shape, x.stride())
    case = pixel_norm.describe(out, x, 1e-6, weight)
    launch = pixel_norm.columns(case, threads) if case.channels_last else pixel_norm.rows(case, 100 << 10, threads)
    extension.device_program(module, (launch,), pixel_norm.ARGUMENTS)(out, x, weight)
    wide = x.double()
    scaled = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-6)
    exact = F.silu(scaled * weight.double().reshape((1, -1) + (1,) * (x.dim() - 2)))
    torch.testing.assert_close(out.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4e-6)
