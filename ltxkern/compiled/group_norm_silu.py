"""Launch geometry of GroupNorm + SiLU: two passes, and channels-last one launch where the device holds all its blocks at once."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled.programs import THREADS, limits_of, program, workspace
from ltxkern.compiled.steps import Argument, Call, Launch, Parameter, Step, Zero, divider
from ltxkern.compiled.tensors import (
    CPU_NAMES,
    CUDA_NAMES,
    DeviceLimits,
    aligned16,
    is_channels_last,
    matched,
    param_code,
)
from ltxkern.layout import ceil_div, contiguous, round_up

if TYPE_CHECKING:
    from ltxkern.ops.group_norm_silu import Arguments

# Order of the tensors in every call of a program.
OUT, X, WEIGHT, BIAS, RESIDUAL, CONV_BIAS, WORKSPACE = (Argument(i) for i in range(7))
ARGUMENTS = 7
# Of a thread in a short chunk, at least.
ACCESSES = 8
# Upper bound of the static shared memory of `columns_on_chip`.
STATIC_SHARED = 9 << 10


class Case(NamedTuple):
    """Everything of a call that its launches depend on; sizes in elements."""

    dtype: torch.dtype
    samples: int
    channels: int
    positions: int
    groups: int
    eps: float
    channels_last: bool
    aligned: bool
    weight_code: int
    bias_code: int
    conv_bias_code: int
    limits: DeviceLimits | None = None

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def group_length(self) -> int:
        return self.group_channels * self.positions

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def vector(self) -> int:
        """Elements per access: 16 bytes where the tensors are aligned."""
        return 16 // self.itemsize if self.aligned else 1

    @property
    def workspace_bytes(self) -> int:
        """Partials, moments and counters of the launches."""
        return _chosen(self)[1]


def _parameters(case: Case) -> dict[str, Parameter]:
    return {
        **{"x": X, "out": OUT, "residual": RESIDUAL, "weight": WEIGHT, "bias": BIAS, "conv_bias": CONV_BIAS},
        **{"weight_type": case.weight_code, "bias_type": case.bias_code, "conv_bias_type": case.conv_bias_code},
        **{"samples": case.samples, "channels": case.channels, "group_channels": case.group_channels},
        **{"positions": case.positions, "channels_last": int(case.channels_last), "eps": case.eps},
    }


def _range(count: int, threads: int, vector: int) -> int:
    """Elements of `count` that each warp takes: whole accesses of all its threads."""
    return ceil_div(count, threads * vector) * 32 * vector


def _two_pass_parameters(
    case: Case, chunk: int, chunks: int, part: int = 0, lanes: int = 1, rows: int = 1, merged: bool = False
) -> dict[str, Parameter]:
    partials = 8 * case.samples * (case.groups if merged else case.channels) * chunks
    return {
        **_parameters(case),
        **{"partials": WORKSPACE, "affine": Argument(WORKSPACE.index, round_up(partials, 16)), "chunk": chunk},
        **{"chunks": chunks, "by_chunks": divider(chunks)},
        **{"by_groups": divider(case.groups), "range": part, "merged": int(merged)},
        **{"lanes": lanes, "by_lanes": divider(lanes)},
        **{"rows": rows, "by_rows": divider(rows)},
    }


def _two_pass_steps(
    case: Case, parameters: dict[str, Parameter], grid: tuple[int, ...], threads: int, layout: str
) -> tuple[tuple[Step, ...], int]:
    """Statistics, finalise, apply, and the bytes of partials and channel tables."""
    affine, chunks = parameters["affine"], parameters["chunks"]
    assert isinstance(affine, Argument)
    assert isinstance(chunks, int)
    partials = chunks if parameters["merged"] else case.group_channels * chunks
    finalizing = min(512, round_up(ceil_div(partials, 8), 32))
    steps = (
        Launch(f"ltxk::group_norm_stats{layout}", grid, threads, parameters),
        Launch("ltxk::group_norm_finalize", (case.samples * case.groups,), finalizing, parameters),
        Launch(f"ltxk::group_norm_apply{layout}", grid, threads, parameters),
    )
    return steps, affine.offset + 16 * case.samples * case.channels


def two_pass(case: Case, chunk_bytes: int = 64 << 10, threads: int | None = None) -> tuple[tuple[Step, ...], int]:
    """Statistics, then apply: 3 units of traffic, 2 where the activation stays in L2. Returns the steps and workspace bytes."""
    chunk = max(1, min(chunk_bytes // case.itemsize, round_up(case.positions, 8)))
    chunks = ceil_div(case.positions, chunk)
    # What a thread does before its first access is worth several of them.
    threads = threads or min(THREADS, round_up(ceil_div(chunk, ACCESSES * case.vector), 32))
    parameters = _two_pass_parameters(case, chunk, chunks, _range(chunk, threads, case.vector))
    grid = (case.samples * case.channels * chunks,)
    return _two_pass_steps(case, parameters, grid, threads, f"<{CUDA_NAMES[case.dtype]}, {case.vector}>")


def columns(case: Case, blocks: int, threads: int = THREADS) -> tuple[tuple[Step, ...], int]:
    """Channels-last: statistics, finalise, apply, with about `blocks` blocks. Returns the steps and workspace bytes."""
    vector = case.vector if case.channels % case.vector == 0 else 1
    lanes = min(threads, ceil_div(case.channels, vector))
    rows = threads // lanes
    across = ceil_div(case.channels, lanes * vector)
    per_block = ceil_div(case.samples * case.positions * across, blocks)
    chunk = min(max(per_block, 8 * rows), max(case.positions, 1))
    chunks = ceil_div(case.positions, chunk)
    # A block that has all channels of its groups leaves a partial for each of these.
    merged = across == 1 or lanes * vector % case.group_channels == 0
    parameters = _two_pass_parameters(case, chunk, chunks, lanes=lanes, rows=rows, merged=merged)
    grid = (case.samples * chunks, across)
    return _two_pass_steps(case, parameters, grid, threads, f"_columns<{CUDA_NAMES[case.dtype]}, {vector}>")


def waits_on_chip(case: Case) -> bool:
    """Whether `columns_on_chip` serves a channels-last case: a warp's accesses are whole groups, each access of one of them."""
    tile = 32 * case.vector
    whole = case.channels % tile == 0 and tile % case.group_channels == 0 and case.group_channels % case.vector == 0
    return case.vector > 1 and whole and case.channels * case.itemsize < 1 << 31


