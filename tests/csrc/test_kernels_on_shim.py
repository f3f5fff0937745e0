"""Every case of the table and every kernel of the norms on the shim: odd widths, misaligned tensors, block sizes, schedules."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor

import ltxkern
from ltxkern.compiled import group_norm_silu as group_norm
from ltxkern.compiled.steps import Launch, divider
from ltxkern.verify.cases import CASES, F32, OpCase, Size
from tests.csrc.kernel_runs import (
    COLUMNS_ON_CHIP,
    CONTIGUOUS,
    PLANNERS,
    GroupNorm,
    exact_pixel_norm,
    forced,
    group_norm_of,
    planners_of,
)
from tests.csrc.on_shim import H200, noting, on_shim
from tests.csrc.shim_build import shim
from tests.ops.contract import ACTIVATIONS, assert_as_close, channels_last, held_to_torch, misaligned, noise, poisoned

# Numbers that kernels divide are below 2^31.
MOST = (1 << 31) - 1
SHAPES = [((1, 16, 2, 4, 8), 4), ((2, 6, 5, 7), 3), ((1, 4, 331), 2), ((2, 8, 1, 3), 8), ((3, 12), 2), ((1, 3, 1), 1)]
# Four lanes do not have all channels of their groups.
SHAPES += [((2, 6, 2, 3), 2)]
# Tiles of whole groups: of one access, of two lanes, and several tiles.
SHAPES += [((2, 256, 1, 7, 5), 32), ((1, 512, 3, 13), 32), ((1, 256, 29), 8)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_and_schedules_do_not_change_a_bit(case: OpCase) -> None:
    for dtype in case.dtypes:
        for width, shift in ((16, 0), (8, 3), (7, 3)):
            results = []
            for seed in range(3):
                with on_shim(64, seed=seed, shuffle=seed > 0):
                    results.append(held_to_torch(case, "cpu", dtype, Size(2, 5, width), shift))
            for others in results[1:]:
                for one, other in zip(results[0], others, strict=True):
                    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


ROW_OPS = (
    *("rms_norm_modulate", "gated_residual_rms_norm_modulate", "gated_residual_rms_norm_modulate_twice"),
    *("gated_residual", "head_gate", "qk_norm_rope"),
)


def whole_warps(op: str, dtype: torch.dtype) -> int:
    """The least width at which rows are whole warps; queries have 4 widths, in two heads."""
    return (512 if op == "qk_norm_rope" else 2048) // dtype.itemsize


@pytest.mark.parametrize("case", [case for case in CASES if case.op in ROW_OPS], ids=str)
def test_every_case_of_whole_warps(case: OpCase) -> None:
    """In fresh memory and in place, one warp a row and three; the kernels know their dtypes, but for what these leave out."""
    kernels: list[str] = []
    for dtype in case.dtypes:
        # Three warps share a row, or one has it alone; heads of 32 packs of pairs are the longest.
        for warps in (1, 3) if case.op != "qk_norm_rope" else (1,):
            tensors = case.tensors(dtype, Size(2, 5, warps * whole_warps(case.op, dtype)))
            changed: dict[str, Any] = {"weight": None} if "weight" in tensors else {}
            with ltxkern.use_backend("torch"):
                wanted = case.run(tensors, **changed)
            kernels.clear()
            with on_shim(seed=warps, run=noting(kernels)), ltxkern.use_backend("cpu"):
                results = case.run(tensors, [poisoned(value) for value in wanted], **changed)
                kept = {name: value.clone() for name, value in tensors.items()}
                outputs = [kept[names[-min(place, 1)]] for place, names in enumerate(case.may_be[:2])]
                outputs += map(poisoned, wanted[2:])
                in_place = case.run(kept, outputs, **changed)
            mixed = case.variant == "vectors" and dtype != F32
            general = mixed or case.variant == "column" or "heads" in case.variant
            assert all(("_packs<" in kernel) != general for kernel in kernels), kernels
            for one, same, other in zip(results, in_place, wanted, strict=True):
                eps = torch.finfo(dtype).eps
                largest = max(1.0, float(other.abs().max()))
                torch.testing.assert_close(one.double(), other.double(), rtol=4 * eps, atol=8 * eps * largest)
                assert torch.equal(one, same)


def test_sines_of_keys_at_any_address_beside_shared_cosines() -> None:
    """Tables of k that share their cosines with q count by themselves: the kernel of packs needs whole 16 bytes of all of them."""
    x, weight, cos, sin = noise(1, 5, 2048), noise(2048), noise(1, 16, 5, 64), noise(1, 16, 5, 64, seed=1)
    kernels: list[str] = []
    with on_shim(run=noting(kernels)), ltxkern.use_backend("cpu"):
        results = ltxkern.qk_norm_rope(x, x, weight, weight, cos, sin, k_cos=cos, k_sin=misaligned(sin))
        expected = ltxkern.qk_norm_rope(x, x, weight, weight, cos, sin)
    assert ["_packs<" in kernel for kernel in kernels] == [False, True]
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other)


def group_norm_held(planner: str, given: GroupNorm, groups: int, seed: int = 7, shuffle: bool = True) -> Tensor:
    """One call with every optional argument, in poisoned memory, held to the numerical contract; returns the result."""
    out = torch.full_like(given.x, torch.nan)
    with on_shim(seed=seed, shuffle=shuffle), forced(PLANNERS[planner]), ltxkern.use_backend("cpu"):
        given.run(groups, out)
    with ltxkern.use_backend("torch"):
        composition = given.run(groups)
    assert_as_close(out, composition, given.exact(groups))
    return out


def channels_of(planner: str) -> int:
    """As few as its kernels take."""
    return 128 if planner in COLUMNS_ON_CHIP else 8


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_group_norm(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    for planner in planners_of(shape):
        group_norm_held(planner, group_norm_of(planner, shape, dtype), groups)


@pytest.mark.parametrize("planner", PLANNERS)
def test_schedules_do_not_change_a_bit(planner: str) -> None:
    channels = channels_of(planner)
    given = group_norm_of(planner, (1, channels, 4, 4), torch.float32)
    first, *others = (group_norm_held(planner, given, 4, seed, shuffle=seed > 0) for seed in range(3))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("planner", CONTIGUOUS)
def test_misaligned_views_take_scalar_access(planner: str) -> None:
    given = group_norm_of(planner, (1, 4, 64), torch.bfloat16)
    group_norm_held(planner, given._replace(x=misaligned(given.x)), 2, seed=1)


@pytest.mark.parametrize("planner", CONTIGUOUS)
def test_a_large_mean_and_a_constant_group(planner: str) -> None:
    x = torch.cat([1e4 + noise(1, 4, 64), torch.full((1, 4, 64), 3.0)], dim=1)
    out = poisoned(x)
    with on_shim(), forced(PLANNERS[planner]), ltxkern.use_backend("cpu"):
        ltxkern.group_norm_silu(x, None, None, 2, out=out)
    exact = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 2, eps=1e-5))
    # A mean alone has the digits of 1e4 in fp32.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-3)
    assert bool((out[:, 4:] == 0).all())


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("into", ["x", "residual"])
def test_group_norm_into_its_own_input(planner: str, into: str) -> None:
    """Bit-equal to the result in memory of its own."""
    results = []
    for own in (True, False):
        given = group_norm_of(planner, (2, channels_of(planner), 3, 16), torch.float32)
        out = torch.full_like(given.x, torch.nan) if own else getattr(given, into)
        with on_shim(seed=3), forced(PLANNERS[planner]), ltxkern.use_backend("cpu"):
            results.append(ltxkern.group_norm_silu(given.x, None, None, 4, residual=given.residual, out=out))
        assert results[-1] is out
    assert torch.equal(*results)


def test_partials_of_many_chunks_are_finalised_by_their_own_kernel() -> None:
    kernels: list[str] = []
    x = noise(1, 2, 1500)
    with (
        on_shim(seed=0, run=noting(kernels)),
        forced(partial(group_norm.two_pass, chunk_bytes=4, threads=32)),
        ltxkern.use_backend("cpu"),
    ):
        out = ltxkern.group_norm_silu(x, None, None, 1, out=poisoned(x))
    assert kernels[1:2] == ["ltxk::group_norm_finalize"]
    exact = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 1, eps=1e-5))
    with ltxkern.use_backend("torch"):
        assert_as_close(out, ltxkern.group_norm_silu(x, None, None, 1), exact)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("threads", [32, 128])
@pytest.mark.parametrize(
    "shape", [(1, 16, 4, 8), (2, 7, 5, 3), (1, 1024, 2, 4), (1, 129, 17), (3, 40), (1, 1, 1)], ids=str
)
def test_pixel_norm(shape: tuple[int, ...], threads: int, last: bool, dtype: torch.dtype) -> None:
    """An error of a few ulp against fp64."""
    x, weight = noise(*shape, scale=3.0).to(dtype), noise(shape[1], seed=1)
    x = channels_last(x) if last and len(shape) > 2 else x
    out = torch.full_like(x, torch.nan)
    with on_shim(threads, seed=threads), ltxkern.use_backend("cpu"):
        ltxkern.pixel_norm_silu(x, 1e-6, weight=weight, out=out)
    exact = exact_pixel_norm(x, 1e-6, weight)
    torch.testing.assert_close(out.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4e-6)


@pytest.mark.parametrize("shape", [(2, 24, 3, 16), (1, 300, 3, 8), (2, 7, 3, 5)], ids=str)
def test_pixel_norm_into_frames_of_a_longer_buffer(shape: tuple[int, ...]) -> None:
    """The kernel writes there itself: in vectors where the frames lie so, else by elements."""
    x, buffer = noise(*shape), torch.full((*shape[:2], shape[2] + 2, shape[3]), torch.nan)
    kernels: list[str] = []
    with on_shim(64, seed=3, run=noting(kernels)), ltxkern.use_backend("cpu"):
        expected = ltxkern.pixel_norm_silu(x, 1e-6)
        ltxkern.pixel_norm_silu(x, 1e-6, out=buffer[:, :, 1:-1])
    assert [kernel.split("<")[0] for kernel in kernels] == ["ltxk::pixel_norm_rows"] * 2
    assert torch.equal(buffer[:, :, 1:-1], expected)
    assert bool(buffer[:, :, [0, -1]].isnan().all())


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [24, 300])
def test_pixel_norm_into_its_own_input(channels: int, last: bool) -> None:
    results = []
    for own in (True, False):
        x = noise(2, channels, 3, 16)
        x = channels_last(x) if last else x
        out = torch.full_like(x, torch.nan) if own else x
        with on_shim(64, seed=3), ltxkern.use_backend("cpu"):
            results.append(ltxkern.pixel_norm_silu(x, 1e-6, out=out))
    assert torch.equal(*results)


@pytest.mark.parametrize("held", [0, 1])
def test_a_device_that_holds_less_than_was_counted_takes_two_passes(held: int) -> None:
    """And gives their bits; one that holds as much takes the kernel on chip."""
    given = group_norm_of("columns", (1, 256, 3, 16), torch.bfloat16)
    kernels: list[str] = []
    asked: list[str] = []

    def answer(many: int) -> Tensor:
        def holds(launch: Launch) -> int:
            asked.append(launch.kernel)
            return many

        with on_shim(limits=H200._replace(held=holds), run=noting(kernels)), ltxkern.use_backend("cpu"):
            return given.run(32, poisoned(given.x))

    few = answer(held)
    assert kernels == [
        "ltxk::group_norm_stats_columns<ltxk::bf16, 8>",
        "ltxk::group_norm_finalize",
        "ltxk::group_norm_apply_columns<ltxk::bf16, 8>",
    ]
    chip = "ltxk::group_norm_columns<ltxk::bf16, 8>"
    assert chip in asked
    kernels.clear()
    torch.testing.assert_close(answer(1 << 20), few)
    assert kernels == [chip]
    passes = partial(group_norm.columns, blocks=4 * H200.multiprocessors)
    with on_shim(), forced(passes), ltxkern.use_backend("cpu"):
        assert torch.equal(few, given.run(32, poisoned(given.x)))


@settings(deadline=None)
@given(by=strategies.integers(1, MOST), times=strategies.integers(0, MOST))
def test_division_by_a_prepared_number(by: int, times: int) -> None:
    """Next to multiples of the divisor, of powers of two and of the largest numbers, where a rounded factor would show."""
    for divisor in {by, *(min(MOST, max(1, (1 << by.bit_length()) + offset)) for offset in (-1, 0, 1)), MOST - by % 3}:
        multiple = times % (MOST // divisor + 1) * divisor
        for number in {*range(multiple - 1, multiple + 2), divisor - 1, divisor, MOST - 1, MOST}:
            if 0 <= number <= MOST:
                assert shim().divide(number, divider(divisor)) == number // divisor, (number, divisor)


def test_a_divergent_program_is_refused() -> None:
    program = shim().DeviceProgram(1)
    with pytest.raises(KeyError, match="no kernel"):
        program.add_launch("ltxk::no_such_kernel", (1, 1, 1), 32, 0, False, b"", [])
    with pytest.raises(ValueError, match="bytes of parameters"):
        program.add_launch("ltxk::group_norm_finalize", (1, 1, 1), 32, 0, False, bytes(8), [])
    with pytest.raises(TypeError, match="takes 1 tensors"):
        program(torch.zeros(1), torch.zeros(1))
