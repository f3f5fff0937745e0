"""gated_residual and head_gate: contract, broadcasting, calls around them, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from tests.ops.contract import ACTIVATIONS, assert_as_close, assert_gradients, noise
from tests.serving import over_backends, serving

SHAPES = [(1, 6, 8), (2, 7, 13), (3, 1, 1), (5, 64), (1, 127, 40), (2, 3, 4, 16), (2, 8, 2, 1024)]


def gate_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A gate for every element, one row per sample, one row for all, one number per row."""
    return [shape, (shape[0], *[1] * (len(shape) - 2), shape[-1]), (shape[-1],), (*shape[:-1], 1)]


def residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + y * gate


def gated(x: Tensor, logits: Tensor) -> Tensor:
    return x * (2 * torch.sigmoid(logits))[..., None]


@over_backends("gated_residual")
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", range(4), ids=["full", "sample", "row", "token"])
def test_residual_contract(backend: str, dtype: torch.dtype, shape: tuple[int, ...], kind: int) -> None:
    x, y = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, seed=1)
    gate = noise(*gate_shapes(shape)[kind], dtype=dtype, seed=2)
    with serving(backend):
        out = ltxkern.gated_residual(x, y, gate)
    assert_as_close(out, residual(x, y, gate), residual(x.double(), y.double(), gate.double()))


@over_backends("head_gate")
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 6, 4, 8), (2, 7, 3, 5), (3, 1, 1, 1), (5, 64), (1, 61, 32, 4)], ids=str)
def test_head_gate_contract(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, logits = noise(*shape, dtype=dtype), 3 * noise(*shape[:-1], dtype=dtype, seed=1)
    with serving(backend):
        out = ltxkern.head_gate(x, logits)
    assert_as_close(out, gated(x, logits), gated(x.double(), logits.double()))


@over_backends("head_gate")
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("width", [5, 128])
def test_head_gate_at_the_ends(backend: str, dtype: torch.dtype, width: int) -> None:
    """What is left of the factor counts wherever fp32 has it: a large x makes up for it, and an infinite one stays infinite."""
    x, logits = (
        noise(1, 8, 32, width, dtype=dtype),
        torch.tensor([-1e4, -88.5, -20, 0, 20, 1e4, -torch.inf, -87]).to(dtype),
    )
    logits = logits.repeat(4).expand(1, 8, 32)
    faint = ((logits < -80) & (logits > -90))[..., None]
    x *= torch.where(faint, 6e3 if dtype == torch.float16 else 1e36, 1.0)
    x[..., 0][faint[..., 0]] = torch.inf
    with serving(backend):
        out = ltxkern.head_gate(x, logits)
    exact = gated(x.double(), logits.double()).to(dtype)
    torch.testing.assert_close(out, exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-36)


@over_backends("gated_residual")
def test_a_gate_of_another_dtype(backend: str) -> None:
    x, y, gate = noise(2, 5, 8, dtype=torch.bfloat16), noise(2, 5, 8, dtype=torch.bfloat16), noise(2, 1, 8)
    with serving(backend):
        out = ltxkern.gated_residual(x, y, gate)
        heads = ltxkern.head_gate(x, noise(2, 5))
    exact = residual(x.double(), y.double(), gate.double())
    assert_as_close(out, exact.bfloat16(), exact)
    assert heads.dtype == torch.bfloat16


@over_backends("gated_residual")
def test_gradients(backend: str) -> None:
    x, y, gate = (noise(2, 3, 4, seed=k) for k in range(3))
    with serving(backend):
        assert_gradients(ltxkern.gated_residual, residual, x, y, gate)
        assert_gradients(ltxkern.head_gate, gated, x, noise(2, 3, seed=4))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
        ({"x": torch.zeros(2, 3, 4).double()}, TypeError, "x must be one of .* got torch.float64"),
        ({"y": torch.zeros(2, 3, 5)}, ValueError, r"y must have shape \(2, 3, 4\), got \(2, 3, 5\)"),
        ({"y": torch.zeros(2, 3, 4).half()}, TypeError, "y must be torch.float32, got torch.float16"),
        ({"gate": torch.zeros(2, 2, 4)}, ValueError, r"gate must broadcast to x's shape \(2, 3, 4\), got \(2, 2, 4\)"),
        ({"gate": torch.zeros(1, 2, 3, 4)}, ValueError, r"gate must broadcast to x's shape \(2, 3, 4\)"),
        ({"out": torch.zeros(2, 3)}, ValueError, r"out must have shape \(2, 3, 4\)"),
    ],
)
def test_residual_errors(given: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 4), "y": torch.zeros(2, 3, 4), "gate": torch.zeros(4), **given}
    with pytest.raises(error, match=words):
        ltxkern.gated_residual(**arguments)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"x": torch.zeros(4)}, ValueError, r"x must have at least 2 dimensions, got shape \(4,\)"),
        ({"logits": torch.zeros(2, 4)}, ValueError, r"logits must have shape \(2, 3\), got \(2, 4\)"),
        ({"logits": torch.zeros(2, 3).long()}, TypeError, "logits must be one of"),
        ({"out": torch.zeros(2, 3, 4).half()}, TypeError, "out must be torch.float32, got torch.float16"),
    ],
)
def test_head_gate_errors(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ltxkern.head_gate(**{"x": torch.zeros(2, 3, 4), "logits": torch.zeros(2, 3), **given})
