"""rms_norm_modulate and its gated form: contract, rows of modulation, hard numbers, calls around them, errors."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from tests.ops.contract import ACTIVATIONS, assert_as_close, assert_gradients, assert_same, doubles, noise
from tests.serving import over_backends, serving

SHAPES = [(1, 6, 8), (2, 7, 13), (3, 1, 1), (5, 64), (1, 127, 40), (2, 3, 1040), (2, 3, 2048), (2, 519), (16,)]


def norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, weight: Tensor | None = None) -> Tensor:
    """Eager torch in the given dtype: four roundings."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y * (1 + scale) + shift


def rows(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    shapes = {"full": shape, "sample": (shape[0], *[1] * (len(shape) - 2), shape[-1]), "row": (shape[-1],)}
    return 0.5 * noise(*(shapes[kind] if len(shape) > 1 else shape), dtype=dtype, seed=seed)


KINDS = pytest.mark.parametrize("kind", ["full", "sample", "row"])


@over_backends("rms_norm_modulate")
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@KINDS
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_contract(backend: str, dtype: torch.dtype, shape: tuple[int, ...], kind: str, weighted: bool) -> None:
    x, scale, shift = noise(*shape, dtype=dtype), rows(shape, kind, dtype, 1), rows(shape, kind, dtype, 2)
    weight = noise(shape[-1], dtype=dtype, seed=3) if weighted else None
    with serving(backend):
        out = ltxkern.rms_norm_modulate(x, scale, shift, weight=weight)
    double = doubles([x, scale, shift, weight])
    exact = norm(*double[:3], weight=double[3])  # type: ignore[arg-type]
    assert_as_close(out, norm(x, scale, shift, weight=weight), exact)


@over_backends("gated_residual_rms_norm_modulate")
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@KINDS
def test_gated_contract(backend: str, dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    x, y = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, seed=4)
    scale, shift, gate = (rows(shape, kind, dtype, seed) for seed in (1, 2, 3))
    with serving(backend):
        summed, out = ltxkern.gated_residual_rms_norm_modulate(x, y, gate, scale, shift)
        alone = ltxkern.gated_residual(x, y, gate)
    exact = x.double() + y.double() * gate.double()
    assert_as_close(summed, x + y * gate, exact)
    assert_same(summed, alone)
    # The norm is of the rounded sum, as the next block sees it.
    assert_as_close(out, norm(summed, scale, shift), norm(*(value.double() for value in (summed, scale, shift))))


@over_backends("gated_residual_rms_norm_modulate_twice")
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-1:2], ids=str)
@KINDS
def test_two_modulations_have_the_bits_of_one_each(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], kind: str
) -> None:
    x, y = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, seed=4)
    gate, *modulation = (rows(shape, kind, dtype, seed) for seed in (3, 1, 2, 5, 6))
    with serving(backend):
        found = ltxkern.gated_residual_rms_norm_modulate_twice(x, y, gate, *modulation)
        first = ltxkern.gated_residual_rms_norm_modulate(x, y, gate, *modulation[:2])
        second = ltxkern.gated_residual_rms_norm_modulate(x, y, gate, *modulation[2:])
        kept = x.clone(), y.clone()
        outputs = (kept[0], kept[1], torch.full_like(x, math.nan))
        ltxkern.gated_residual_rms_norm_modulate_twice(*kept, gate, *modulation, out=outputs)
    for results in (found, outputs):
        for one, other in zip(results, (*first, second[1]), strict=True):
            assert_same(one, other)


@over_backends("rms_norm_modulate")
@pytest.mark.parametrize("value", [0.0, 1e-20, 1e-6, 1e15])
def test_hard_numbers(backend: str, value: float) -> None:
    x, row = torch.full((2, 3, 16), value), torch.zeros(16)
    with serving(backend):
        out = ltxkern.rms_norm_modulate(x, row, row)
    exact = norm(x.double(), row.double(), row.double())
    torch.testing.assert_close(out.double(), exact, atol=1e-30, rtol=1e-6)


