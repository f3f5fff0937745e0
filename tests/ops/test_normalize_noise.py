"""normalize_noise, channelwise_normalize, noise_statistics and their merge."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ltxkern
from tests.ops.contract import SAMPLER, assert_as_close, assert_same, by_threads, noise
from tests.serving import over_backends, serving

SHAPES = [
    (1, 2, 2),
    (1, 7, 3),
    (2, 33, 8),
    (3, 1, 13),
    (1, 127, 16),
    (2, 1031, 17),
    (1, 1024, 16),
    (2, 3, 4, 5),
    (1, 2, 3, 4, 5),
    (5, 2),
]


def channelwise(x: Tensor) -> Tensor:
    return (x - x.mean((-2, -1), keepdim=True)) / x.std((-2, -1), keepdim=True)


def twice(x: Tensor) -> Tensor:
    return channelwise((x - x.mean()) / x.std())


OPS = {"normalize_noise": twice, "channelwise_normalize": channelwise}


def over_ops(test: Callable[..., None]) -> Callable[..., None]:
    """Both normalisations, which the same backends have."""
    return pytest.mark.parametrize("name", OPS)(over_backends("normalize_noise")(test))


def op(name: str) -> Callable[..., Tensor]:
    return getattr(ltxkern, name)


@over_ops
@pytest.mark.parametrize("dtype", SAMPLER, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(name: str, backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = noise(*shape, dtype=dtype, seed=len(shape)) * 1.7 + 0.3
    with serving(backend):
        out = op(name)(x)
    assert_as_close(out, OPS[name](x), OPS[name](x.double()), wide=2e-14)


@over_ops
@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_mean_far_from_zero(name: str, backend: str, offset: float) -> None:
    x = noise(1, 61, 16) + offset
    with serving(backend):
        out = op(name)(x)
    assert_as_close(out, OPS[name](x), OPS[name](x.double()))


def long_channelwise(x: Any) -> Any:
    """Standardisation over the last two dims in numpy's long double."""
    deviation = x - x.mean((-2, -1), keepdims=True)
    degrees = x.shape[-2] * x.shape[-1] - 1
    return deviation / np.sqrt((deviation**2).sum((-2, -1), keepdims=True) / degrees)


@over_ops
@pytest.mark.parametrize("shape", [(1, 61, 16), (3, 70, 128)], ids=str)
def test_a_mean_far_from_zero_keeps_the_digits_of_fp64(name: str, backend: str, shape: tuple[int, ...]) -> None:
    x = noise(*shape, dtype=torch.float64) + 1e4
    with serving(backend):
        out = op(name)(x)
    wide = (x - 1e4).cpu().numpy().astype(np.longdouble)  # exact: the numbers are neighbours
    if name == "normalize_noise":
        deviation = wide - wide.mean()
        wide = deviation / np.sqrt((deviation**2).sum() / (wide.size - 1))
    exact = long_channelwise(wide)
    error = np.abs(out.cpu().numpy() - exact).max()
    # The composition of one step keeps what one double holds of the mean.
    assert error < (2e-14 if backend != "torch" or name == "normalize_noise" else 1e-11)


@over_ops
def test_a_constant_slice_is_nan(name: str, backend: str) -> None:
    x = torch.ones(2, 3, 4, dtype=torch.float64)
    with serving(backend):
        assert bool(op(name)(x).isnan().all())


@over_ops
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", SAMPLER, ids=str)
def test_a_value_that_is_not_finite(name: str, backend: str, value: float, dtype: torch.dtype) -> None:
    """It makes its slice NaN, and through the whole-tensor step of normalize_noise every other slice too, as torch does."""
    x = noise(5, 37, 9, dtype=dtype)
    x[2, 30, 4] = value
    with serving(backend):
        out = op(name)(x)
    assert torch.equal(out.isnan(), OPS[name](x).isnan())
    assert bool(out[2].isnan().all())
    assert bool(out.isnan().all()) == (name == "normalize_noise")


