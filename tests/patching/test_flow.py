"""Blocks of nobody's library: where a norm may be fused, the code says so; where it may not, the report says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ltxkern


class Block(nn.Module):
    """Two norms and their activation; subclasses say how they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(2, 4)
        self.norm2 = nn.GroupNorm(2, 4)
        self.act = nn.SiLU()
        self.conv = nn.Conv2d(4, 4, 1)
        self.shortcut: nn.Module | None = None
        self.kind = "default"
        self.switch = False

    def flip(self) -> None:
        """What a method sets may be otherwise at any call."""
        self.switch = not self.switch


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.act(self.norm1(x)))
        residual = x if self.shortcut is None else self.act(self.shortcut(x))
        y = self.act(self.norm2(y))
        return y + residual


class OtherName(Block):
    def forward(this, x: Tensor, flag: bool = True) -> Tensor:  # noqa: N805
        y: Tensor = this.norm1(x).contiguous()
        if this.kind == "default":
            y = this.act(y)
        else:
            y = this.act(y * 2)
        with torch.profiler.record_function("conv"):
            y = this.conv(y)
        for _ in range(2):
            y = this.norm2(y)
            y = this.act(y)
        return y


class EitherNorm(Block):
    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        if zq is not None:
            y, _ = self.norm1(x, zq)
        elif x.shape[0] > 1:
            y = self.norm1(x)
        else:
            y = self.norm2(x)
        return self.act(y)


class Embedded(Block):
    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        y = self.act(self.norm1(x))
        if temb is not None:
            y = y + self.act(temb)[:, :, None, None]
        return self.act(self.norm2(y))


class SeesNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        return self.act(y) + y


class SeesLater(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(2):
            y = self.act(y)
            y = self.norm1(y)
        return self.act(y)


class BreaksOff(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(3):
            y = self.norm1(y)
            if i == 1:
                break
            y = self.act(y)
        return y


class ActivatesMore(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.act(self.norm1(x))))


class Switched(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.switch:
            y = y * 2
        return self.act(y)


class Modulated(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm1(x) * 2 + 1)


class ConditionedNorm(nn.GroupNorm):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


class Conditioned(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = ConditionedNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm1(x, x))


class HandsOn(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self._apply_act(self.act(self.norm1(x)))

    def _apply_act(self, x: Tensor) -> Tensor:
        return self.act(x)


class InLambda(Block):
    def forward(self, x: Tensor) -> Tensor:
        again = lambda y: self.act(y)  # noqa: E731
        return again(self.act(self.norm1(x)))


class InTry(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(x))
        try:
            y = self.act(y)
        except ValueError:
            y = x
        return y


class AsFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm1(x))


class EmbeddedTwice(Block):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        y = self.act(self.norm1(x)) + self.act(temb)[:, :, None, None]
        return self.act(self.norm2(y)) + temb[:, :, None, None]


class PassesOn(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.act, self.act(self.norm1(x)), use_reentrant=False)


class Kept(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.norm1(x)
        return self.act(self.kept)


def _shared_activation() -> nn.Module:
    model = nn.Sequential(Plain(), Plain())
    model[1].act = model[0].act
    return model


def _shared_norm() -> nn.Module:
    norm = nn.GroupNorm(2, 4)
    return nn.Sequential(norm, nn.SiLU(), norm)


def _no_source() -> nn.Module:
    names: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.act(self.norm1(x))", names)
    return type("Unread", (Block,), {"forward": names["forward"]})()


CASES: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "plain": (Plain, 2, ""),
    "self by another name": (OtherName, 2, ""),
    "one of two norms": (EitherNorm, 2, ""),
    "time embedding": (Embedded, 2, ""),
    "norm has other uses": (SeesNorm, 0, "its result has other uses"),
    "over a loop's end": (SeesLater, 0, "SeesLater holds no norm that is seen to go"),
    "out of a loop": (BreaksOff, 0, "its result has other uses"),
    "activation of more": (ActivatesMore, 0, "its activation serves other values as well"),
    "changing attribute": (Switched, 0, "something stands between it and the activation"),
    "scale and shift": (Modulated, 0, "the activation: a scale and shift, which no op takes"),
    "conditioned norm": (Conditioned, 0, "ConditionedNorm is no norm that an op serves: it takes a condition"),
    "in another method": (HandsOn, 0, "act is used otherwise than by a call in forward"),
    "in a lambda": (InLambda, 0, "act is used otherwise than by a call in forward"),
    "in a try": (InTry, 0, "act is used otherwise than by a call in forward"),
    "as a function": (AsFunction, 0, "SiLU is called as a function"),
    "embedding has other uses": (EmbeddedTwice, 0, "temb, which goes into its activation, has other uses"),
    "handed on": (PassesOn, 0, "act is used otherwise than by a call in forward"),
    "kept": (Kept, 0, "Kept holds no norm that is seen to go"),
    "shared activation": (_shared_activation, 0, "its activation is held in several places"),
    "shared norm": (_shared_norm, 0, "is held in several places"),
    "no source": (_no_source, 0, "the source of its forward cannot be read"),
    "by itself": (
        lambda: nn.GroupNorm(2, 4),
        0,
        "GroupNorm holds no norm that is seen to go straight into a SiLU module",
    ),
}


@pytest.mark.parametrize(("build", "sites", "reason"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_what_the_code_says(build: Callable[[], nn.Module], sites: int, reason: str) -> None:
    torch.manual_seed(0)
    model = build()
    inputs = [torch.randn(2, 4, 3, 3)]
    if isinstance(model, (Embedded, EmbeddedTwice)):
        inputs.append(torch.randn(2, 4))
    plain = model(*inputs)
    report = ltxkern.patch(model)
    torch.testing.assert_close(model(*inputs), plain)
    assert len(report.sites) == sites
    # One that only goes along is left for another reason.
    assert bool(report.left) == bool(reason)
    assert not reason or any(reason in left.reason for left in report.left), report.left
    if sites == 0:
        with pytest.raises(ValueError, match="strict: expected every site fused"):
            ltxkern.patch(model, strict=True)
    else:
        report.undo()
        assert ltxkern.patch(model, strict=True).sites
