"""merge_lora_many_: each layer as merge_lora_, and all layers or none where one is wrong."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern.compiled import merge_lora as launch
from ltxkern.ops.merge_lora import OP, Arguments, refuse_cuda
from tests.ops.contract import assert_same, noise
from tests.ops.test_merge_lora import lora
from tests.serving import needs_cpu_kernels, over_backends, serving


@over_backends("merge_lora_")
@pytest.mark.parametrize("rounding", ["single", "reference"])
def test_many_layers_are_each_of_them(backend: str, rounding: str) -> None:
    sizes = [(7, 13, 3), (24, 40, 4), (5, 1, 2)]
    layers = [(noise(m, n, dtype=torch.bfloat16, seed=m), *lora(m, n, r, torch.bfloat16)) for m, n, r in sizes]
    weights, a, b = ([layer[k] for layer in layers] for k in range(3))
    expected = [weight.clone() for weight in weights]
    with serving(backend):
        merged = ltxkern.merge_lora_many_(weights, a, b, [0.5, 1.0, -0.25], rounding=rounding)
        for weight, x, y, scale in zip(expected, a, b, [0.5, 1.0, -0.25], strict=True):
            ltxkern.merge_lora_(weight, x, y, scale, rounding=rounding)
    for one, weight, other in zip(merged, weights, expected, strict=True):
        assert one is weight
        assert_same(one, other)


def test_layers_of_one_shape_share_a_program() -> None:
    weight, (a, b) = noise(6, 8), lora(6, 8, 2, torch.float32)
    single, stochastic = (
        [launch.describe(Arguments(weight, a, b, [1.0], 1, rounding, seed), None) for seed in (0, 1)]
        for rounding in ("single", "stochastic")
    )
    assert single[0] == single[1]
    assert stochastic[0] != stochastic[1]


def three_layers() -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Weights, their factors, and the memory of the weights."""
    memory = torch.zeros(60)
    weights = [memory[first : first + 15].view(3, 5) for first in (0, 15, 30)]
    return weights, [torch.ones(2, 5) for _ in range(3)], [torch.ones(3, 2) for _ in range(3)], memory


def same(weights: list[Tensor], a: list[Tensor], memory: Tensor) -> None:
    weights[2] = weights[0]


def part(weights: list[Tensor], a: list[Tensor], memory: Tensor) -> None:
    weights[2] = memory[29:44].view(3, 5)


def factor(weights: list[Tensor], a: list[Tensor], memory: Tensor) -> None:
    a[2] = weights[0][:2]


def expanded(weights: list[Tensor], a: list[Tensor], memory: Tensor) -> None:
    weights[2] = torch.zeros(5).expand(3, 5)


def gradient(weights: list[Tensor], a: list[Tensor], memory: Tensor) -> None:
    a[2].requires_grad_()


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (same, ValueError, r"^weights\[0\] and weights\[2\] overlap: give each memory of its own$"),
        (part, ValueError, r"^weights\[1\] and weights\[2\] overlap: give each memory of its own$"),
        (factor, ValueError, r"^weights\[0\] overlaps lora_a\[2\]\[0\]: give weights\[0\] memory of its own$"),
        (expanded, ValueError, r"^weights\[2\] has elements that may share memory"),
        (gradient, RuntimeError, "has no backward"),
    ],
)
def test_all_layers_or_none(spoil: Callable[..., None], error: type[Exception], words: str) -> None:
    """What only the last layer has wrong is seen before the first is changed."""
    weights, a, b, memory = three_layers()
    spoil(weights, a, memory)
    with pytest.raises(error, match=words):
        ltxkern.merge_lora_many_(weights, a, b)
    assert not bool(memory.any())


@needs_cpu_kernels
def test_a_layer_without_a_backend_changes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # The refusals of the CUDA tiers, which decline fp64.
    monkeypatch.setitem(OP._backends, "cpu", OP._backends["cpu"]._replace(refuse=refuse_cuda))
    weights, a, b, memory = three_layers()
    weights[2] = weights[2].double()
    with ltxkern.use_backend("cpu"), pytest.raises(ltxkern.BackendError, match="the kernel accumulates in fp32"):
        ltxkern.merge_lora_many_(weights, a, b)
    assert not bool(memory.any())


def test_many_layers_side_by_side_in_one_matrix() -> None:
    whole, expected = noise(6, 10), noise(6, 10)
    a, b = lora(6, 5, 2, torch.float32, 2)
    ltxkern.merge_lora_many_(list(whole.split(5, dim=1)), a, b)
    for part, x, y in zip(expected.split(5, dim=1), a, b, strict=True):
        ltxkern.merge_lora_(part, x, y)
    assert torch.equal(whole, expected)


def test_an_error_in_a_later_layer_changes_none() -> None:
    weights = [torch.zeros(3, 5), torch.zeros(3, 5)]
    a, b = torch.ones(2, 5), torch.ones(3, 2)
    with pytest.raises(ValueError, match="layer 1: lora_a"):
        ltxkern.merge_lora_many_(weights, [a, a], [b, b[:, :1]])
    with pytest.raises(ValueError, match="must have one length, got 2, 1, 2 and 2"):
        ltxkern.merge_lora_many_(weights, [a], [b, b])
    assert not any(bool(weight.any()) for weight in weights)
