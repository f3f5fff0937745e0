"""Sequences of layers that other code takes apart: none of their norms may include the activation behind it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ltxkern


def pair() -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1))


class Holder(nn.Module):
    """A sequence under one name, and lists of one and of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.blocks, self.nested = pair(), nn.ModuleList([pair(), pair()]), nn.Sequential(pair())


class Called(Holder):
    def forward(self, x: Tensor) -> Tensor:
        if self.net is not None:
            x = self.net(x)
        for index, block in enumerate(self.blocks):
            x = block(x) + [0.0, 1.0][index]
        for block, scale in zip(self.blocks, (1.0, 2.0), strict=True):
            x = block(x) * scale
        return self.nested(self.blocks[0](x))


class Scaled(Holder):
    """As blocks of UNets do with a scale and shift: the norm runs alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net[1:](self.net[0](x) * 2)


class Walked(Holder):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x) + 1
        return x


class InOrder(Holder):
    """As the residual blocks of the Wan VAE: convolutions look back at what went into them."""

    def forward(self, x: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        for layer in self.net:
            if isinstance(layer, nn.Conv2d) and seen is not None:
                seen.append(x[:, :, -1:])
                x = layer(x)
            else:
                x = layer(x)
        return x


class Watched(Holder):
    """Of each layer what it gave."""

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for layer in self.net:
            x = layer(x)
            found.append(x.mean())
        return x + torch.stack(found).sum()


class Switched(Holder):
    """Takes it apart only where it was made to."""

    def __init__(self, scales: bool) -> None:
        super().__init__()
        self.scales = scales

    def forward(self, x: Tensor) -> Tensor:
        if self.scales:
            return self.net[1:](self.net[0](x) * 2)
        return self.net(x)


class Flagging(nn.Module):
    """Sets from outside what its part asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Switched(False)

    def forward(self, x: Tensor, scales: bool = False) -> Tensor:
        self.inner.scales = scales
        return self.inner(x)


class Aside(Holder):
    """Not in forward itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)

    def last(self, x: Tensor) -> Tensor:
        first, *rest = self.net.children()
        return nn.Sequential(*rest)(first(x) * 2)


class OfList(Holder):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block[1:](block[0](x) * 2)
        return self.nested[0][0](x)


class OfListByIndex(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1][1:](self.blocks[1][0](x) * 2)


class Outside(nn.Module):
    """Another class's sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Called()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.net[1:](self.inner.net[0](x) * 2)


EVERY = {"net.0", "blocks.0.0", "blocks.1.0", "nested.0.0"}


@pytest.mark.parametrize(
    ("kind", "apart"),
    [
        (Called, set()),
        (Scaled, {"net.0"}),
        (Walked, {"net.0"}),
        (InOrder, set()),
        (Watched, {"net.0"}),
        (partial(Switched, True), {"net.0"}),
        (partial(Switched, False), set()),
        (Aside, {"net.0"}),
        (OfList, EVERY - {"net.0"}),
        (OfListByIndex, {"blocks.0.0", "blocks.1.0"}),
        (Outside, {"inner.net.0"}),
        (Flagging, {"inner.net.0"}),
    ],
)
@torch.no_grad()
def test_what_is_taken_apart_is_left_alone(kind: Any, apart: set[str]) -> None:
    model, x = kind(), torch.randn(2, 4, 3, 3)
    every = EVERY if kind not in (Outside, Flagging) else {f"inner.{name}" for name in EVERY}
    plain = model(x)
    report = ltxkern.patch(model)
    assert set(report.sites) == every - apart
    assert {left.name for left in report.left} == apart
    assert all("is taken apart in" in left.reason for left in report.left)
    assert torch.allclose(model(x), plain, atol=1e-5)
