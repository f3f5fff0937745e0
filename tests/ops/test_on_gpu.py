"""The ops on a GPU: no wait for the device, capture into CUDA graphs, the caller's stream, equal bits on repeat, every kernel.

The tests of each op run on the GPU too where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ltxkern
from ltxkern import dispatch
from ltxkern.compiled import group_norm_silu as group_norm
from ltxkern.compiled import nvrtc
from ltxkern.compiled.merge_lora import PRODUCT_RANK
from ltxkern.compiled.programs import limits_of
from ltxkern.dispatch import BackendError
from ltxkern.ops.float8 import to_e4m3
from ltxkern.ops.group_norm_silu import Arguments
from ltxkern.verify.cases import BF16, CASES, STEP, OpCase, Size
from tests.csrc import kernel_runs
from tests.ops import test_row_index
from tests.ops.contract import ACTIVATIONS, assert_as_close, assert_same, channels_last, held_to_torch, noise
from tests.serving import serving

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU OPS NOT TESTED: no CUDA device"),
]

Call = Callable[[], Any]
TIERS = ["cuda", "nvrtc"]
BACKENDS = [*TIERS, "triton"]
over_tiers = pytest.mark.parametrize("tier", TIERS)
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
LARGE = [(1, 512, 8, 45, 80), (1, 1024, 16, 34, 60), (1, 128, 20, 128, 128), (1, 512, 16, 45, 80)]


def use(tier: str) -> None:
    if (reason := dispatch.unavailable(tier)) is not None:
        pytest.skip(reason)


def drawn(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return noise(*shape, dtype=dtype, seed=seed).cuda()


def half_steps() -> Call:
    """Both of two modalities, with raw noise."""

    def both(dtype: torch.dtype, seed: int) -> list[Tensor]:
        return [drawn(1, tokens, 128, dtype=dtype, seed=seed) for tokens in (8160, 126)]

    latent, x0, x0_mid = (both(BF16, seed) for seed in range(3))
    first, second = both(torch.float64, 3), both(torch.float64, 4)

    def run() -> list[Tensor]:
        stats = [[ltxkern.noise_statistics(value) for value in values] for values in (first, second)]
        middles, anchors = ltxkern.res2s_midpoint(latent, x0, first, STEP, noise_stats=stats[0])
        return [*middles, *ltxkern.res2s_advance(anchors, x0, x0_mid, second, STEP, noise_stats=stats[1])]

    return run


def lora(rank: int, **how: Any) -> Call:
    weight, a, b = drawn(1000, 520), drawn(rank, 520, seed=1), drawn(1000, rank, seed=2)
    weight = weight.to(torch.float8_e4m3fn) if how else weight

    def run() -> list[Tensor]:
        merged = weight.clone()
        ltxkern.merge_lora_(merged, a, b, 0.1, **how)
        return [merged.float()]

    return run


def of_case(case: OpCase) -> Call:
    """A call of about a million elements, on copies of its arguments."""
    with torch.device("cuda"):
        tensors = case.tensors(BF16, Size(1, 1000, 1024))

    def run() -> list[Tensor]:
        return [value.float() for value in case.run({name: value.clone() for name, value in tensors.items()})]

    return run


CALLS: dict[str, Callable[[], Call]] = {str(case): (lambda case=case: of_case(case)) for case in CASES} | {
    "half_steps": half_steps,
    "merge_tile": lambda: lora(16),
    "merge_addmm": lambda: lora(PRODUCT_RANK + 1),
    "merge_float8": lambda: lora(16, rounding="stochastic", seed=7),
    "merge_tensor_cores": lambda: lora(384, rounding="single"),
    "merge_tensor_cores_stochastic": lambda: lora(64, rounding="stochastic", seed=7),
}
over_calls = pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)


@over_backends
@over_calls
def test_no_wait_and_equal_bits(backend: str, make: Callable[[], Call]) -> None:
    use(backend)
    call = make()
    with serving(backend):
        expected = call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_same(again, expected)


@over_backends
@over_calls
def test_capture_and_replay(backend: str, make: Callable[[], Call]) -> None:
    use(backend)
    call = make()
    with serving(backend):
        expected = call()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            on_side = call()
        torch.cuda.current_stream().wait_stream(side)
        assert_same(on_side, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, expected)


@over_tiers
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("width", [7, 261], ids="width{}".format)
def test_every_case(tier: str, case: OpCase, width: int) -> None:
    use(tier)
    with torch.device("cuda"):
        for dtype in ACTIVATIONS:
            if dtype in case.dtypes:
                held_to_torch(case, tier, dtype, Size(2, 5, width), shift=3)


@over_tiers
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [2056, 2051])
def test_merge_of_many_tiles(tier: str, dtype: torch.dtype, half: torch.dtype, columns: int) -> None:
    """More blocks than run at once, of a weight and factors that are met in 16 bytes and that are not, against fp64."""
    use(tier)
    rows, ranks, scales = 4000, (384, 40), [0.7, -1.5]
    weight = drawn(rows, columns).to(dtype)
    a = [drawn(rank, columns, dtype=half, seed=rank) * rank**-0.25 for rank in ranks]
    b = [drawn(rows, rank, dtype=half, seed=rank + 1) * rank**-0.25 for rank in ranks]
    for count in (1, 2):
        exact, plain, merged = weight.double(), weight.float(), weight.clone()
        for one, other, scale in zip(a[:count], b, scales, strict=False):
            exact = exact + scale * (other.double() @ one.double())
            plain = plain + scale * (other.float() @ one.float())
        with ltxkern.use_backend(tier):
            ltxkern.merge_lora_(merged, a[:count], b[:count], scales[:count])
        if dtype == torch.float8_e4m3fn:
            # As fp32 numbers: half an ulp of e4m3 is not free.
            assert_as_close(merged.float(), to_e4m3(plain).float(), exact)
        else:
            assert_as_close(merged, plain.to(dtype), exact)


@over_tiers
@pytest.mark.parametrize("op", test_row_index.OPS)
def test_a_row_whose_index_is_out_of_range_is_nan(tier: str, op: str) -> None:
    use(tier)
    with torch.device("cuda"), ltxkern.use_backend(tier):
        test_row_index.nan_where_out_of_range(op, BF16, 64, torch.int64)


@over_tiers
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 32, 4, 24, 40), 8), ((2, 6, 5, 7), 3), ((1, 4, 1331), 2), ((1, 256, 4, 24, 40), 32)],
    ids=str,
)
def test_every_group_norm_kernel(tier: str, dtype: torch.dtype, shape: tuple[int, ...], groups: int) -> None:
    use(tier)
    for name in kernel_runs.planners_of(shape):
        with torch.device("cuda"):
            given = kernel_runs.group_norm_of(name, shape, dtype)
        out = torch.full_like(given.x, torch.nan)
        with kernel_runs.forced(kernel_runs.PLANNERS[name]), ltxkern.use_backend(tier):
            given.run(groups, out)
        torch.testing.assert_close(
            out.double(),
            given.exact(groups),
            rtol=4 * torch.finfo(dtype).eps,
            atol=2e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@over_tiers
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_the_device_holds_what_was_counted(tier: str, shape: tuple[int, ...]) -> None:
    """Else every call takes the two passes that are there for other devices."""
    use(tier)
    x = channels_last(torch.empty(shape, device="cuda", dtype=BF16))
    limits = limits_of(tier, x)
    assert limits is not None
    case = group_norm.describe(x, Arguments(x, None, None, 32, 1e-5, None, None), limits)
    assert group_norm.choose(case, limits) == group_norm.choose(case, limits._replace(held=None))


def test_nvrtc_is_not_loaded_within_a_capture() -> None:
    use("nvrtc")
    # Of a size that no other test has: its program is not made yet.
    x = drawn(1, 8, 56)
    nvrtc._functions.clear()
    graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    with ltxkern.use_backend("nvrtc"), pytest.raises(RuntimeError, match="once before the capture"), graph:
        ltxkern.gated_residual(x, x, x)
    assert ltxkern.gated_residual(x, x, x).isfinite().all()


@over_backends
@pytest.mark.parametrize("shape", LARGE, ids=str)
@over_layouts
def test_shapes_of_the_upsampler(backend: str, shape: tuple[int, ...], last: bool) -> None:
    use(backend)
    x, residual = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    if last:
        x, residual = channels_last(x), channels_last(residual)
    weight, bias = (torch.randn(shape[1], device="cuda") for _ in range(2))
    with ltxkern.use_backend(backend):
        out = ltxkern.group_norm_silu(x, weight, bias, 32, residual=residual)
        again = ltxkern.group_norm_silu(x, weight, bias, 32, residual=residual)
    assert torch.equal(out, again)
    exact = F.silu(F.group_norm(x.float(), 32, weight, bias) + residual.float())
    torch.testing.assert_close(out.float(), exact, rtol=1e-2, atol=1e-3)


@over_backends
@pytest.mark.parametrize("shape", [(1, 64, 4, 24, 40), LARGE[0], LARGE[3]], ids=str)
def test_capture_and_replay_of_norms_with_new_values(backend: str, shape: tuple[int, ...]) -> None:
    use(backend)
    x = torch.randn(shape, device="cuda").bfloat16()
    out, squeezed = torch.empty_like(x), torch.empty_like(x)
    stream = torch.cuda.Stream()
    with ltxkern.use_backend(backend), torch.cuda.stream(stream):
        ltxkern.group_norm_silu(x, None, None, 32, out=out)
        ltxkern.pixel_norm_silu(x, out=squeezed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            ltxkern.group_norm_silu(x, None, None, 32, out=out)
            ltxkern.pixel_norm_silu(x, out=squeezed)
        for seed in range(3):
            x.copy_(torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"))
            graph.replay()
            assert torch.equal(out, ltxkern.group_norm_silu(x, None, None, 32))
            assert torch.equal(squeezed, ltxkern.pixel_norm_silu(x))


@over_backends
@pytest.mark.parametrize(
    "shape", [(1, 128, 9, 34, 60), (1, 96, 4, 16, 16), (1, 1024, 3, 17, 30), (2, 7, 5, 11), (1, 4096, 3, 3)], ids=str
)
@over_layouts
def test_pixel_norm(backend: str, shape: tuple[int, ...], last: bool) -> None:
    use(backend)
    x = torch.randn(shape, device="cuda")
    x = channels_last(x) if last else x
    if backend == "triton" and shape[1] > 1024:
        with ltxkern.use_backend(backend), pytest.raises(BackendError, match="1024"):
            ltxkern.pixel_norm_silu(x)
        return
    with ltxkern.use_backend(backend):
        out = ltxkern.pixel_norm_silu(x)
    exact = kernel_runs.exact_pixel_norm(x, 1e-8)
    torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", TIERS)
def test_a_smaller_program_leaves_a_larger_one_its_shared_memory(backend: str) -> None:
    use(backend)
    large, small = (torch.randn(1, 512, *rest, device="cuda").bfloat16() for rest in ((8, 45, 80), (4, 45, 80)))
    with ltxkern.use_backend(backend):
        first, *_, last = (ltxkern.group_norm_silu(x, None, None, 32) for x in (large, small, large))
    assert torch.equal(first, last)
