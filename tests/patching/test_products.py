"""Products by oneDNN: on the processors where it is quicker, for layers that nobody minds, near what torch gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ltxkern.patching import products

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PRODUCTS NOT TESTED: torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def _quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any width count as wide."""
    monkeypatch.setattr(products, "onednn_quicker", lambda: True)
    monkeypatch.setattr(products, "LEAST_WIDTH", 1)


@torch.no_grad()
def test_narrow_rows_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST_WIDTH", 64)
    assert products.serves(nn.Linear(64, 8), torch.randn(2, 64))
    assert not products.serves(nn.Linear(63, 8), torch.randn(2, 63))
    assert not products.serves(nn.Linear(64, 8), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("maker", "capability", "mkl", "quicker"),
    [
        ("AuthenticAMD", "AVX512", True, True),
        ("AuthenticAMD", "AVX2", True, False),
        ("AuthenticAMD", "AVX512", False, False),
        ("GenuineIntel", "AVX512", True, False),
        ("", "AVX512", True, False),
    ],
)
def test_which_processors(
    maker: str, capability: str, mkl: bool, quicker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(products, "processor_fields", lambda: {"vendor_id": maker} if maker else {})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    products.onednn_quicker.cache_clear()
    assert products.onednn_quicker() is quicker
    products.onednn_quicker.cache_clear()


@pytest.mark.parametrize(
    ("shape", "width"), [((1, 1, 64), 256), ((2, 70, 96), 48), ((3, 5, 7, 1024), 200), ((0, 64), 8)]
)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_near_fp64(shape: tuple[int, ...], width: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(shape[-1], width, bias=bias), torch.randn(shape)
    assert products.serves(layer, x)
    found, torchs = products.linear(layer, x), layer(x)
    exact = layer.double()(x.double())
    assert found.shape == exact.shape
    assert (found - exact).norm() <= 3 * (torchs - exact).norm() + 1e-7 * exact.norm()


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        """Another weight."""
        return 2 * weight


def _hooked(layer: nn.Linear) -> None:
    layer.register_forward_pre_hook(lambda *_: None)


def _parametrised(layer: nn.Linear) -> None:
    parametrize.register_parametrization(layer, "weight", _Twice())


def _own_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: x  # type: ignore[method-assign]


def _own_class(layer: nn.Linear) -> None:
    layer.__class__ = type("Own", (nn.Linear,), {"forward": lambda self, x: x})


def _gapped(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn(64, 128)[:, ::2])


def _gapped_bias(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(torch.randn(128)[::2])


def _expanded_bias(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(torch.ones(1).expand(64))


def _half(layer: nn.Linear) -> None:
    layer.bfloat16()


@pytest.mark.parametrize(
    "change", [_hooked, _parametrised, _own_forward, _own_class, _gapped, _gapped_bias, _expanded_bias, _half]
)
@torch.no_grad()
def test_layers_with_something_around_them_are_called(change: Callable[[nn.Linear], None]) -> None:
    layer = nn.Linear(64, 64)
    assert products.serves(layer, torch.randn(3, 64))
    change(layer)
    x = torch.randn(3, 64, dtype=layer.weight.dtype)
    assert not products.serves(layer, x)
    assert torch.equal(products.linear(layer, x), layer(x))


def test_whoever_says_so_has_torchs_product(monkeypatch: Any) -> None:
    layer, x = nn.Linear(64, 32), torch.randn(5, 64)
    assert not products.serves(layer, x), "gradients"
    products.linear(layer, x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert not products.serves(layer, torch.randn(5, 128)[:, ::2])
        assert not products.serves(layer, x.to("meta"))
        assert not products.serves(nn.Linear(64, 32, device="meta"), x)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not products.serves(layer, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert products.linear(layer, x).dtype == torch.bfloat16
        with fwAD.dual_level():
            dual = fwAD.make_dual(x, torch.ones_like(x))
            assert torch.equal(
                fwAD.unpack_dual(products.linear(layer, dual)).tangent, fwAD.unpack_dual(layer(dual)).tangent
            )
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            products.linear(layer, torch.randn(5, 63))
        monkeypatch.setattr(products, "onednn_quicker", lambda: False)
        assert torch.equal(products.linear(layer, x), layer(x))