def columns_on_chip(case: Case, blocks: int, block_bytes: int, threads: int = 512) -> tuple[tuple[Step, ...], int]:
    """Channels-last: one cooperative launch of up to `blocks` blocks; each keeps what fits in `block_bytes` of shared memory."""
    tile = 32 * case.vector
    tiles, row_bytes = case.channels // tile, tile * case.itemsize
    # Behind eight channels one place is free.
    table = 16 * (tile + tile // 8)
    chunk = ceil_div(case.positions, max(1, min(case.positions, blocks // (case.samples * tiles))))
    chunks = ceil_div(case.positions, chunk)
    kept = max(0, min(chunk, (block_bytes - table) // row_bytes))
    counters = round_up(4 * case.samples * tiles, 16)
    parameters: dict[str, Argument | int | float | None] = {
        **_parameters(case),
        **{"partials": Argument(WORKSPACE.index, counters), "arrived": WORKSPACE, "chunk": chunk},
        **{"chunks": chunks, "by_chunks": divider(chunks), "kept_rows": kept},
        "lanes": case.group_channels // case.vector,
    }
    launch = Launch(
        f"ltxk::group_norm_columns<{CUDA_NAMES[case.dtype]}, {case.vector}>",
        (case.samples * chunks, tiles),
        threads,
        parameters,
        shared_bytes=kept * row_bytes + table,
        cooperative=True,
    )
    return (Zero(WORKSPACE, counters), launch), counters + 16 * case.samples * case.groups * chunks


def choose(case: Case, limits: DeviceLimits, **threads: int) -> tuple[tuple[Step, ...], int]:
    """The launches of a case: two passes, which every form that keeps a contiguous group on chip lost to where it was measured.

    Channels-last one launch keeps on chip what fits, where the device holds all its blocks at once. `threads=` of a block, in place
    of a kernel's own number where the workspace does not depend on it.
    """
    if not case.channels_last:
        return two_pass(case, **threads)
    blocks, shared = 2 * limits.multiprocessors, (limits.shared_bytes + 1024) // 2 - 1024 - STATIC_SHARED
    if waits_on_chip(case) and case.samples * case.channels // (32 * case.vector) <= blocks:
        # Never more bytes than two passes move, and a launch instead of three.
        steps, workspace_bytes = columns_on_chip(case, blocks, shared, **threads)
        launch = steps[-1]
        assert isinstance(launch, Launch)
        if limits.held is None or limits.held(launch) >= math.prod(launch.grid):
            return steps, workspace_bytes
    return columns(case, 4 * limits.multiprocessors)


def cpu_calls(case: Case) -> tuple[Call, ...]:
    """The CPU kernel's call."""
    return (Call(f"group_norm_silu<{CPU_NAMES[case.dtype]}>", _parameters(case)),)


@functools.lru_cache(maxsize=1024)
def _chosen(case: Case, **threads: int) -> tuple[tuple[Step, ...], int]:
    assert case.limits is not None
    return choose(case, case.limits, **threads)


def device_steps(case: Case, **threads: int) -> tuple[Step, ...]:
    """The launches on the device whose limits the case names."""
    return _chosen(case, **threads)[0]


def describe(out: Tensor, args: Arguments, limits: DeviceLimits | None) -> Case:
    """The case of a call whose x, out and residual share a dense layout; without limits it is one of the CPU (any alignment)."""
    x = args.x
    samples, channels = x.shape[:2]
    return Case(
        dtype=x.dtype,
        samples=samples,
        channels=channels,
        positions=x.numel() // (samples * channels),
        groups=args.num_groups,
        eps=float(args.eps),
        channels_last=not x.is_contiguous(),
        aligned=limits is None or aligned16(out, x, args.residual),
        weight_code=param_code(args.weight),
        bias_code=param_code(args.bias),
        conv_bias_code=param_code(args.conv_bias),
        limits=limits,
    )


def run(tier: str, out: Tensor, args: Arguments) -> None:
    """One call in a layout that the kernels know; tensors that lie otherwise pass through a copy."""
    x, residual = args.x, args.residual
    if x.numel() == 0:
        return
    channels_last = not x.is_contiguous() and is_channels_last(x)
    source, added = matched(x, channels_last), None if residual is None else matched(residual, channels_last)
    target = out if matched(out, channels_last) is out else torch.empty_like(source)
    if source is not x or added is not residual:
        args = args._replace(x=source, residual=added)
    case = describe(target, args, limits_of(tier, x))
    affine = contiguous(args.weight), contiguous(args.bias)
    tensors = (target, source, *affine, added, contiguous(args.conv_bias), workspace(tier, case, x))
    program(tier, cpu_calls if tier == "cpu" else device_steps, case, ARGUMENTS)(*tensors)
    if target is not out:
        out.copy_(target)
