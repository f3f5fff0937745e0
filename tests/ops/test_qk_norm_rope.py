"""qk_norm_rope: both layouts against fp64, tables shared by the batch, calls around it, errors."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from tests.ops.contract import ACTIVATIONS, assert_as_close, assert_gradients, noise
from tests.serving import over_backends, serving

# batch, tokens, heads, head dim
SIZES = [
    (1, 6, 2, 8),
    (2, 7, 3, 2),
    (1, 1, 1, 4),
    (3, 13, 4, 6),
    (1, 61, 2, 16),
    (2, 3, 9, 128),
    (1, 2, 7, 58),
    (2, 3, 4, 256),
]
LAYOUTS = pytest.mark.parametrize("layout", ["split", "interleaved"])


def inputs(size: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, shared: bool = False) -> list[Tensor]:
    batch, tokens, heads, dim = size
    q, k = (noise(batch, tokens, heads * dim, dtype=dtype, seed=seed) for seed in (0, 1))
    weights = [1 + 0.3 * noise(heads * dim, dtype=dtype, seed=seed) for seed in (2, 3)]
    angles = 3 * noise(1 if shared else batch, heads, tokens, dim // 2, dtype=torch.float64, seed=4)
    return [q, k, *weights, angles.cos().to(dtype), angles.sin().to(dtype)]


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Each pair of numbers as a complex one, multiplied by cos + i sin."""
    heads = x.unflatten(-1, (cos.shape[1], -1))
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    half = heads.shape[-1] // 2
    first = heads[..., :half] if layout == "split" else heads[..., 0::2]
    second = heads[..., half:] if layout == "split" else heads[..., 1::2]
    out = torch.empty_like(heads)
    if layout == "split":
        out[..., :half], out[..., half:] = first * cos - second * sin, first * sin + second * cos
    else:
        out[..., 0::2], out[..., 1::2] = first * cos - second * sin, first * sin + second * cos
    return out.flatten(-2)


def composition(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, layout: str, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Eager torch in the given dtype."""
    return (
        rotated(normed(q, q_weight, eps), cos, sin, layout),
        rotated(normed(k, k_weight, eps), cos, sin, layout),
    )


@over_backends("qk_norm_rope")
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@LAYOUTS
@pytest.mark.parametrize("shared", [False, True], ids=["tables", "shared"])
def test_contract(backend: str, dtype: torch.dtype, size: tuple[int, int, int, int], layout: str, shared: bool) -> None:
    given = inputs(size, dtype, shared)
    with serving(backend):
        out = ltxkern.qk_norm_rope(*given, layout=layout)
    exact = composition(*(value.double() for value in given), layout)
    for ours, theirs, double in zip(out, composition(*given, layout), exact, strict=True):
        assert_as_close(ours, theirs, double)


@over_backends("qk_norm_rope")
@LAYOUTS
def test_fp32_tables_on_bf16_states(backend: str, layout: str) -> None:
    q, k, *weights, cos, sin = inputs((2, 7, 3, 4))
    given = [q.bfloat16(), k.bfloat16(), *(weight.bfloat16() for weight in weights), cos, sin]
    with serving(backend):
        out = ltxkern.qk_norm_rope(*given, layout=layout)
    exact = composition(*(value.double() for value in given), layout)
    for ours, double in zip(out, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert_as_close(ours, double.bfloat16(), double)


@over_backends("qk_norm_rope")
@LAYOUTS
def test_the_norm_of_each_pair_is_kept(backend: str, layout: str) -> None:
    q, k, _, _, cos, sin = inputs((2, 7, 3, 4))
    ones = torch.ones(12)
    with serving(backend):
        out, _ = ltxkern.qk_norm_rope(q, k, ones, ones, cos, sin, layout=layout, eps=0.0)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(2, 7), atol=1e-5, rtol=1e-5)


@over_backends("qk_norm_rope")
def test_no_rotation_is_the_norm(backend: str) -> None:
    q, k, q_weight, k_weight, cos, sin = inputs((2, 7, 3, 4))
    with serving(backend):
        out = ltxkern.qk_norm_rope(q, k, q_weight, k_weight, torch.ones_like(cos), torch.zeros_like(sin), eps=0.5)
    torch.testing.assert_close(out[0], normed(q, q_weight, 0.5), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out[1], normed(k, k_weight, 0.5), atol=1e-6, rtol=1e-6)


@over_backends("qk_norm_rope")
@LAYOUTS
def test_gradients(backend: str, layout: str) -> None:
    op = functools.partial(ltxkern.qk_norm_rope, layout=layout)
    with serving(backend):
        assert_gradients(op, functools.partial(composition, layout=layout), *inputs((2, 3, 2, 4)), near=1e-4)


@over_backends("qk_norm_rope")
def test_a_gradient_of_queries_alone(backend: str) -> None:
    q, *others = inputs((2, 3, 2, 4))
    q.requires_grad_()
    with serving(backend):
        out, _ = ltxkern.qk_norm_rope(q, *others)
        out.sum().backward()
    assert q.grad is not None
    assert float(q.grad.abs().sum()) > 0


def wrong_calls() -> list[tuple[dict[str, Any], type[Exception], str]]:
    tables = torch.zeros(2, 2, 3, 2)
    return [
        ({"layout": "other"}, ValueError, 'layout must be "split" or "interleaved", got \'other\''),
        ({"q": torch.zeros(3, 8)}, ValueError, r"q must be \(B, T, heads \* d\), got shape \(3, 8\)"),
        ({"q": torch.zeros(2, 3, 8).double()}, TypeError, "q must be one of .* got torch.float64"),
        ({"k": torch.zeros(2, 4, 8)}, ValueError, r"k must have shape \(2, 3, 8\), got \(2, 4, 8\)"),
        ({"q_weight": torch.zeros(4)}, ValueError, r"q_weight must have shape \(8,\), got \(4,\)"),
        ({"k_weight": None}, TypeError, "k_weight must be a torch.Tensor, got NoneType"),
        ({"cos": tables[..., :1]}, ValueError, r"cos must be \(1 or 2, heads, 3, d/2\) with heads \* d = 8, got"),
        ({"cos": tables[0]}, ValueError, r"cos must be \(1 or 2, heads, 3, d/2\)"),
        ({"sin": tables[:1]}, ValueError, r"sin must have shape \(2, 2, 3, 2\), got \(1, 2, 3, 2\)"),
        ({"sin": tables.half()}, TypeError, "sin must be torch.float32, got torch.float16"),
        ({"out": (torch.zeros(2, 3, 8), torch.zeros(2, 3, 4))}, ValueError, r"out\[1\] must have shape \(2, 3, 8\)"),
    ]


@pytest.mark.parametrize(("given", "error", "words"), wrong_calls())
def test_errors(given: dict[str, Any], error: type[Exception], words: str) -> None:
    names = ("q", "k", "q_weight", "k_weight", "cos", "sin")
    sizes = ((2, 3, 8), (2, 3, 8), (8,), (8,), (2, 2, 3, 2), (2, 2, 3, 2))
    arguments = {name: torch.zeros(size) for name, size in zip(names, sizes, strict=True)}
    with pytest.raises(error, match=words):
        ltxkern.qk_norm_rope(**{**arguments, **given})