@over_backends("noise_statistics")
@pytest.mark.parametrize("dtype", SAMPLER, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = noise(*shape, dtype=dtype) + 0.25
    with serving(backend):
        rows = ltxkern.noise_statistics(x)
    slices = x.double().reshape(-1, shape[-2] * shape[-1])
    count = torch.full((len(slices),), slices.shape[1], dtype=torch.float64)
    squares = (slices - slices.mean(1, keepdim=True)).square().sum(1)
    expected = torch.stack([count, slices.mean(1), squares], 1)
    assert rows.dtype == torch.float64
    torch.testing.assert_close(rows, expected, atol=1e-13, rtol=1e-12)


@over_backends("noise_statistics")
def test_statistics_of_hard_numbers(backend: str) -> None:
    """No E[x^2] - E[x]^2: a spread of 1e-4 on a mean of 1e4 keeps its digits, and a constant has none at all."""
    x = 1e4 + 1e-4 * noise(2, 50, 20, dtype=torch.float64)
    with serving(backend):
        rows = ltxkern.noise_statistics(x)
        constant = ltxkern.noise_statistics(torch.full((1, 3, 5), 0.1, dtype=torch.float64))
    # Each deviation of 1e-4 carries the rounding of 1e4, about 2e-12.
    torch.testing.assert_close(rows[:, 2], x.flatten(1).var(1) * 999, atol=0, rtol=1e-6)
    assert float(constant[0, 2]) < 1e-30


@over_backends("noise_statistics")
def test_statistics_of_nothing(backend: str) -> None:
    with serving(backend):
        assert ltxkern.noise_statistics(torch.empty(2, 0, 4)).tolist() == [[0, 0, 0]] * 2


@over_backends("noise_statistics")
@pytest.mark.parametrize("cuts", [(1,), (5,), (2, 3, 17)])
def test_merged_shards_are_the_whole(backend: str, cuts: tuple[int, ...]) -> None:
    x = noise(2, 31, 4, dtype=torch.float64) + 3
    with serving(backend):
        parts = [ltxkern.noise_statistics(part) for part in torch.tensor_split(x, cuts, dim=1)]
        whole = ltxkern.noise_statistics(x)
    torch.testing.assert_close(ltxkern.merge_noise_statistics(parts), whole, atol=1e-12, rtol=1e-12)


@over_backends("noise_statistics")
@pytest.mark.parametrize("shape", [(1, 4099, 32), (2, 40_009, 16)], ids=str)
def test_statistics_do_not_depend_on_threads(backend: str, shape: tuple[int, ...]) -> None:
    x = noise(*shape, dtype=torch.float64)
    with serving(backend):
        first, *others = by_threads(lambda: ltxkern.noise_statistics(x))
    assert_same(others, [first, first])


def test_merging_nothing_or_differing_parts() -> None:
    with pytest.raises(ValueError, match="parts must hold at least one"):
        ltxkern.merge_noise_statistics([])
    with pytest.raises(ValueError, match=r"parts\[1\] must have shape \(2, 3\) like parts\[0\], got \(1, 3\)"):
        ltxkern.merge_noise_statistics([torch.zeros(2, 3).double(), torch.zeros(1, 3).double()])


@pytest.mark.parametrize("name", [*OPS, "noise_statistics"])
def test_errors(name: str) -> None:
    x = noise(2, 3, 4)
    first = "x" if name == "channelwise_normalize" else "noise"
    with pytest.raises(TypeError, match=f"{first} must be a torch.Tensor, got list"):
        op(name)([1.0])
    with pytest.raises(TypeError, match=f"{first} must be one of .* got torch.int64"):
        op(name)(x.long())
    with pytest.raises(ValueError, match=rf"{first} must have at least 2 dimensions, got shape \(24,\)"):
        op(name)(x.flatten())
    with pytest.raises(ValueError, match="out must have shape"):
        op(name)(x, out=x[:1])
    with pytest.raises(TypeError, match=r"out must be torch\.float"):
        op(name)(x, out=torch.empty((2, 3) if name == "noise_statistics" else (2, 3, 4), dtype=torch.float16))
