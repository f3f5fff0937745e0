"""GELU within the product of a feed-forward: only where it is the right one and nothing minds."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ltxkern.patching.feed_forward import feed_forward, gelu_serves, is_plain

WIDTH = 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gelu_goes_into_the_product_only_where_it_is_the_right_one(monkeypatch: Any, dtype: torch.dtype) -> None:
    """One of the error function, as torch's on a CPU, does not serve in any dtype; one that is right does."""

    def serves(gelu: Callable[[Tensor], Tensor]) -> bool:
        def activation(bias: Tensor, x: Tensor, weight: Tensor, *, use_gelu: bool) -> Tensor:
            assert use_gelu
            return gelu(torch.addmm(bias.float(), x.float(), weight.float())).to(x.dtype)

        monkeypatch.setattr(torch, "_addmm_activation", activation)
        gelu_serves.cache_clear()
        return gelu_serves(torch.device("cpu"), dtype)

    assert serves(partial(nn.functional.gelu, approximate="tanh"))
    assert not serves(nn.functional.gelu)
    assert not serves(torch.zeros_like)
    gelu_serves.cache_clear()


@torch.no_grad()
def test_layers_with_something_around_them_are_called() -> None:
    """Hooks of the feed-forward and of its products see their calls, and so do other layers in their place."""
    network, x = FeedForward(WIDTH, activation_fn="gelu-approximate").eval(), torch.randn(1, 6, WIDTH)
    assert is_plain(network, x.dtype)
    assert not is_plain(network, torch.bfloat16)
    torch.testing.assert_close(feed_forward(network, x), network(x), rtol=0, atol=1e-6)
    for module in (network, network.net[0], network.net[0].proj, network.net[2]):
        seen: list[int] = []
        handle = module.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        assert torch.equal(feed_forward(network, x), network(x))
        handle.remove()
        assert seen == [1, 1]
    other = FeedForward(WIDTH, activation_fn="gelu-approximate", bias=False).eval()
    assert not is_plain(other, x.dtype)
    assert torch.equal(feed_forward(other, x), other(x))
    assert not is_plain(FeedForward(WIDTH, activation_fn="gelu").eval(), x.dtype)
    network.__class__ = type("Own", (FeedForward,), {})
    assert not any(is_plain(each, x.dtype) for each in (network, nn.Linear(WIDTH, WIDTH)))
