"""group_norm_silu: the numerical contract on every backend, layouts, hard cases, calls around it, errors, the drop-in."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ltxkern
from ltxkern.ops.group_norm_silu import reference
from tests.ops.contract import (
    ACTIVATIONS,
    assert_as_close,
    assert_gradients,
    by_threads,
    channels_last,
    noise,
    poisoned,
    strided,
    transposed,
)
from tests.serving import needs_cpu_kernels, over_backends, serving

SHAPES = [
    ((2, 12, 3, 5, 7), 4),
    ((1, 32, 4, 8, 8), 8),
    ((2, 6, 11), 3),
    ((1, 4, 61, 67), 2),
    ((3, 10), 5),
    ((1, 1, 1), 1),
    ((2, 8, 1, 1), 8),
    ((1, 2, 5003), 1),
    ((1, 96, 50), 1),
    ((2, 3, 300), 3),
]


def exact(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    residual: Tensor | None,
    conv_bias: Tensor | None,
) -> Tensor:
    """The same mathematics in fp64."""
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual, conv_bias)]
    x, weight, bias, residual, conv_bias = wide
    if conv_bias is not None:
        x = x + conv_bias.reshape((1, -1) + (1,) * (x.dim() - 2))
    y = torch.group_norm(x, groups, weight, bias, 1e-5)
    return F.silu(y if residual is None else y + residual)


def parameters(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, conv_bias = (noise(channels, dtype=dtype, seed=seed) for seed in (2, 3, 4))
    return weight, bias, conv_bias


@over_backends("group_norm_silu")
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "residual_conv_bias"])
def test_contract(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], groups: int, last: bool, full: bool
) -> None:
    x, residual = (3 * noise(*shape) + 2).to(dtype), noise(*shape, dtype=dtype, seed=1)
    weight, bias, conv_bias = parameters(shape[1], dtype)
    if last:
        x, residual = channels_last(x), channels_last(residual)
    optional = {"residual": residual, "conv_bias": conv_bias} if full else {}
    with serving(backend):
        out = ltxkern.group_norm_silu(x, weight, bias, groups, **optional)
    assert out.stride() == torch.empty_like(x).stride()
    given = (optional.get("residual"), optional.get("conv_bias"))
    assert_as_close(out, reference(x, weight, bias, groups, 1e-5, *given), exact(x, weight, bias, groups, *given))


@over_backends("group_norm_silu")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wider_parameters_and_none(backend: str, dtype: torch.dtype) -> None:
    x = noise(2, 6, 3, 5, dtype=dtype)
    weight, bias, _ = parameters(6, torch.float32)
    with serving(backend):
        mixed, plain = ltxkern.group_norm_silu(x, weight, bias, 2), ltxkern.group_norm_silu(x, None, None, 2)
    assert_as_close(mixed, reference(x, weight, bias, 2), exact(x, weight, bias, 2, None, None))
    assert_as_close(plain, reference(x, None, None, 2), exact(x, None, None, 2, None, None))


@over_backends("group_norm_silu")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_mean_of_ten_thousand_deviations(backend: str, last: bool) -> None:
    x = 1e4 + noise(2, 8, 31, 37)
    x = channels_last(x) if last else x
    with serving(backend):
        out = ltxkern.group_norm_silu(x, None, None, 4)
    assert_as_close(out, reference(x, None, None, 4), exact(x, None, None, 4, None, None))


@needs_cpu_kernels
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_large_mean_costs_half_a_unit_of_it(last: bool) -> None:
    """The mean in fp32 is the only loss, which torch's own channels-last kernel exceeds a thousandfold."""
    x = 1e4 + noise(1, 16, 5, 33)
    x = channels_last(x) if last else x
    with serving("cpu"):
        out = ltxkern.group_norm_silu(x, None, None, 4)
    unit = 2.0**-10
    assert float((out.double() - exact(x, None, None, 4, None, None)).abs().max()) < 0.75 * unit


@over_backends("group_norm_silu")
@pytest.mark.parametrize("positions", [100, 240])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_far_values_where_sums_begin(backend: str, positions: int, last: bool) -> None:
    """Kernels that sum about one of the values must not depend on which they met first."""
    x = noise(1, positions, 2)
    x.view(-1)[::128] = -3000.0
    x = x.movedim(1, -1) if last else x.movedim(1, -1).contiguous()
    x = x[..., None]
    with serving(backend):
        out = ltxkern.group_norm_silu(x, None, None, 1)
    assert_as_close(out, reference(x, None, None, 1), exact(x, None, None, 1, None, None))


@over_backends("group_norm_silu")
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4, 1e-40])
def test_constant_groups_are_zero(backend: str, value: float) -> None:
    x = torch.full((1, 4, 33), value)
    with serving(backend):
        out = ltxkern.group_norm_silu(x, None, None, 2)
    torch.testing.assert_close(out, torch.zeros_like(x), atol=1e-30, rtol=0)


