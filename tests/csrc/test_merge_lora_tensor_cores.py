"""The LoRA merge on tensor cores, run from its own source on CPU fibers: fragments, copies, tails, layouts, against fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern.compiled import merge_lora
from ltxkern.compiled.tensors import DeviceLimits
from ltxkern.ops.float8 import stochastic_e4m3, to_e4m3
from ltxkern.ops.merge_lora import Arguments
from tests.csrc.on_shim import H200, noting, on_shim
from tests.csrc.shim_build import shim
from tests.ops.contract import assert_as_close, noise

F16, BF16, F32, E4M3 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
WEIGHTS = pytest.mark.parametrize("dtype", [E4M3, F16, BF16, F32], ids=str)
HALVES = pytest.mark.parametrize("half", [F16, BF16], ids=str)
SCALES = (0.6, -0.25, 1.5)
Factors = list[Tensor]


def factors(rows: int, columns: int, half: torch.dtype, *ranks: int) -> tuple[Factors, Factors]:
    """Products of variance 1."""
    a = [noise(rank, columns, dtype=half, seed=10 + k, scale=rank**-0.25) for k, rank in enumerate(ranks)]
    b = [noise(rows, rank, dtype=half, seed=20 + k, scale=rank**-0.25) for k, rank in enumerate(ranks)]
    return a, b


def merge(
    *tensors: Any,
    rounding: str = "single",
    seed: int = 0,
    order: int = 1,
    scales: Sequence[float] = SCALES,
    limits: DeviceLimits = H200,
) -> None:
    """One launch on the shim: any rank on tensor cores, threads in a random order, copies that land early or late."""
    kernels: list[str] = []
    weight, a, b = tensors
    with (
        on_shim(run=noting(kernels), seed=order, small_rank=0),
        ltxkern.use_backend("cpu"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(merge_lora, "limits_of", lambda tier, x: limits)
        ltxkern.merge_lora_(weight, a, b, list(scales[: len(a)]), rounding=rounding, seed=seed)
    (kernel,) = kernels
    assert "tensor_cores" in kernel


def exact(weight: Tensor, a: Factors, b: Factors, scales: Sequence[float] = SCALES) -> Tensor:
    """fp64."""
    return weight.double() + sum(s * (y.double() @ x.double()) for x, y, s in zip(a, b, scales, strict=False))


def composition(weight: Tensor, a: Factors, b: Factors, scales: Sequence[float] = SCALES) -> Tensor:
    """torch in fp32 with one rounding."""
    total = weight.float() + sum(s * (y.float() @ x.float()) for x, y, s in zip(a, b, scales, strict=False))
    return to_e4m3(total) if weight.dtype == E4M3 else total.to(weight.dtype)


def check(merged: Tensor, *given: Any) -> None:
    """The numerical contract; e4m3 as fp32 numbers, so that half an ulp of e4m3 is not free."""
    wanted, theirs = exact(*given), composition(*given)
    if merged.dtype == E4M3:
        merged, theirs = merged.float(), theirs.float()
    assert_as_close(merged, theirs, wanted)


def merged_and_checked(weight: Tensor, a: Factors, b: Factors, scales: Sequence[float] = SCALES, **how: Any) -> None:
    merged = weight.clone()
    merge(merged, a, b, scales=scales, **how)
    check(merged, weight, a, b, scales)


@WEIGHTS
@HALVES
@pytest.mark.parametrize("rank", [1, 15, 16, 17, 64])
def test_ranks(dtype: torch.dtype, half: torch.dtype, rank: int) -> None:
    merged_and_checked(noise(70, 133).to(dtype), *factors(70, 133, half, rank))


@WEIGHTS
@HALVES
def test_the_rank_of_the_distilled_lora(dtype: torch.dtype, half: torch.dtype) -> None:
    merged_and_checked(noise(128, 136).to(dtype), *factors(128, 136, half, 384))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (129, 127), (128, 256), (131, 260)], ids=str)
@pytest.mark.parametrize("dtype", [E4M3, BF16, F32], ids=str)
def test_sizes(dtype: torch.dtype, size: tuple[int, int]) -> None:
    merged_and_checked(noise(*size).to(dtype), *factors(*size, BF16, 24))


@HALVES
def test_products_are_aligned_to_the_largest_and_cut_off(half: torch.dtype) -> None:
    """The emulation loses what tensor cores lose, on A100 one bit behind fp32's last, and a sum of eight at a time."""
    small = [2.0**-23, 2.0**-24, 2.0**-25]
    a = torch.ones(16, 8, dtype=half)
    a[[1, 9]] = 2.0**-12
    b = torch.zeros(6, 16, dtype=half)
    for row, value in enumerate(small):
        # In the middle of eight that cancel, and after them.
        b[row, :3] = torch.tensor([1.0, value * 2.0**12, -1.0])
        b[row + 3, [0, 2, 9]] = torch.tensor([1.0, -1.0, value * 2.0**12], dtype=half)
    merged = torch.zeros(6, 8)
    merge(merged, [a], [b])
    expected = torch.tensor([small[0], small[1], 0.0, *small])
    assert torch.equal(merged, (expected * torch.tensor(SCALES[0]))[:, None].expand(6, 8))


