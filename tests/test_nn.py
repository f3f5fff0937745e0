"""Modules with the keys of what they replace: same numbers, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import PerChannelRMSNorm
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_ltx2 import LTX2Attention, apply_split_rotary_emb
from torch import Tensor, nn
from torch.nn.functional import silu

from ltxkern.nn import GroupNormSiLU, PixelNormSiLU, QKNormRope, RMSNormModulate, RotaryTables


class Case(NamedTuple):
    """A module, what it replaces, and the composition with that; inputs by their shapes."""

    fused: nn.Module
    replaced: nn.Module
    composed: Callable[[Any, tuple[Tensor, ...]], Any]
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[[Any, tuple[Tensor, ...]], Any] = lambda module, inputs: module(*inputs)


def _rope(module: Any, inputs: tuple[Tensor, ...]) -> Any:
    q, k, cos, sin, k_cos, k_sin = inputs
    return torch.cat(module(q, k, RotaryTables(cos, sin), RotaryTables(k_cos, k_sin)), 1)


def _stock_rope(norms: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    q, k, cos, sin, k_cos, k_sin = inputs
    first, second = norms.norm_q(q), norms.norm_k(k)
    return torch.cat([apply_split_rotary_emb(first, (cos, sin)), apply_split_rotary_emb(second, (k_cos, k_sin))], 1)


def _modulated(norm: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    x, scale, shift = inputs
    return norm(x) * (1 + scale) + shift


def _activated(norm: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    return silu(norm(inputs[0]))


def _norms() -> nn.Module:
    """Of an attention, under the names it has them."""
    attention = LTX2Attention(8, heads=2, kv_heads=2, dim_head=4)
    return nn.ModuleDict({"norm_q": attention.norm_q, "norm_k": attention.norm_k})


CASES: dict[str, Callable[[], Case]] = {
    "GroupNormSiLU": lambda: Case(GroupNormSiLU(4, 12), nn.GroupNorm(4, 12), _activated, ((2, 12, 5, 3),)),
    "PixelNormSiLU": lambda: Case(PixelNormSiLU(1e-8), PerChannelRMSNorm(), _activated, ((2, 7, 5, 3),)),
    "PixelNormSiLU, gamma": lambda: Case(
        PixelNormSiLU(1e-24 / 6, gamma=(6, 1, 1, 1)), WanRMS_norm(6, images=False), _activated, ((2, 6, 2, 5, 3),)
    ),
    "RMSNormModulate": lambda: Case(
        RMSNormModulate(8), RMSNorm(8, 1e-6, False), _modulated, ((2, 5, 8), (2, 1, 8), (2, 1, 8))
    ),
    "RMSNormModulate, weight": lambda: Case(
        RMSNormModulate(8, 1e-6, True), RMSNorm(8, 1e-6), _modulated, ((2, 5, 8), (2, 5, 8), (1, 1, 8))
    ),
    "QKNormRope": lambda: Case(
        QKNormRope(2, 4),
        _norms(),
        _stock_rope,
        ((2, 5, 8), (2, 3, 8), *((2, 2, 5, 2),) * 2, *((2, 2, 3, 2),) * 2),
        _rope,
    ),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_module_replaces(make: Callable[[], Case]) -> None:
    torch.manual_seed(0)
    case = make()
    state = {name: torch.randn_like(value) for name, value in case.replaced.state_dict().items()}
    for module in (case.fused, case.replaced):
        assert module.load_state_dict(state, strict=True).missing_keys == []
    inputs = tuple(torch.randn(shape) for shape in case.shapes)
    got, expected = [], []
    for module, run, results in ((case.fused, case.call, got), (case.replaced, case.composed, expected)):
        leaves = tuple(x.clone().requires_grad_() for x in inputs)
        result: Tensor = run(module, leaves)
        result.square().sum().backward()
        results += [result, *(x.grad for x in leaves), *(weight.grad for weight in module.parameters())]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert "eps" in repr(case.fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_activation_modules_by_dtype(dtype: torch.dtype) -> None:
    """In fp64, which no kernel takes, they are the composition."""
    norm = nn.GroupNorm(4, 12).to(dtype)
    fused = GroupNormSiLU.sharing(norm)
    assert fused.weight is norm.weight
    x = torch.randn(2, 12, 5, 3, dtype=dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(fused(x), silu(norm(x)), atol=tolerance, rtol=1e-2)
    expected = silu(x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt()).to(dtype)
    for module in (PixelNormSiLU(1e-6), PixelNormSiLU(1e-6, gamma=(12, 1, 1)).to(dtype)):
        torch.testing.assert_close(module(x), expected, atol=tolerance, rtol=1e-2)
