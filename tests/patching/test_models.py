"""Every model of diffusers that `patch` knows: same numbers, every site, and out again without a trace."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

import ltxkern
from tests.patching.models import CASES, FEW, Case, Pairs, built, call


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """diffusers warns of every cast."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _moved(value: Tensor, other: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((value - other).abs().max() / other.abs().max())


def _classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def _bf16_sites(case: Case, model: nn.Module, names: list[str]) -> list[tuple[str, Tensor]]:
    """What goes into each norm of these names in bf16."""
    inputs: list[tuple[str, Tensor]] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.append((name, args[0])))
        for name in names
    ]
    call(case, model, torch.bfloat16)
    for hook in hooks:
        hook.remove()
    return inputs


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.no_grad()
def test_patched_model(case: Case) -> None:
    model = built(case)
    exact = call(case, copy.deepcopy(model).double(), torch.float64)
    plain, classes, keys = call(case, model), _classes(model), list(model.state_dict())
    with Pairs() as pairs:
        call(case, model)
    report = ltxkern.patch(model)
    got = call(case, model)
    assert (len(report.sites), len(report.left)) == (case.sites, case.left)
    assert sum(site.calls for site in report.rows) == pairs.count - case.left
    assert all(site.calls and not site.composed and site.backend == "cpu" for site in report.rows)
    assert list(model.state_dict()) == keys
    assert _error(got, exact) <= 1.5 * _error(plain, exact) + 1e-7
    assert _moved(got, plain) <= 1e-5
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(call(case, copied), got)
    with ltxkern.patch(copied) as own:
        assert len(own.sites) == case.sites
    assert torch.equal(call(case, copied), plain)
    assert ltxkern.patch(model).sites == []
    report.undo()
    report.undo()
    assert _classes(model) == classes
    assert torch.equal(call(case, model), plain)


@pytest.mark.parametrize("case", FEW.values(), ids=FEW)
@torch.no_grad()
def test_norms_over_few_numbers(case: Case) -> None:
    """A patch moves such a model as the last digit of what its norms give does, and not away from fp64."""
    model = built(case)
    exact = call(case, copy.deepcopy(model).double(), torch.float64)
    plain = call(case, model)
    with ltxkern.patch(model) as report:
        got, names = call(case, model), report.sites
    generator = torch.Generator().manual_seed(3)
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, args, y: y * (1 + 2**-23 * torch.randn(y.shape, generator=generator).sign())
        )
    jittered = call(case, model)
    assert _error(got, exact) <= 1.5 * _error(plain, exact)
    assert _moved(got, plain) <= 8 * _moved(jittered, plain)


@pytest.mark.parametrize("name", ["LTX VAE", "LTX-2 VAE", "LTX-2 audio VAE", "Wan", "Mochi", "Stable Diffusion VAE"])
@torch.no_grad()
def test_each_site_in_bf16(name: str) -> None:
    case = CASES[name]
    model = built(case).bfloat16()
    names = ltxkern.patch(copy.deepcopy(model)).sites
    inputs = _bf16_sites(case, model, names)
    norms = [(x, model.get_submodule(site)) for site, x in inputs]
    exact = [silu(copy.deepcopy(norm).double()(x.double())) for x, norm in norms]
    plain = [silu(norm(x)) for x, norm in norms]
    ltxkern.patch(model)
    for (x, norm), reference, stock in zip(norms, exact, plain, strict=True):
        # The last norm of a half of the LTX-2 VAE is applied by the convolution behind it.
        assert _error(getattr(norm, "apply_norm", norm)(x), reference) <= 1.5 * _error(stock, reference)


def _autocast(case: Case, model: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return call(case, model)


def _channels_last(case: Case, model: Any) -> Tensor:
    dims, layout = (5, torch.channels_last_3d) if len(case.shape) == 5 else (4, torch.channels_last)
    for weight in model.parameters():
        if weight.dim() == dims:
            weight.data = weight.data.contiguous(memory_format=layout)
    return call(case, model)


def _tiled(case: Case, model: Any) -> Tensor:
    size = max(32, 2 * case.shape[-1])
    model.tile_sample_min_size, model.tile_latent_min_size = size, size // 2
    model.tile_sample_min_height = model.tile_sample_min_width = size
    model.tile_sample_stride_height = model.tile_sample_stride_width = size * 3 // 4
    model.enable_tiling()
    model.enable_slicing()
    # One frame of a video: pictures are cut alike in all of them.
    sides = (4 * side for side in case.shape[-2:])
    larger = case._replace(shape=(2, 3, *(1,) * (len(case.shape) - 4), *sides))
    try:
        return call(larger, model)
    finally:
        model.disable_tiling()
        model.disable_slicing()


def _gradients(case: Case, model: Any, dtype: torch.dtype) -> list[Tensor]:
    model.train().requires_grad_(True)
    torch.manual_seed(2)  # Allegro drops some
    with torch.enable_grad():
        call(case, model, dtype).float().square().mean().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    model.zero_grad(set_to_none=True)
    model.eval().requires_grad_(False)
    return gradients


def _checkpointed(case: Case, model: Any) -> Tensor:
    model.enable_gradient_checkpointing()
    gradients = _gradients(case, model, torch.float32)
    model.disable_gradient_checkpointing()
    return torch.cat([one.flatten() for one in gradients])


# Of those that diffusers can cut, without both of HunyuanVideo and Mochi's, which take longer than all of these.
TILED = ("LTX VAE", "LTX-2 VAE", "CogVideoX", "Wan", "QwenImage", "Stable Diffusion VAE")
# diffusers has no checkpoints in the first four; Mochi's take longer than those of all others.
UNCHECKPOINTED = {"LTX-2 audio VAE", "LTX-2 upsampler", "Wan", "QwenImage", "Mochi"}
WAYS: list[tuple[str, Callable[[Case, Any], Tensor]]] = [
    *((name, way) for name in CASES for way in (_channels_last, _autocast)),
    *((name, _checkpointed) for name in CASES if name not in UNCHECKPOINTED),
    *((name, _tiled) for name in TILED),
]


@pytest.mark.parametrize(("name", "way"), WAYS, ids=[f"{name}{way.__name__}" for name, way in WAYS])
@torch.no_grad()
def test_ways_to_run_a_model(name: str, way: Callable[[Case, Any], Tensor]) -> None:
    model = built(CASES[name])
    plain = way(CASES[name], model)
    report = ltxkern.patch(model)
    got = way(CASES[name], model)
    torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))
    # Autocast decides the dtype of each step: there the composition stays.
    assert all((site.composed if way is _autocast else site.calls) for site in report.rows)
    report.undo()
    assert torch.equal(way(CASES[name], model), plain)