@WEIGHTS
@HALVES
def test_several_loras_share_one_rounding(dtype: torch.dtype, half: torch.dtype) -> None:
    merged_and_checked(noise(66, 72).to(dtype), *factors(66, 72, half, 40, 33, 96))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("scales", [(0.0, 0.7), (1e-40, -3.0), (-2.0, 1e-3, 2.0)], ids=str)
def test_scales_of_several_loras(dtype: torch.dtype, scales: tuple[float, ...]) -> None:
    """A zero, signs, and numbers so far apart that one LoRA is nothing beside the other."""
    ranks = (24, 40, 9)[: len(scales)]
    merged_and_checked(noise(40, 72).to(dtype), *factors(40, 72, BF16, *ranks), scales)


# Shared memory that has room for all steps of B, for two beside those under way, and for these alone.
@pytest.mark.parametrize(
    ("dtype", "ranks", "limits", "held"),
    [
        *((BF16, (20,), (1, 232448), 1), (E4M3, (70, 130), (1, 232448), 5), (F32, (70,), (3, 101376), 2)),
        *((BF16, (130,), (1, 101376), 0), (F16, (70, 130), (1, 170000), 2)),
    ],
    ids=str,
)
def test_blocks_walk_from_tile_to_tile(
    dtype: torch.dtype, ranks: tuple[int, ...], limits: tuple[int, int], held: int
) -> None:
    """Along a strip of rows and on to the next one."""
    size, device = (260, 136), DeviceLimits(*limits)
    weight, (a, b) = noise(*size).to(dtype), factors(*size, BF16, *ranks)
    case = merge_lora.describe(Arguments(weight, a, b, SCALES[: len(a)], 1, "single"), device)
    (step,) = merge_lora.device_steps(case)
    assert (step.parameters["held"], step.parameters["walk"], *step.grid) == (held, 2 if dtype == F32 else 4, limits[0])
    merged_and_checked(weight, a, b, limits=device)


@WEIGHTS
@pytest.mark.parametrize("layout", ["transposed", "rows", "columns", "odd_stride", "misaligned"])
@pytest.mark.parametrize("ranks", [(16,), (16, 5)], ids=str)
def test_layouts_of_the_weight(dtype: torch.dtype, layout: str, ranks: tuple[int, ...]) -> None:
    """Only the view is written, whatever its strides and its first address."""
    rows, columns = 40, 68
    base = noise(160, 160).to(dtype)
    view = {
        "transposed": lambda x: x.t()[:rows, :columns],
        "rows": lambda x: x[: 2 * rows : 2, 4 : 4 + columns],
        "columns": lambda x: x[:rows, 1 : 1 + 2 * columns : 2],
        "odd_stride": lambda x: x.flatten()[: 77 * rows].view(rows, 77)[:, :columns],
        "misaligned": lambda x: x[:rows, 3 : 3 + columns],
    }[layout]
    kept = base.clone()
    a, b = factors(rows, columns, BF16, *ranks)
    merge(view(base), a, b)
    check(view(base), view(kept), a, b)
    raw, before = (x.view(torch.uint8 if dtype == E4M3 else dtype) for x in (base, kept))
    view(raw).copy_(view(before))
    assert torch.equal(raw, before)