@over_backends("rms_norm_modulate")
def test_nan_and_infinity_stay_in_their_row(backend: str) -> None:
    x, row = noise(1, 4, 16), torch.zeros(16)
    x[0, 1, 3], x[0, 2, 5] = math.nan, math.inf
    with serving(backend):
        out = ltxkern.rms_norm_modulate(x, row, row)
    expected = norm(x, row, row)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6, equal_nan=True)
    assert bool(out[0, [0, 3]].isfinite().all())


@over_backends("rms_norm_modulate")
def test_eps_and_wider_rows(backend: str) -> None:
    x = noise(2, 5, 8, dtype=torch.bfloat16)
    scale, shift = noise(2, 1, 8, seed=1), noise(2, 1, 8, seed=2)
    with serving(backend):
        out = ltxkern.rms_norm_modulate(x, scale, shift, eps=0.25)
    exact = norm(x.double(), scale.double(), shift.double(), 0.25)
    assert_as_close(out, exact.bfloat16(), exact)


@over_backends("rms_norm_modulate")
def test_gradients(backend: str) -> None:
    def twice(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> list[Tensor]:
        given = (x, y, gate, scale, shift, shift, scale)
        summed, out, second = ltxkern.gated_residual_rms_norm_modulate_twice(*given, weight=weight)
        other, again = ltxkern.gated_residual_rms_norm_modulate(*given[:5], weight=weight)
        return [summed + other, out + again, second, ltxkern.rms_norm_modulate(summed, scale, shift)]

    def plain(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> list[Tensor]:
        summed = x + y * gate
        normed, second = norm(summed, scale, shift, weight=weight), norm(summed, shift, scale, weight=weight)
        return [2 * summed, 2 * normed, second, norm(summed, scale, shift)]

    with serving(backend):
        assert_gradients(twice, plain, *(noise(2, 3, 6, seed=k) for k in range(5)), noise(6, seed=5), near=1e-4)


def wrong_calls() -> list[tuple[dict[str, Any], type[Exception], str]]:
    return [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(2, 3, 4).double()}, TypeError, "x must be one of .* got torch.float64"),
        ({"scale": torch.zeros(3)}, ValueError, r"scale must broadcast to x's shape \(2, 3, 4\) and have its last dim"),
        ({"scale": torch.zeros(2, 3, 1)}, ValueError, "scale must broadcast to x's shape .* have its last dim"),
        ({"shift": torch.zeros(3, 3, 4)}, ValueError, r"shift must broadcast .* got \(3, 3, 4\)"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must have shape \(4,\), got \(3,\)"),
        ({"eps": "1"}, TypeError, "eps must be a number, got str"),
    ]


@pytest.mark.parametrize(("given", "error", "words"), wrong_calls())
def test_errors(given: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 4), "scale": torch.zeros(4), "shift": torch.zeros(4), **given}
    with pytest.raises(error, match=words):
        ltxkern.rms_norm_modulate(**arguments)
    with pytest.raises(error, match=words):
        ltxkern.gated_residual_rms_norm_modulate(**arguments, y=torch.zeros(2, 3, 4), gate=torch.zeros(4))


def test_errors_of_the_gated_form() -> None:
    x, row = torch.zeros(2, 3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"y must have shape \(2, 3, 4\), got \(2, 3, 1\)"):
        ltxkern.gated_residual_rms_norm_modulate(x, x[..., :1], row, row, row)
    with pytest.raises(ValueError, match=r"gate must broadcast"):
        ltxkern.gated_residual_rms_norm_modulate(x, x, torch.zeros(5), row, row)
    with pytest.raises(ValueError, match=r"out\[1\] must have shape"):
        ltxkern.gated_residual_rms_norm_modulate(x, x, row, row, row, out=(x, x[:1]))
    twice = functools.partial(ltxkern.gated_residual_rms_norm_modulate_twice, x, x, row, row, row)
    with pytest.raises(ValueError, match=r"scale2 must broadcast to x's shape"):
        twice(torch.zeros(5), row)
    with pytest.raises(ValueError, match=r"out must be three tensors, got 2 of them"):
        twice(row, row, out=(x, x.clone()))
    with pytest.raises(TypeError, match=r"out must be torch\.float32, got torch\.float16"):
        ltxkern.rms_norm_modulate(x, row, row, out=x.half())
