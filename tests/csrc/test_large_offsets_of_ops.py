"""Element offsets beyond 2^31 in the sampler, guidance, noise, row and LoRA kernels.

Huge tensors lie on reserved memory (`reserved.py`). The last blocks of a launch must give the very bits that the same kernel gives
on a small copy of what they see.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ltxkern.compiled import (
    combine_guidance,
    dual_add,
    extension,
    merge_lora,
    normalize_noise,
    qk_norm_rope,
    res2s,
    rows,
)
from ltxkern.compiled.tensors import PARAM_CODES
from ltxkern.ops.float8 import stochastic_e4m3
from tests.csrc.reserved import only_blocks, planner, reserved, run
from tests.csrc.shim_build import ROOT
from tests.ops.contract import assert_same, noise

BF16 = torch.bfloat16
BF16_CODE = PARAM_CODES[BF16]
HALF = 1 << 30
TOKENS = 16
# A block may be one token of one of two tensors.
THREADS, BLOCKS = 32, 2 * TOKENS
VECTORS = pytest.mark.parametrize("channels", [8, 7], ids=["vectors", "scalars"])


def huge(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    """A reserved tensor whose last rows are random numbers."""
    x = reserved(*shape, dtype=dtype)
    last = x.view(-1, shape[-1])[-TOKENS:]
    last.copy_(noise(*last.shape, seed=seed))
    return x


def tail(x: Tensor) -> Tensor:
    """A small copy of the last rows, (1, rows, width)."""
    return x.view(-1, x.shape[-1])[-TOKENS:].clone()[None]


def check_tails(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    call: Callable[..., None],
    outs: Sequence[Tensor],
    args: Sequence[Any],
    small: Sequence[Any],
    threads: int = THREADS,
) -> None:
    """`call("cuda", outs, *args)` in its last blocks leaves the tails that the whole of `call("cuda", ..., *small)` computes."""
    assert max(out.numel() for out in outs) > 1 << 31
    monkeypatch.setattr(module, "planned", planner(threads, BLOCKS))
    call("cuda", outs if len(outs) > 1 else outs[0], *args)
    wanted = [torch.full_like(tail(out), torch.nan) for out in outs]
    monkeypatch.setattr(module, "planned", planner(threads))
    call("cuda", wanted if len(outs) > 1 else wanted[0], *small)
    for out, value in zip(outs, wanted, strict=True):
        assert bool(value.isfinite().all())
        assert bool((value != 0).any())
        assert_same(tail(out), value)


@VECTORS
@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_half_steps(monkeypatch: pytest.MonkeyPatch, channels: int, compute: torch.dtype) -> None:
    shape = (3, HALF // channels + 5, channels)
    given = [huge(*shape, seed=seed) for seed in range(4)]
    anchor = huge(*shape, dtype=compute, seed=4)
    mask = reserved(*shape[:2], 1, dtype=torch.float32)
    mask[-1, -TOKENS:] = torch.linspace(0, 1, TOKENS)[:, None]
    stats = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [99.0, 0.25, 400.0]], dtype=torch.float64)
    small, small_mask, small_stats = [tail(x) for x in given], tail(mask), stats[2:]
    coefficients = (0.2, 0.7, 0.2, 0.1)

    def midpoint(tier: str, out: Sequence[Tensor], state: Tensor, x0: Tensor, z: Tensor, *rest: Any) -> None:
        mask, clean, stats = rest
        res2s.midpoint(tier, out, [state], [x0], [z], [mask], [clean], [stats], coefficients, True, compute)

    outs = [reserved(*shape), reserved(*shape, dtype=compute)]
    args = (*given[:3], mask, given[3], stats)
    check_tails(monkeypatch, res2s, midpoint, outs, args, (*small[:3], small_mask, small[3], small_stats))

    def advance(tier: str, out: Tensor, start: Tensor, first: Tensor, second: Tensor, z: Tensor, *rest: Any) -> None:
        mask, stats = rest
        lists = ([start], [first], [second], [z], [mask], [first], [stats])
        res2s.advance(tier, [out], *lists, (0.1, 0.2, *coefficients[1:]), [BF16])

    args = (anchor, *given[:3], mask, stats)
    small_args = (tail(anchor), *small[:3], small_mask, small_stats)
    check_tails(monkeypatch, res2s, advance, [reserved(*shape)], args, small_args)


@VECTORS
def test_sde_step(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    shape = (3, HALF // channels + 5, channels)
    given = [huge(*shape, seed=seed) for seed in range(3)]
    stats = torch.tensor([[0.0, 0.0, 0.0]] * 2 + [[99.0, 0.25, 400.0]], dtype=torch.float64)

    def call(tier: str, out: Tensor, sample: Tensor, denoised: Tensor, z: Tensor, stats: Tensor) -> None:
        res2s.sde_step(tier, out, sample, denoised, z, (0.7, 0.2, 0.1), stats)

    small = (*map(tail, given), stats[2:])
    check_tails(monkeypatch, res2s, call, [reserved(*shape)], (*given, stats), small)


@VECTORS
def test_dual_add(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    shape = (3, HALF // channels + 5, channels)
    x, first, second = (huge(*shape, seed=seed) for seed in range(3))
    small = [tail(value) for value in (x, first, second)]
    outs = [x, reserved(*shape)]
    check_tails(monkeypatch, dual_add, dual_add.run, outs, (x, first, second), small)


@VECTORS
def test_rms_norm_modulate(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    shape = (2, HALF // channels + 5, channels)
    x, scale, y, gate = (huge(*shape, seed=seed) for seed in range(4))
    shift, weight = noise(1, 1, channels, dtype=BF16), noise(channels, dtype=BF16)
    small = [tail(value) for value in (x, scale, y, gate)]
    monkeypatch.setattr(rows, "collapsed", with_room(rows.collapsed))
    check_tails(
        *(monkeypatch, rows, rows.rms_norm_modulate, [reserved(*shape)]),
        *((x, scale, shift, 1e-6, weight), (small[0], small[1], shift, 1e-6, weight)),
    )
    outs = [reserved(*shape), reserved(*shape)]
    args, few = (x, y, gate, scale, shift, 1e-6, weight), (small[0], *small[2:], small[1], shift, 1e-6, weight)
    check_tails(monkeypatch, rows, rows.gated_norm, outs, args, few)


@VECTORS
def test_gates(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    shape = (2, HALF // channels + 5, channels)
    x, y, gate = (huge(*shape, seed=seed) for seed in range(3))
    small = [tail(value) for value in (x, y, gate)]
    monkeypatch.setattr(rows, "collapsed", with_room(rows.collapsed))
    check_tails(monkeypatch, rows, rows.gated_residual, [reserved(*shape)], (x, y, gate), small)
    check_tails(
        *(monkeypatch, rows, rows.head_gate, [reserved(*shape)]),
        *((x, gate[..., 0]), (small[0], small[2][..., 0])),
    )


@VECTORS
def test_tables_of_a_row_index(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    """The last rows of tables of more than 2^31 elements."""
    count = (1 << 31) // channels + 2 * TOKENS
    scale, gate = huge(count, channels), huge(count, channels, seed=1)
    x, y = (noise(1, TOKENS, channels, dtype=BF16, seed=seed) for seed in (2, 3))
    index = torch.arange(TOKENS).flip(0)[None]
    few = [table[-TOKENS:].clone() for table in (scale, gate)]
    monkeypatch.setattr(rows, "planned", planner(THREADS))
    results = []
    for (first, second), places in (((scale, gate), index + (count - TOKENS)), (few, index)):
        normed, residual, pair = torch.empty_like(x), torch.empty_like(x), (torch.empty_like(x), torch.empty_like(x))
        rows.rms_norm_modulate("cuda", normed, x, first, second, 1e-6, None, places)
        rows.gated_norm("cuda", pair, x, y, second, first, second, 1e-6, None, places)
        rows.gated_residual("cuda", residual, x, y, second, places)
        results.append((normed, *pair, residual))
    assert_same(*results)
    assert all(bool(value.isfinite().all()) for value in results[0])


def with_room(collapsed: Callable[..., Any]) -> Callable[..., Any]:
    """`rows.collapsed`, refusing the copies that it would make of a huge operand."""

    def checked(operands: Sequence[Tensor | None]) -> Any:
        given, view = collapsed(operands)
        for before, after in zip(operands, given, strict=True):
            assert before is None or before.data_ptr() == after.data_ptr(), "a huge operand was copied"
        return given, view

    return checked


@pytest.mark.parametrize("layout", ["split", "interleaved"])
def test_qk_norm_rope(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    heads, pairs = 1, 8
    width = 2 * heads * pairs
    shape = (2, HALF // width + 5, width)
    q, k = huge(*shape), huge(*shape, seed=1)
    weights = noise(width, dtype=BF16, seed=2), noise(width, dtype=BF16, seed=3)
    # A table whose token stride carries its offsets beyond 2^31 too.
    table_stride = 4 * width
    tables = [reserved(2, heads, shape[1], table_stride, dtype=torch.float32) for _ in range(2)]
    for seed, table in enumerate(tables):
        table[-1, :, -TOKENS:, :pairs] = noise(heads, TOKENS, pairs, seed=4 + seed)
    cos, sin = (table[..., :pairs] for table in tables)
    assert cos.stride(2) * cos.shape[2] > 1 << 31
    small = [tail(q), tail(k), *weights, *(table[-1:, :, -TOKENS:].clone() for table in (cos, sin))]
    call = qk_norm_rope.run
    outs = [reserved(*shape), reserved(*shape)]
    check_tails(monkeypatch, qk_norm_rope, call, outs, (q, k, *weights, cos, sin, 1e-6, layout), (*small, 1e-6, layout))


@pytest.mark.parametrize("tall", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("small_rank", [16, 0], ids=["plain_cores", "tensor_cores"])
def test_merge_lora(tall: bool, dtype: torch.dtype, small_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_lora, "SMALL_RANK", small_rank)
    rank, long, short = 16, (1 << 29) + 70, 9
    size, seed = (long, short) if tall else (short, long), 1 << 40
    weight = reserved(*size, dtype=torch.uint8 if dtype.itemsize == 1 else dtype).view(dtype)
    factors = reserved(rank, size[1]), reserved(size[0], rank)
    part = (slice(-TOKENS, None), slice(None)) if tall else (slice(None), slice(-TOKENS, None))
    weight[part] = noise(*weight[part].shape).to(dtype)
    for index, factor in enumerate(factors):
        place = (..., slice(-TOKENS, None)) if index == 0 else (slice(-TOKENS, None), ...)
        factor[place] = noise(*factor[place].shape, seed=index + 1).to(BF16)
    a, b = (x.float() for x in (factors[0][:, part[1]], factors[1][part[0]]))
    rounding = "single" if dtype == BF16 else "stochastic"
    summed = weight[part].float() + 0.5 * (b @ a)
    index = torch.arange(size[0])[part[0], None] * size[1] + torch.arange(size[1])[None, part[1]]
    wanted = summed.to(BF16) if dtype == BF16 else stochastic_e4m3(summed, index, seed)
    assert int(index.max()) > 1 << 32
    case = merge_lora.describe(weight, [factors[0]], [factors[1]], [0.5], rounding, seed)
    (step,) = merge_lora.device_steps(case)
    assert ("tensor_cores" in step.kernel) == (small_rank == 0)
    assert step.grid[0] < 1 << 31
    with only_blocks(step.grid[0] - 2, 2):
        run(step, weight, *factors)
    # Sums in another order may round to the neighbour.
    close = torch.finfo(dtype).eps
    torch.testing.assert_close(weight[part].float(), wanted.float(), rtol=close, atol=close / 8)
    if dtype != BF16:
        assert float((weight[part].view(torch.uint8) == wanted.view(torch.uint8)).float().mean()) > 0.9


@VECTORS
def test_combine_guidance(channels: int) -> None:
    size = (HALF // channels + 5) * 3 * channels
    cond, uncond = (huge(1, size // channels, channels, seed=seed) for seed in range(2))
    out = reserved(1, size // channels, channels)
    case = combine_guidance.Case(BF16_CODE, size, channels == 8, (2.0, 0.0, 0.0), 0.5)
    assert case.vector == (4 if channels == 8 else 1)
    measure, apply = combine_guidance.device_steps(case, threads=THREADS)
    workspace = torch.zeros(combine_guidance.PARTIAL_BYTES * case.chunks, dtype=torch.uint8)
    arguments = (out, cond, uncond, None, None, workspace)
    with only_blocks(measure.grid[0] - 1):
        run(measure, *arguments)
    count = size - (case.chunks - 1) * case.chunk
    first, second = (x.view(-1)[-count:].double() for x in (cond, uncond))
    combined = first + 2 * (first - second)
    exact = [f for x in (first, combined) for f in (x.mean(), (x - x.mean()).square().sum())]
    partials = workspace.view(torch.float64).view(-1, 4)
    torch.testing.assert_close(partials[-1], torch.stack(exact), rtol=1e-6, atol=0)
    partials[:] = torch.tensor([0.0, 4.0, 0.0, 1.0])
    with only_blocks(apply.grid[0] - 1):
        run(apply, *arguments)
    wanted = tail(cond).float() + 2 * (tail(cond).float() - tail(uncond).float())
    torch.testing.assert_close(tail(out).float(), 1.5 * wanted, rtol=torch.finfo(BF16).eps, atol=0)


@VECTORS
def test_noise(channels: int) -> None:
    slices, length = 3, (HALF // channels + 5) * channels
    x, out = huge(slices, length // channels, channels), reserved(slices, length // channels, channels)
    case = normalize_noise.Case("normalize", BF16_CODE, slices, length, channels == 8)
    measure, apply = normalize_noise.device_steps(case, threads=THREADS)
    workspace = torch.zeros(case.workspace_bytes, dtype=torch.uint8)
    with only_blocks(measure.grid[0] - 1):
        run(measure, out, x, workspace)
    partials = workspace[: normalize_noise.PARTIAL_BYTES * slices * case.chunks].view(torch.float64).view(slices, -1, 2)
    last = x.view(-1)[-(length - (case.chunks - 1) * case.chunk) :].double()
    exact = torch.stack([last.mean(), (last - last.mean()).square().sum()])
    torch.testing.assert_close(partials[-1, -1], exact, rtol=1e-6, atol=0)
    # Mean 0.25 and M2 4 (length - 1): a deviation of 2 for every slice.
    partials[:, :, 0], partials[:, :, 1] = 0.25, 0.0
    partials[:, 0, 1] = 4.0 * (length - 1)
    with only_blocks(0):
        run(apply, out, x, workspace)
    wanted = (tail(x).double() - 0.25) / 2
    torch.testing.assert_close(tail(out).double(), wanted, rtol=torch.finfo(BF16).eps, atol=0)
    merge = normalize_noise.device_steps(normalize_noise.Case("statistics", BF16_CODE, slices, length, True))[1]
    stats = torch.full((slices, 3), torch.nan, dtype=torch.float64)
    run(merge, stats, x, workspace)
    rows = torch.tensor([[length, 0.25, 4.0 * (length - 1)]], dtype=torch.float64).expand(slices, 3)
    torch.testing.assert_close(stats, rows, rtol=1e-12, atol=0)


@pytest.mark.skipif(
    extension.unavailable("cpu") is not None, reason=f"CPU KERNELS NOT TESTED: {extension.unavailable('cpu')}"
)
def test_strides_of_rows_on_the_cpu() -> None:
    """The CPU kernels, on few rows that lie more than 2^31 elements apart."""
    import ltxkern

    width, apart = 24, (1 << 31) + 32
    base = reserved(3 * apart + 64)

    def spread(seed: int) -> Tensor:
        x = base[64 * seed :].as_strided((3, 2, width), (apart, 1 << 12, 1))
        x.copy_(noise(3, 2, width, dtype=BF16, seed=seed))
        return x

    x, y, gate, scale = (spread(seed) for seed in range(4))
    weight, table = noise(width, dtype=BF16), noise(3, 3, 2, 4)
    with ltxkern.use_backend("cpu"):
        for far, near in (
            (
                ltxkern.rms_norm_modulate(x, scale, gate),
                ltxkern.rms_norm_modulate(x.clone(), scale.clone(), gate.clone()),
            ),
            (ltxkern.gated_residual(x, y, gate), ltxkern.gated_residual(x.clone(), y.clone(), gate.clone())),
            (
                ltxkern.qk_norm_rope(x, y, weight, weight, table, table),
                ltxkern.qk_norm_rope(x.contiguous(), y.contiguous(), weight, weight, table, table),
            ),
        ):
            assert_same(far, near)


def test_no_cpu_kernel_narrows_an_index() -> None:
    """The compiler sees no 64-bit value that becomes a 32-bit one in csrc/cpu, whose kernels take whole tensors."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("INDEX WIDTHS OF CPU KERNELS NOT TESTED: needs g++ on x86-64")
    flags = ("-std=c++17", "-fsyntax-only", "-fopenmp", "-march=x86-64-v4", "-DLTXK_ISA=avx512", "-DLTXK_ISA_avx512=1")
    warnings = ("-Wconversion", "-Wno-sign-conversion", "-Wno-float-conversion")
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        includes = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}")
        command = [compiler, *flags, *warnings, *includes, str(source)]
        environment = os.environ | {"LC_ALL": "C"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        narrowed = [
            line
            for line in done.stderr.splitlines()
            if re.search(r"conversion from .*long.* to '(?!float|double)", line)
        ]
        assert narrowed == []
