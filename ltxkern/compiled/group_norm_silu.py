"""Launch geometry of GroupNorm + SiLU: the choice between its kernels, by bytes and by what the device holds on chip."""

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
# What the pipeline loses to blocks that wait for their team, as a factor.
WAITING = 1.1
# Upper bound of the on-chip kernels' static shared memory.
STATIC_SHARED = 1024
# That of `columns_on_chip`.
COLUMNS_SHARED = 9 << 10
# Bytes of which no multiprocessor holds twice as many.
ALONE = 114 << 10


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


def two_pass(case: Case, chunk_bytes: int = 64 << 10, threads: int = THREADS) -> tuple[tuple[Step, ...], int]:
    """Statistics, then apply: 3 units of traffic, 2 where the activation stays in L2. Returns the steps and workspace bytes."""
    chunk = max(1, min(chunk_bytes // case.itemsize, round_up(case.positions, 8)))
    chunks = ceil_div(case.positions, chunk)
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
    tiles, row_bytes, table = case.channels // tile, tile * case.itemsize, 16 * tile
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


def _on_chip_vector(case: Case) -> int:
    return case.vector if case.positions % case.vector == 0 else 1


def _on_chip_parameters(
    case: Case,
    blocks: int,
    part: int,
    kept: int,
    access: tuple[int, int],
    teams: int,
    pointers: tuple[Argument | None, ...],
) -> dict[str, Parameter]:
    return {
        **_parameters(case),
        **{"groups": case.samples * case.groups, "by_groups": divider(case.groups), "blocks": blocks},
        **{"by_blocks": divider(blocks), "slice": part, "kept": kept, "by_positions": divider(case.positions)},
        **{"kept_range": _range(kept, *access), "rest_range": _range(part - kept, *access)},
        **{"by_teams": divider(teams), "partials": pointers[0], "arrived": pointers[1]},
    }


def _table_bytes(case: Case) -> int:
    """What every channel of a group does to its elements, and its conv_bias."""
    return 20 * case.group_channels


def _resident_threads(case: Case, part: int) -> int:
    """Threads of a block that holds `part` elements: four accesses each; twice the most where the block is alone."""
    most = 1024 if part * case.itemsize > ALONE else 512
    return min(most, max(32, round_up(ceil_div(part, 4 * _on_chip_vector(case)), 32)))


def resident(case: Case, cluster: int, threads: int | None = None) -> tuple[tuple[Step, ...], int]:
    """One launch, a cluster of blocks per group, the group in shared memory: 2 units. Returns the steps and workspace bytes."""
    vector = _on_chip_vector(case)
    part = round_up(ceil_div(case.group_length, cluster), vector)
    # Not the warps that would have no element.
    each = _range(part, threads or _resident_threads(case, part), vector)
    threads = 32 * ceil_div(part, each)
    shared = round_up(part * case.itemsize, 16) + _table_bytes(case)
    launch = Launch(
        f"ltxk::group_norm_resident<{CUDA_NAMES[case.dtype]}, {vector}>",
        (case.samples * case.groups * cluster,),
        threads,
        _on_chip_parameters(case, cluster, part, part, (threads, vector), 1, (None, None)),
        shared_bytes=shared,
        cluster=cluster,
    )
    return (launch,), 0


def pipeline(case: Case, team: int, teams: int, kept_bytes: int, threads: int = 512) -> tuple[tuple[Step, ...], int]:
    """One cooperative launch of `teams` teams of blocks, each with two groups in flight; a block keeps `kept_bytes` of either."""
    part = round_up(ceil_div(case.group_length, team), case.vector)
    kept = min(part, kept_bytes // case.itemsize // case.vector * case.vector)
    groups = case.samples * case.groups
    counters = round_up(4 * groups, 16)
    launch = Launch(
        f"ltxk::group_norm_pipeline<{CUDA_NAMES[case.dtype]}, {case.vector}>",
        (team * teams,),
        threads,
        _on_chip_parameters(
            *(case, team, part, kept, (threads, case.vector), teams), (Argument(WORKSPACE.index, counters), WORKSPACE)
        ),
        shared_bytes=2 * round_up(kept * case.itemsize, 16) + _table_bytes(case),
        cooperative=True,
    )
    return (Zero(WORKSPACE, counters), launch), counters + 16 * groups * team


def _cluster_size(case: Case, limits: DeviceLimits) -> tuple[int, int] | None:
    """Blocks per group for `resident`, and the groups at once: the most that run all in one wave, else the fewest that hold one."""
    groups = case.samples * case.groups
    vector = _on_chip_vector(case)
    if case.group_length * case.itemsize > 8 << 20 or (vector == 1 and case.group_length > 1 << 14):
        return None
    fitting = []
    for size in (1, 2, 4, 8):
        part = ceil_div(case.group_length, size)
        # A cluster costs two barriers of its own: no block of one is left with less than an access a thread.
        if size > 1 and part * case.itemsize < 16 * 512:
            break
        shared = round_up(part * case.itemsize, 16) + 16 + _table_bytes(case)
        if size <= limits.cluster_blocks and shared + STATIC_SHARED <= limits.shared_bytes:
            # Registers let 1024 threads in: see the kernel's launch bounds.
            by_threads = 1024 // _resident_threads(case, part)
            per_processor = min(by_threads, (limits.shared_bytes + 1024) // (shared + STATIC_SHARED + 1024))
            fitting.append((size, limits.multiprocessors * per_processor // size))
    waves = [(size, at_once) for size, at_once in fitting if groups <= at_once]
    return max(waves) if waves else min(fitting, default=None)


def _held(limits: DeviceLimits, steps: tuple[Step, ...], counted: int) -> int:
    """Clusters or blocks of the last launch that the device holds at once, as it says; without an answer what was counted."""
    launch = steps[-1]
    assert isinstance(launch, Launch)
    return counted if limits.held is None else limits.held(launch)


def _blocks(steps: tuple[Step, ...]) -> int:
    launch = steps[-1]
    assert isinstance(launch, Launch)
    return math.prod(launch.grid)


def _worth_its_waves(case: Case, limits: DeviceLimits, held: int, counted: int) -> bool:
    """Whether a launch that holds `held` groups at once, where `counted` were expected, still costs at most two passes."""
    groups = case.samples * case.groups
    return held > 0 and 2 * ceil_div(groups, held) <= _two_pass_units(case, limits) * ceil_div(groups, max(1, counted))


def _team_count(case: Case, blocks: int, slot_bytes: int) -> int:
    """As many teams as still hold their groups in shared memory; of those counts, one that divides the groups evenly."""
    groups = case.samples * case.groups
    most = max(1, min(groups, blocks * slot_bytes // (case.group_length * case.itemsize)))
    return next(teams for teams in range(most, 0, -1) if groups % teams == 0)


def _two_pass_units(case: Case, limits: DeviceLimits) -> float:
    """Passes over the activation that two passes cost memory: half of L2 still holds its tail when the second begins with it."""
    total = case.samples * case.groups * case.group_length * case.itemsize
    return 3 - min(1.0, limits.l2_bytes / 2 / total)


def _pipeline_units(case: Case, limits: DeviceLimits, slot_bytes: int, teams: int) -> float:
    """The same of `pipeline`: what of two groups a team is not on chip comes from half of L2, and from memory beyond that."""
    group_bytes = case.group_length * case.itemsize
    blocks = 2 * limits.multiprocessors // teams
    spilled = max(0, group_bytes - blocks * slot_bytes)
    missed = max(0.0, spilled - limits.l2_bytes / 2 / (2 * teams))
    return 2 + missed / group_bytes


def choose(case: Case, limits: DeviceLimits, **threads: int) -> tuple[tuple[Step, ...], int]:
    """The launches that move the fewest bytes on this device, as predicted; two passes where it does not hold what was counted.

    A group that fits a block or a cluster is read once. An activation that stays in half of L2 takes two passes, the second from
    L2. Larger ones take the pipeline, which keeps two groups on chip, where that moves less than two passes.
    `threads=` of a block, in place of a kernel's own number where the workspace does not depend on it.
    """
    if case.channels_last:
        blocks, shared = 2 * limits.multiprocessors, (limits.shared_bytes + 1024) // 2 - 1024 - COLUMNS_SHARED
        if waits_on_chip(case) and case.samples * case.channels // (32 * case.vector) <= blocks:
            # Never more bytes than two passes move, and a launch instead of three.
            planned = columns_on_chip(case, blocks, shared, **threads)
            if _held(limits, planned[0], blocks) >= _blocks(planned[0]):
                return planned
        return columns(case, 4 * limits.multiprocessors)
    if (found := _cluster_size(case, limits)) is not None:
        cluster, at_once = found
        planned = resident(case, cluster, **threads)
        if _worth_its_waves(case, limits, _held(limits, planned[0], at_once), at_once):
            return planned
    blocks = 2 * limits.multiprocessors
    slot = (((limits.shared_bytes + 1024) // 2 - 1024 - STATIC_SHARED - _table_bytes(case)) // 2) // 16 * 16
    vectors = case.aligned and case.positions % case.vector == 0 and case.group_length < 1 << 31
    if vectors and slot > 0:
        teams = _team_count(case, blocks, slot)
        if WAITING * _pipeline_units(case, limits, slot, teams) < _two_pass_units(case, limits):
            planned = pipeline(case, blocks // teams, teams, slot, **threads)
            if _held(limits, planned[0], blocks) >= blocks // teams * teams:
                return planned
    return two_pass(case, **threads)


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
