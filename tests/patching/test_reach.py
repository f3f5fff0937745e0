"""Layers that other code reaches than the calls of one forward: left alone, and the results stay stock's."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ltxkern
from tests.patching.test_ltx2 import inputs_of, model_of, off


def norm_of(module: Any, x: Tensor) -> Tensor:
    return module.norm(x)


def summed(layers: Any, x: Tensor) -> Tensor:
    return layers[0](x) + layers(x)


class Block(nn.Module):
    """A norm and its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.step = nn.GroupNorm(2, 8), nn.SiLU(), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


class WritesPart(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y[:, :1] = 1.5
        return self.act(y)


class AddsToPart(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y[:, :1] += 1.5
        return self.act(y)


class CountsSteps(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.step == 0:
            y = self.act(y)
        self.step += 1
        return y


class Above(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class AsksAbove(Above):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x)) + super().forward(x)


class HandsItselfOver(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x)) + norm_of(self, x)


class AnotherName(Block):
    def forward(self, x: Tensor) -> Tensor:
        me = self
        return self.act(self.norm(x)) + me.norm(x)


class ByString(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x)) + getattr(self, "norm")(x)  # noqa: B009


class ByWalk(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x)) + next(self.children())(x)


class Property(Block):
    @property
    def other(self) -> nn.Module:
        return self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x)) + self.other(x)


class PlainList(Block):
    def __init__(self) -> None:
        super().__init__()
        self.others = [self.norm]

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x)) + self.others[0](x)


class ActivationByKeyword(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(input=self.norm(x))


class NormByKeyword(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(input=x))


class InPlace(Block):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.act(self.norm(x)) + self.act(temb)


class CallerHolds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = InPlace()

    def forward(self, x: Tensor) -> Tensor:
        temb = x.clone()
        return self.block(x, temb) + temb


class Holder(nn.Module):
    """Of a block and a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.layers = Block(), nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())


class BlocksNorm(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block.norm(x)


class ByFunction(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return summed(self.layers, x)


class ByComputedName(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "lay" + "ers")[0](x)


class ByPath(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("layers.0")(x)


class ByItem(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers.__getitem__(0)(x)


class Named(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("first", nn.GroupNorm(2, 8))
        self.layers.add_module("last", nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers.first(x)


class Walk(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return sum(module(x) for module in self.modules() if isinstance(module, nn.GroupNorm))


class Sequence(nn.Sequential):
    def first(self, x: Tensor) -> Tensor:
        return self[0](x)


class OwnSequence(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Sequence(nn.GroupNorm(2, 8), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers.first(x)


class Replaced(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.set()

    def set(self) -> None:
        """Its forward, bound to it."""
        self.forward = types.MethodType(lambda self, x: self.layers[0](x) + self.block.norm(x), self)

    def __deepcopy__(self, memo: Any) -> Replaced:
        made = Replaced()
        made.load_state_dict(self.state_dict())
        return made


KINDS = [
    *(
        WritesPart,
        AddsToPart,
        CountsSteps,
        AsksAbove,
        HandsItselfOver,
        AnotherName,
        ByString,
        ByWalk,
        Property,
        PlainList,
    ),
    *(
        ActivationByKeyword,
        NormByKeyword,
        CallerHolds,
        BlocksNorm,
        ByFunction,
        ByComputedName,
        ByPath,
        ByItem,
        Named,
        Walk,
    ),
    *(OwnSequence, Replaced),
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_other_code_reaches_is_left_alone(kind: Any) -> None:
    model = kind()
    for weight in model.parameters():
        nn.init.normal_(weight)
    stock, x = copy.deepcopy(model), torch.randn(2, 8, 4, 4)
    report = ltxkern.patch(model)
    assert report.left or kind is CallerHolds
    for _ in range(2):
        torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-5)


def test_what_is_only_looked_at_is_fused() -> None:
    """Guards that such code as diffusers' has does not cost sites."""

    class Looks(Holder):
        s1 = 1.0

        def forward(self, x: Tensor) -> Tensor:
            if getattr(self, "s1", None) and isinstance(self, nn.Module):
                x = self.block(x)
            return self.layers(x) if len(self.layers) else x

        def set_all(self) -> None:
            """Not a part of a call."""
            for module in self.modules():
                module.train()

    assert ltxkern.patch(Looks()).sites == ["block.norm", "layers.0"]


def test_a_forward_put_in_later_takes_the_place_of_the_norm() -> None:
    layers, x = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()), torch.randn(2, 8, 4, 4)
    expected, report = layers(x * 2), ltxkern.patch(layers)
    plain = layers[0].forward
    layers[0].forward = lambda x: plain(x * 2)  # type: ignore[method-assign]
    torch.testing.assert_close(layers(x), expected)
    assert not report.sites
    assert "a forward was put into it" in str(report)


def test_norms_that_no_op_serves_are_told_of_beside_those_that_are_fused() -> None:
    class Own(nn.GroupNorm):
        pass

    layers = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), Own(2, 8), nn.SiLU(), nn.BatchNorm2d(8), nn.SiLU())
    report = ltxkern.patch(layers)
    assert report.sites == ["0"]
    assert [item.name for item in report.left] == ["2", "4"]
    with pytest.raises(ValueError, match="Own is no norm that an op serves"):
        ltxkern.patch(copy.deepcopy(layers), strict=True)


@pytest.mark.parametrize("name", ["norm1", "audio_to_video_norm", "attn1.norm_q"])
@torch.no_grad()
def test_hooks_that_come_later_to_norms_of_ltx2(name: str) -> None:
    model = model_of("2.3")
    stock, given = copy.deepcopy(model), inputs_of("2.3", by_token=False)
    report = ltxkern.patch(model)
    for each in (model, stock):
        norm = each.transformer_blocks[0].get_submodule(name)
        norm.register_forward_hook(lambda _module, _inputs, result: result * 1.5)
    assert off(model(**given), stock(**given)) < 1e-5
    assert "a hook was registered on it" in str(report)


def test_hooks_on_all_modules_keep_a_patch_away() -> None:
    """They would see, and may change, what is no longer made."""
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        report = ltxkern.patch(model)
    finally:
        hook.remove()
    assert report.sites == []
    assert [left.reason for left in report.left] == ["is seen by hooks on all modules"]
    assert len(ltxkern.patch(model).sites) == 1