@over_backends("group_norm_silu")
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_non_finite_values_stay_in_their_group(backend: str, value: float, last: bool) -> None:
    x = noise(2, 4, 5, 9)
    x[0, 1, 2, 3] = value
    x = channels_last(x) if last else x
    with serving(backend):
        out = ltxkern.group_norm_silu(x, None, None, 2)
    wanted = reference(x, None, None, 2)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert bool(out[0, :2].isnan().all())
    torch.testing.assert_close(out, wanted, equal_nan=True, atol=1e-5, rtol=1e-5)


@over_backends("group_norm_silu")
def test_extreme_arguments_of_silu(backend: str) -> None:
    values = [-torch.inf, torch.inf, torch.nan, -1e30, -200.0, -89.0, -88.72, -87.0, -20.0, -0.0, 20.0, 89.0, 1e30]
    # Whole blocks of vectors, single vectors and a part of one.
    residual = torch.tensor(values).repeat(23).reshape(1, 1, -1)
    with serving(backend):
        out = ltxkern.group_norm_silu(torch.zeros_like(residual), None, None, 1, residual=residual)
    torch.testing.assert_close(out, F.silu(residual), equal_nan=True, atol=1e-35, rtol=1e-5)


@over_backends("group_norm_silu")
@pytest.mark.parametrize("layout", [strided, transposed], ids=["strided", "transposed"])
def test_other_layouts(backend: str, layout: Any) -> None:
    x, residual = layout(noise(2, 6, 4, 8)), noise(2, 6, 4, 8, seed=1)
    with serving(backend):
        out = ltxkern.group_norm_silu(x, None, None, 3, residual=channels_last(residual))
    assert out.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(out, reference(x, None, None, 3, 1e-5, residual), atol=2e-6, rtol=1e-5)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_stores_past_the_caches_change_no_bit(dtype: torch.dtype, offset: int) -> None:
    """The CPU kernel writes large results past the caches, but neither in place nor to unaligned rows."""
    x = noise(1, 4, 1, (5 << 20) // dtype.itemsize + 3 * offset, dtype=dtype)
    out = poisoned(x)
    with ltxkern.use_backend("cpu"):
        ltxkern.group_norm_silu(x, None, None, 4, out=out)
        ltxkern.group_norm_silu(x, None, None, 4, out=x)
    assert torch.equal(out, x)


@needs_cpu_kernels
@pytest.mark.parametrize(("shape", "groups"), [((1, 6, 9001), 2), ((1, 8, 40, 50), 1), ((2, 64, 100), 32)])
def test_threads_do_not_change_a_bit(shape: tuple[int, ...], groups: int) -> None:
    for x in (noise(*shape), channels_last(noise(*shape))):
        with ltxkern.use_backend("cpu"):
            first, *others = by_threads(lambda x=x: ltxkern.group_norm_silu(x, None, None, groups))
        assert all(torch.equal(first, other) for other in others)


def test_backward_is_that_of_the_composition() -> None:
    given = (noise(2, 4, 3, 3), noise(4, seed=1), noise(4, seed=2))
    assert_gradients(lambda *t: ltxkern.group_norm_silu(*t, 2), lambda *t: reference(*t, 2), *given, near=1.3e-6)


def test_errors_name_the_parameter() -> None:
    x = torch.zeros(1, 6, 4)
    with pytest.raises(ValueError, match="num_groups must divide the 6 channels of x, got 4: use 3"):
        ltxkern.group_norm_silu(x, None, None, 4)
    with pytest.raises(ValueError, match="weight must have shape"):
        ltxkern.group_norm_silu(x, torch.ones(5), torch.ones(6), 2)
    with pytest.raises(ValueError, match="weight and bias go together, got weight alone: give both or neither"):
        ltxkern.group_norm_silu(x, torch.ones(6), None, 2)
    with pytest.raises(TypeError, match=r"weight must be torch.float32"):
        ltxkern.group_norm_silu(x, torch.ones(6, dtype=torch.bfloat16), torch.ones(6), 2)
    with pytest.raises(ValueError, match="residual must have shape"):
        ltxkern.group_norm_silu(x, None, None, 2, residual=torch.zeros(1, 6, 5))
    with pytest.raises(TypeError, match="out must be"):
        ltxkern.group_norm_silu(x, None, None, 2, out=torch.zeros(1, 6, 4, dtype=torch.float16))


@needs_cpu_kernels
def test_a_bad_direct_call_is_refused_with_words() -> None:
    arguments = (torch.zeros(1, 6, 4), torch.ones(5), torch.ones(6), 2, 1e-5, None, None)
    with ltxkern.use_backend("cpu"), pytest.raises(ltxkern.BackendError, match="needs 6 values per parameter"):
        torch.ops.ltxkern.group_norm_silu(*arguments)


def test_drop_in() -> None:
    x, norm, activation = noise(1, 8, 4, 4), nn.GroupNorm(4, 8), nn.SiLU()
    with torch.no_grad():
        fused = ltxkern.apply_group_norm_silu(x, norm, activation)
        torch.testing.assert_close(fused, activation(norm(x)), atol=2e-6, rtol=1e-5)
        assert torch.equal(ltxkern.apply_group_norm_silu(x, nn.Identity(), activation), activation(x))
        assert torch.equal(ltxkern.apply_group_norm_silu(x, norm, nn.GELU()), nn.GELU()(norm(x)))