@HALVES
@pytest.mark.parametrize("which", ["a", "b", "both"])
@pytest.mark.parametrize("shift", [1, 4])
def test_factors_that_do_not_begin_on_16_bytes(half: torch.dtype, which: str, shift: int) -> None:
    weight = noise(40, 64)

    def moved(x: Tensor) -> Tensor:
        result = torch.cat([x.new_full((shift,), torch.nan), x.flatten()])[shift:].view(x.shape)
        assert result.data_ptr() % 16 == 2 * shift
        return result

    (a,), (b,) = factors(40, 64, half, 48)
    merged_and_checked(weight, [moved(a) if which != "b" else a], [moved(b) if which != "a" else b])


def test_what_lies_behind_a_factor_is_not_read() -> None:
    """NaN behind the last rank of either factor, and behind the last row and column, reaches no weight."""
    for rank in (8, 17, 40):
        weight = noise(24, 40).bfloat16()
        (a,), (b,) = factors(24, 40, BF16, rank)
        behind = [torch.cat([x, torch.full((64, x.shape[1]), torch.nan, dtype=BF16)])[: x.shape[0]] for x in (a, b)]
        merged_and_checked(weight, [behind[0]], [behind[1]])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_row_and_column(value: float) -> None:
    """Not even the zeros beside the last column carry it to what lies behind the view."""
    for dtype in (BF16, F32):
        base, (a,), (b,) = noise(30, 52).to(dtype), *factors(30, 50, BF16, 20)
        a[19, 7], b[3, 0] = value, torch.nan
        merged = base.clone()
        merge(merged[:, :50], [a], [b])
        assert torch.equal(merged[:, :50].isfinite(), exact(base[:, :50], [a], [b]).isfinite())
        assert torch.equal(merged[:, 50:], base[:, 50:])


@pytest.mark.parametrize("ranks", [(40,), (24, 40)], ids=str)
@pytest.mark.parametrize("columns", [64, 61])
def test_stochastic_rounding_is_that_of_the_counter(ranks: tuple[int, ...], columns: int) -> None:
    weight, seed = noise(140, columns).to(E4M3), (1 << 40) + 3
    a, b = factors(140, columns, BF16, *ranks)
    merged = weight.clone()
    merge(merged, a, b, rounding="stochastic", seed=seed)
    wide = exact(weight, a, b)
    index = torch.arange(weight.numel()).reshape(weight.shape)
    # Where an error of fp32 sums could not have moved the choice.
    low, high = (stochastic_e4m3((wide + sign * 1e-5).float(), index, seed).view(torch.uint8) for sign in (-1, 1))
    sure = low == high
    assert float(sure.float().mean()) > 0.9
    assert torch.equal(merged.view(torch.uint8)[sure], low[sure])


@WEIGHTS
@HALVES
def test_equal_bits_whatever_the_order_of_threads(dtype: torch.dtype, half: torch.dtype) -> None:
    weight = noise(130, 131).to(dtype)
    a, b = factors(130, 131, half, 72, 30)
    first, second = weight.clone(), weight.clone()
    merge(first, a, b)
    merge(second, a, b, order=99)
    assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def test_the_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(weight: torch.dtype, *pairs: tuple[torch.dtype, torch.dtype, int]) -> str:
        a = [torch.empty(rank, 8, dtype=one) for one, _, rank in pairs]
        b = [torch.empty(8, rank, dtype=other) for _, other, rank in pairs]
        case = merge_lora.describe(
            Arguments(torch.empty(8, 8, dtype=weight), a, b, SCALES[: len(a)], 1, "single"), H200
        )
        (step,) = merge_lora.device_steps(case)
        assert step.kernel in shim().kernels()
        return step.kernel

    monkeypatch.setattr(merge_lora, "SMALL_RANK", 16)
    plain = "ltxk::merge_lora"
    assert named(E4M3, (BF16, BF16, 16)) == plain
    assert named(E4M3, (BF16, BF16, 17)) == f"{plain}_tensor_cores<ltxk::bf16, false>"
    assert named(BF16, (F16, F16, 17)) == f"{plain}_tensor_cores<ltxk::f16, false>"
    assert named(F32, (F16, F16, 17)) == f"{plain}_tensor_cores<ltxk::f16, true>"
    assert named(E4M3, (BF16, BF16, 8), (BF16, BF16, 9)) == f"{plain}_tensor_cores<ltxk::bf16, false>"
    assert named(E4M3, (BF16, BF16, 64), (F16, F16, 64)) == plain
    assert named(E4M3, (BF16, F16, 64)) == plain
    assert named(BF16, (F32, F32, 64)) == plain
