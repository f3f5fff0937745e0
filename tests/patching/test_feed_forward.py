"""GELU within the product of a feed-forward: only where it is the right one and nothing minds."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ltxkern.patching import products as module
from ltxkern.patching.products import feed_forward, gelu_serves, is_plain

WIDTH = 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gelu_goes_into_the_product_only_where_it_is_the_right_one(monkeypatch: Any, dtype: torch.dtype) -> None:
    """One of the error function does not serve in any dtype, nor where a product of the dtype is none; one that is right does."""
    monkeypatch.setattr(module, "_onednn_multiplies", lambda _: True)

    def serves(gelu: Callable[[Tensor], Tensor]) -> bool:
        def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return gelu(torch.addmm(bias.float(), x.float(), weight.float().t())).to(x.dtype)

        monkeypatch.setattr(module, "_of_onednn", product)
        gelu_serves.cache_clear()
        return gelu_serves(torch.device("cpu"), dtype)

    assert serves(partial(nn.functional.gelu, approximate="tanh"))
    assert not serves(nn.functional.gelu)
    assert not serves(torch.zeros_like)
    monkeypatch.setattr(module, "_onednn_multiplies", lambda _: False)
    assert not serves(partial(nn.functional.gelu, approximate="tanh"))
    gelu_serves.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_gelu_within_a_product_of_this_processor(dtype: torch.dtype) -> None:
    """Nearer to fp64 than product and GELU apart, for one token, many, and views of both operands."""
    if not module._onednn_multiplies(dtype):
        pytest.skip(f"no instructions for {dtype}")
    assert gelu_serves(torch.device("cpu"), dtype)
    generator = torch.Generator().manual_seed(0)
    for shape, of in (((1, 1, 64), (256, 64)), ((2, 70, 96), (48, 96)), ((3, 5, 7, 128), (200, 256))):
        x, weight = (torch.randn(each, generator=generator).to(dtype) for each in (shape, of))
        weight, bias = weight[:, : shape[-1]] / 8, torch.randn(of[0], generator=generator).to(dtype)
        exact = module.product_gelu_apart(x.double(), weight.double(), bias.double())
        errors = [
            (product(x, weight, bias).double() - exact).norm()
            for product in (module.product_gelu, module.product_gelu_apart)
        ]
        assert errors[0] <= errors[1] * 1.01


@torch.no_grad()
def test_layers_with_something_around_them_are_called() -> None:
    """Hooks of the feed-forward and of its products see their calls, and so do other layers in their place."""
    network, x = FeedForward(WIDTH, activation_fn="gelu-approximate").eval(), torch.randn(1, 6, WIDTH)
    assert is_plain(network, x.dtype)
    assert not is_plain(network, torch.bfloat16)
    torch.testing.assert_close(feed_forward(network, x), network(x), rtol=0, atol=1e-6)
    for each in (network, network.net[0], network.net[0].proj, network.net[2]):
        seen: list[int] = []
        handle = each.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        assert torch.equal(feed_forward(network, x), network(x))
        handle.remove()
        assert seen == [1, 1]
    other = FeedForward(WIDTH, activation_fn="gelu-approximate", bias=False).eval()
    assert not is_plain(other, x.dtype)
    assert torch.equal(feed_forward(other, x), other(x))
    assert not is_plain(FeedForward(WIDTH, activation_fn="gelu").eval(), x.dtype)
    for bias in (torch.randn(512)[::2], torch.ones(1).expand(4 * WIDTH)):
        gapped = FeedForward(WIDTH, activation_fn="gelu-approximate").eval()
        gapped.net[0].proj.bias = nn.Parameter(bias)
        assert not is_plain(gapped, x.dtype)
    adapted = FeedForward(WIDTH, activation_fn="gelu-approximate").eval()
    adapted.net[0].proj.__class__ = type("LoRALinear", (nn.Linear,), {"forward": lambda self, x: x.repeat(1, 1, 4)})
    assert not is_plain(adapted, x.dtype)
    network.__class__ = type("Own", (FeedForward,), {})
    assert not any(is_plain(each, x.dtype) for each in (network, nn.Linear(WIDTH, WIDTH)))
