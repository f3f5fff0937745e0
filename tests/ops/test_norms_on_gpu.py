"""The norm ops on a GPU: every CUDA kernel and backend against fp64, graph capture and replay, streams, repeatability."""

import pytest
import torch
import torch.nn.functional as F

import ltxkern
from ltxkern import dispatch
from ltxkern.compiled import extension
from ltxkern.compiled import group_norm_silu as launch
from ltxkern.compiled.tensors import device_limits
from ltxkern.ops.group_norm_silu import Arguments
from tests.csrc import kernel_runs
from tests.ops.contract import noise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU KERNELS NOT TESTED: no CUDA device"),
]

BACKENDS = ["cuda", "nvrtc", "triton"]
LARGE = [(1, 512, 8, 45, 80), (1, 1024, 16, 34, 60), (1, 128, 20, 128, 128), (1, 512, 16, 45, 80)]


def use(backend: str) -> None:
    if (reason := dispatch.unavailable(backend)) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("tier", ["cuda", "nvrtc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((1, 32, 4, 24, 40), 8), ((2, 6, 5, 7), 3), ((1, 4, 1331), 2)], ids=str)
def test_every_kernel(tier: str, dtype: torch.dtype, shape: tuple[int, ...], groups: int) -> None:
    use(tier)
    limits = device_limits(torch.cuda.current_device())
    build = extension.program_builder(tier)
    for name, planner in kernel_runs.group_norm_planners(shape, dtype):
        if "cluster" in name and limits.cluster_blocks == 1:
            continue
        x, residual = (3 * noise(*shape) + 5).to(dtype).cuda(), noise(*shape, seed=1).to(dtype).cuda()
        if name in kernel_runs.CHANNELS_LAST:
            x, residual = kernel_runs.channels_last(x), kernel_runs.channels_last(residual)
        weight, bias, conv_bias = (noise(shape[1], seed=seed).cuda() for seed in (2, 3, 4))
        out = torch.empty_like(x).fill_(torch.nan)
        case = launch.describe(out, Arguments(x, weight, bias, groups, 1e-5, residual, conv_bias))
        steps, workspace = planner(case)
        build(steps, launch.ARGUMENTS)(
            out, x, weight, bias, residual, conv_bias, torch.empty(workspace, dtype=torch.uint8, device="cuda")
        )
        exact = kernel_runs.exact_group_norm(x, weight, bias, groups, residual, conv_bias)
        torch.testing.assert_close(
            out.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_shapes_of_the_upsampler(backend: str, shape: tuple[int, ...], last: bool) -> None:
    use(backend)
    x, residual = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    if last:
        x, residual = kernel_runs.channels_last(x), kernel_runs.channels_last(residual)
    weight, bias = (torch.randn(shape[1], device="cuda") for _ in range(2))
    with ltxkern.use_backend(backend):
        out = ltxkern.group_norm_silu(x, weight, bias, 32, residual=residual)
        again = ltxkern.group_norm_silu(x, weight, bias, 32, residual=residual)
    assert torch.equal(out, again)
    exact = F.silu(F.group_norm(x.float(), 32, weight, bias) + residual.float())
    torch.testing.assert_close(out.float(), exact, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 64, 4, 24, 40), LARGE[0], LARGE[3]], ids=str)
def test_graph_capture_and_replay(backend: str, shape: tuple[int, ...]) -> None:
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(1, 128, 9, 34, 60), (1, 96, 4, 16, 16), (1, 1024, 3, 17, 30), (2, 7, 5, 11), (1, 4096, 3, 3)], ids=str
)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_pixel_norm(backend: str, shape: tuple[int, ...], last: bool) -> None:
    use(backend)
    x = torch.randn(shape, device="cuda")
    x = kernel_runs.channels_last(x) if last else x
    with ltxkern.use_backend(backend):
        out = ltxkern.pixel_norm_silu(x)
    exact = F.silu(x.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 1e-8))
    torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["cuda", "nvrtc"])
def test_a_smaller_plan_leaves_a_larger_one_its_shared_memory(backend: str) -> None:
    use(backend)
    large, small = (torch.randn(1, 512, *rest, device="cuda").bfloat16() for rest in ((8, 45, 80), (4, 45, 80)))
    with ltxkern.use_backend(backend):
        first, *_, last = (ltxkern.group_norm_silu(x, None, None, 32) for x in (large, small, large))
    assert torch.equal(first, last)
