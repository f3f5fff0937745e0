"""pixel_norm_silu: the numerical contract on every backend, layouts, hard cases, calls around it, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ltxkern
from tests.ops.contract import ACTIVATIONS, assert_as_close, channels_last, noise
from tests.serving import over_backends, serving

SHAPES = [
    (2, 12, 3, 5, 7),
    (1, 128, 2, 4, 8),
    (2, 7, 61),
    (1, 1024, 3, 5),
    (3, 10),
    (1, 1, 1),
    (1, 3, 2503),
    (1, 131, 1, 1),
]


def composition(x: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    """What the VAEs compute, in x's dtype throughout."""
    y = x / (x.square().mean(dim=1, keepdim=True) + eps).sqrt()
    return F.silu(y if weight is None else y * weight.to(x.dtype).reshape((1, -1) + (1,) * (x.dim() - 2)))


@over_backends("pixel_norm_silu")
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
def test_contract(backend: str, dtype: torch.dtype, shape: tuple[int, ...], last: bool, weighted: bool) -> None:
    x = noise(*shape, dtype=dtype, scale=3.0)
    x = channels_last(x) if last else x
    weight = noise(shape[1], dtype=dtype, seed=1) if weighted else None
    with serving(backend):
        out = ltxkern.pixel_norm_silu(x, 1e-6, weight=weight)
    assert out.stride() == torch.empty_like(x).stride()
    wide = None if weight is None else weight.double()
    assert_as_close(out, composition(x, 1e-6, weight), composition(x.double(), 1e-6, wide))


@over_backends("pixel_norm_silu")
def test_zeros_wide_weights_and_tiny_values(backend: str) -> None:
    x = noise(1, 16, 5, 7, dtype=torch.bfloat16)
    x[:, :, 2] = 0
    x[:, :, 3] *= 1e-30
    weight = noise(16, seed=1)
    with serving(backend):
        out = ltxkern.pixel_norm_silu(x, weight=weight)
    assert bool((out[:, :, 2] == 0).all())
    exact = composition(x.double(), 1e-8, weight.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-35)


@over_backends("pixel_norm_silu")
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_non_finite_values_stay_in_their_position(backend: str, value: float, last: bool) -> None:
    x = noise(2, 9, 3, 4)
    x[1, 4, 2, 1] = value
    x = channels_last(x) if last else x
    with serving(backend):
        out = ltxkern.pixel_norm_silu(x)
    wanted = ltxkern.reference.pixel_norm_silu(x)
    assert torch.equal(out.isnan(), wanted.isnan())
    torch.testing.assert_close(out, wanted, equal_nan=True, atol=1e-5, rtol=1e-5)


@over_backends("pixel_norm_silu")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 24, 3, 4, 8), (2, 7, 3, 5, 3), (2, 5, 2, 1, 1), (2, 130, 1, 1, 1)], ids=str)
def test_into_frames_of_a_longer_buffer(backend: str, shape: tuple[int, ...], last: bool) -> None:
    x = noise(*shape, scale=3.0)
    buffer = torch.full((*shape[:2], shape[2] + 3, *shape[3:]), torch.nan)
    x, buffer = (channels_last(t) if last else t for t in (x, buffer))
    with serving(backend):
        expected = ltxkern.pixel_norm_silu(x, 1e-6)
        ltxkern.pixel_norm_silu(x, 1e-6, out=buffer[:, :, 1:-2])
    assert torch.equal(buffer[:, :, 1:-2], expected)
    assert bool(buffer[:, :, :1].isnan().all())
    assert bool(buffer[:, :, -2:].isnan().all())


def test_errors_name_the_parameter() -> None:
    x = torch.zeros(1, 6, 4)
    with pytest.raises(ValueError, match="weight must have shape"):
        ltxkern.pixel_norm_silu(x, weight=torch.ones(5))
    with pytest.raises(ValueError, match="eps must be at least"):
        ltxkern.pixel_norm_silu(x, -1.0)
    with pytest.raises(ValueError, match="out must have shape"):
        ltxkern.pixel_norm_silu(x, out=torch.zeros(1, 6, 5))
