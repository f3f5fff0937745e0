"""The CUDA kernels of the norm ops, run from their own source on CPU fibers: layouts, tails, block sizes, schedules."""

import pytest
import torch

from ltxkern.compiled import extension
from ltxkern.compiled import group_norm_silu as group_norm
from ltxkern.compiled import pixel_norm_silu as pixel_norm
from ltxkern.compiled.steps import Launch
from tests.csrc import kernel_runs
from tests.csrc.shim_build import shim
from tests.ops.contract import noise

SHAPES = [((1, 16, 2, 4, 8), 4), ((2, 6, 5, 7), 3), ((1, 4, 331), 2), ((2, 8, 1, 3), 8), ((3, 12), 2), ((1, 3, 1), 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    pytest.param(name, planner, shape, groups, dtype, id=f"{name}-{shape}-{dtype}")
    for shape, groups in SHAPES
    for dtype in DTYPES
    for name, planner in kernel_runs.group_norm_planners(shape, dtype)
]


@pytest.mark.parametrize(("name", "planner", "shape", "groups", "dtype"), CASES)
def test_group_norm(
    name: str, planner: kernel_runs.Planner, shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    shim().schedule(7)
    kernel_runs.run_group_norm(shim(), name, planner, shape, groups, dtype)


@pytest.mark.parametrize("name", [*kernel_runs.CONTIGUOUS, *kernel_runs.PIPELINES])
def test_schedules_do_not_change_a_bit(name: str) -> None:
    planner = (kernel_runs.CONTIGUOUS | kernel_runs.PIPELINES)[name]
    results = []
    for seed in range(3):
        shim().schedule(seed, shuffle=seed > 0)
        results.append(kernel_runs.run_group_norm(shim(), name, planner, (1, 8, 4, 4), 4, torch.float32))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", kernel_runs.CONTIGUOUS)
def test_misaligned_views_take_scalar_access(name: str) -> None:
    shim().schedule(1)
    kernel_runs.run_group_norm(shim(), name, kernel_runs.CONTIGUOUS[name], (1, 4, 64), 2, torch.bfloat16, misalign=True)


@pytest.mark.parametrize("name", [*kernel_runs.CONTIGUOUS, *kernel_runs.PIPELINES])
def test_a_large_mean_and_a_constant_group(name: str) -> None:
    planner = (kernel_runs.CONTIGUOUS | kernel_runs.PIPELINES)[name]
    x = torch.cat([1e4 + noise(1, 4, 64), torch.full((1, 4, 64), 3.0)], dim=1)
    out = torch.full_like(x, torch.nan)
    case = group_norm.describe(out, x, None, None, 2, 1e-5, None, None)
    steps, workspace = planner(case)
    extension.device_program(shim(), steps, group_norm.ARGUMENTS)(
        out, x, None, None, None, None, torch.empty(workspace, dtype=torch.uint8)
    )
    exact = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 2, eps=1e-5))
    # What is kept on chip is taken about one of its values; a mean alone has the digits of 1e4 in fp32.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-3 if name.startswith("two_pass") else 4e-6)
    assert bool((out[:, 4:] == 0).all())


@pytest.mark.parametrize("name", [*kernel_runs.CONTIGUOUS, *kernel_runs.PIPELINES, *kernel_runs.CHANNELS_LAST])
@pytest.mark.parametrize("into", ["x", "residual"])
def test_group_norm_into_its_own_input(name: str, into: str) -> None:
    """Bit-equal to the result in memory of its own."""
    results = []
    for own in (True, False):
        x, residual = noise(2, 8, 3, 16), noise(2, 8, 3, 16, seed=1)
        if name in kernel_runs.CHANNELS_LAST:
            x, residual = kernel_runs.channels_last(x), kernel_runs.channels_last(residual)
        out = torch.full_like(x, torch.nan) if own else {"x": x, "residual": residual}[into]
        case = group_norm.describe(out, x, None, None, 4, 1e-5, residual, None)
        planners = kernel_runs.CONTIGUOUS | kernel_runs.PIPELINES | kernel_runs.CHANNELS_LAST
        steps, size = planners[name](case)
        workspace = torch.full((size,), 0xCD, dtype=torch.uint8)
        shim().schedule(3)
        extension.device_program(shim(), steps, group_norm.ARGUMENTS)(out, x, None, None, residual, None, workspace)
        results.append(out)
    assert torch.equal(*results)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [24, 300])
def test_pixel_norm_into_its_own_input(channels: int, last: bool) -> None:
    results = []
    for own in (True, False):
        x = noise(2, channels, 3, 16)
        x = kernel_runs.channels_last(x) if last else x
        out = torch.full_like(x, torch.nan) if own else x
        case = pixel_norm.describe(out, x, 1e-6, None)
        launch = pixel_norm.columns(case, 64) if last else pixel_norm.rows(case, 100 << 10, 64)
        shim().schedule(3)
        extension.device_program(shim(), (launch,), pixel_norm.ARGUMENTS)(out, x, None)
        results.append(out)
    assert torch.equal(*results)


def test_partials_of_many_chunks_are_finalised_by_their_own_kernel() -> None:
    x = noise(1, 2, 1500)
    case = group_norm.describe(x, x, None, None, 1, 1e-5, None, None)
    steps, _ = group_norm.two_pass(case, chunk_bytes=4, threads=32)
    assert [step.kernel for step in steps if isinstance(step, Launch)][1] == "ltxk::group_norm_finalize"
    shim().schedule(0)
    kernel_runs.run_group_norm(
        shim(),
        "two_pass",
        lambda case: group_norm.two_pass(case, chunk_bytes=4, threads=32),
        (1, 2, 700),
        1,
        torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("threads", [32, 128])
@pytest.mark.parametrize(
    "shape", [(1, 16, 4, 8), (2, 7, 5, 3), (1, 1024, 2, 4), (1, 129, 17), (3, 40), (1, 1, 1)], ids=str
)
def test_pixel_norm(shape: tuple[int, ...], threads: int, last: bool, dtype: torch.dtype) -> None:
    shim().schedule(threads)
    kernel_runs.run_pixel_norm(shim(), shape, dtype, last=last and len(shape) > 2, threads=threads)


def test_a_divergent_plan_is_refused() -> None:
    program = shim().DeviceProgram(1)
    with pytest.raises(KeyError, match="no kernel"):
        program.add_launch("ltxk::no_such_kernel", (1, 1, 1), 32, 0, 1, False, b"", [])
    with pytest.raises(ValueError, match="bytes of parameters"):
        program.add_launch("ltxk::group_norm_finalize", (1, 1, 1), 32, 0, 1, False, bytes(8), [])
    with pytest.raises(TypeError, match="takes 1 tensors"):
        program(torch.zeros(1), torch.zeros(1))
