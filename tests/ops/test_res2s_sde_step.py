"""res2s_sde_step: against fp64 in every dtype, terminal steps, given outputs, calls around it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern import sde_coefficients
from tests.ops.contract import SAMPLER, assert_as_close, assert_same, noise, poisoned
from tests.serving import over_backends, serving

SHAPES = [(1, 6, 4), (2, 7, 3), (3, 1, 5), (1, 127, 16)]


def sde(x: Tensor, d: Tensor, sigma: float, sigma_next: float, n: Tensor, eta: float) -> Tensor:
    """The SDE step as published: through eps, in the widest dtype."""
    alpha, down, up = sde_coefficients(sigma_next, sigma_up=eta * sigma_next)
    eps = (x - d) / (sigma - sigma_next)
    return alpha * ((x - sigma * eps) + down * eps) + up * n


@over_backends("res2s_sde_step")
@pytest.mark.parametrize("dtype", SAMPLER, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (13,), (1, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("eta", [0.25, 0.5, 1.0])
def test_sde_step(backend: str, dtype: torch.dtype, shape: tuple[int, ...], eta: float) -> None:
    if len(shape) < 2:
        shape = (1, *shape)
    x, d, n = (noise(*shape, dtype=dtype, seed=k) for k in range(3))
    with serving(backend):
        out = ltxkern.res2s_sde_step(x, d, 0.9, 0.7, n, eta=eta)
    exact = sde(x.double(), d.double(), 0.9, 0.7, n.double(), eta)
    wide = torch.promote_types(dtype, torch.float32)
    assert_as_close(out, sde(x.to(wide), d.to(wide), 0.9, 0.7, n.to(wide), eta).to(dtype), exact, wide=1e-13)


@over_backends("res2s_sde_step")
def test_sde_step_with_differing_dtypes(backend: str) -> None:
    x, n = noise(1, 6, 4, dtype=torch.bfloat16), noise(1, 6, 4, dtype=torch.float64, seed=1)
    d = noise(1, 6, 4, dtype=torch.float32, seed=2)
    with serving(backend):
        out = ltxkern.res2s_sde_step(x, d, 0.9, 0.7, n)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), sde(x.double(), d.double(), 0.9, 0.7, n, 0.5), atol=1e-6, rtol=1e-6)


@over_backends("res2s_sde_step")
@pytest.mark.parametrize(
    "options", [{"eta": 0.0}, {"sigma_next": 0.0}, {"terminal": True}, {"terminal": True, "sigma_next": 0.9}], ids=str
)
def test_a_terminal_step_returns_denoised(backend: str, options: dict[str, Any]) -> None:
    x, d, n = (noise(1, 6, 4, seed=k) for k in range(3))
    arguments = {"sigma": 0.9, "sigma_next": 0.7, **options}
    with serving(backend):
        out = ltxkern.res2s_sde_step(x, d, noise=n, **arguments)
        into = ltxkern.res2s_sde_step(x, d, noise=n, **arguments, out=poisoned(d))
    assert_same((out, into), (d, d))


def test_errors() -> None:
    x = torch.zeros(1, 6, 4)
    with pytest.raises(ValueError, match=r"sigma and sigma_next must differ, got 0.5 for both"):
        ltxkern.res2s_sde_step(x, x, 0.5, 0.5, x)
    with pytest.raises(ValueError, match="eta must be finite, got nan"):
        ltxkern.res2s_sde_step(x, x, 0.9, 0.5, x, eta=math.nan)
    with pytest.raises(ValueError, match=r"sigma_next must be at least 0.0, got -0.5"):
        ltxkern.res2s_sde_step(x, x, 0.9, -0.5, x)