# Not Stable Video Diffusion's VAE: torch's own bf16 backward of its convolutions gives noise on a CPU.
GRADIENTS = [
    *((name, torch.float32) for name in ("Stable Diffusion VAE", "UNet", "LTX VAE")),
    *((name, torch.bfloat16) for name in ("Stable Diffusion VAE", "UNet", "LTX VAE", "LTX-2 VAE", "Wan")),
    *((name, torch.float16) for name in ("Stable Diffusion VAE", "LTX-2 audio VAE", "Wan")),
]


@pytest.mark.parametrize(("name", "dtype"), GRADIENTS, ids=lambda value: str(value).removeprefix("torch."))
@torch.no_grad()
def test_gradients_against_fp64(name: str, dtype: torch.dtype) -> None:
    """Those of all weights together, and each up to what is nothing to them: of a bias before a norm it is 0, and noise is left."""
    model: Any = built(CASES[name]).to(dtype)
    if dtype is torch.float32:
        model.enable_gradient_checkpointing()
    twin, errors = copy.deepcopy(model).double(), []
    for case in (CASES[name]._replace(seed=seed) for seed in range(3)):
        exact = _gradients(case, twin, torch.float64)
        plain = _gradients(case, model, dtype)
        with ltxkern.patch(model) as report:
            got = _gradients(case, model, dtype)
            assert all(site.calls for site in report.rows)
        if dtype is torch.float32 and case.seed == 1:
            # With the digits of fp32 each element as well, of one input.
            whole = [torch.cat([one.flatten() for one in made]) for made in (plain, got, exact)]
            assert _error(whole[1], whole[2]) <= 1.5 * _error(whole[0], whole[2])
            off = [(one - whole[2]).abs() for one in whole[:2]]
            assert (off[1] <= 1.5 * off[0] + 1e-5 * whole[2].abs().max()).all()
        pairs = [zip(made, exact, strict=True) for made in (plain, got)]
        errors.append([[float((one - other).norm()) for one, other in pair] for pair in pairs])
    # One input gives either side its luck: the median of three.
    each = torch.tensor(errors)
    (stock, patched), together = each.median(0).values, each.norm(dim=2).median(0).values
    assert together[1] <= 1.5 * together[0]
    assert (patched <= 1.5 * stock + 0.1 * together[0]).all()


def _block(name: str, path: str, shape: tuple[int, ...], *more: Tensor) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return built(CASES[name]).get_submodule(path), (torch.randn(shape), *more)


def _pair(name: str, path: str, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A norm of a model with SiLU behind it."""
    return nn.Sequential(built(CASES[name]).get_submodule(path), nn.SiLU()), (torch.randn(shape),)


BLOCKS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "time embedding": lambda: _block("UNet", "mid_block.resnets.0", (1, 64, 4, 4), torch.randn(1, 128)),
    "residual": lambda: _block("LTX-2 upsampler", "res_blocks.0", (1, 32, 2, 3, 4)),
    "by channel": lambda: _pair("LTX-2 VAE", "encoder.norm_out", (1, 8, 2, 4, 4)),
    "by length": lambda: _pair("Wan", "encoder.norm_out", (1, 3, 2, 4, 4)),
    "last dim": lambda: _pair("LTX VAE", "encoder.norm_out", (1, 2, 4, 4, 8)),
    "frames": lambda: _pair("Mochi", "encoder.norm_out", (1, 32, 2, 4, 4)),
}


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
@torch.no_grad()
def test_compiled(make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]) -> None:
    block, inputs = make()
    torch._dynamo.reset()
    seen: list[str] = []

    def look(graph: Any, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(block, backend=look, fullgraph=True)
    plain = compiled(*inputs)
    report = ltxkern.patch(block)
    expected = block(*inputs)
    calls = [site.calls for site in report.rows]
    assert torch.equal(compiled(*inputs), expected)
    assert sum("ltxkern" in name for name in seen) == len(report.sites)
    assert [site.calls for site in report.rows] == calls
    report.undo()
    assert torch.equal(compiled(*inputs), plain)
