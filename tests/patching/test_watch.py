"""A model that is changed after its patch does as stock changed alike does; what cannot stay fused is given back, and told of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import ltxkern
from examples.patch_vae import small_vae
from tests.patching.test_ltx2 import inputs_of, model_of


class Block(nn.Module):
    """With a flag and a child that its code asks for, and may have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.kind = nn.GroupNorm(2, 8), nn.SiLU(), "default"
        self.conv, self.shortcut = nn.Conv2d(8, 8, 1), None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.kind != "default":
            y = y * 2
        if self.shortcut is not None:
            y = self.shortcut(y)
        return x + self.conv(self.act(y))


class Model(nn.Module):
    """Of a sequence, a block, and a flag that takes the sequence apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1))
        self.block, self.whole = Block(), True

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            x = self.layers(x)
        else:
            x = self.layers[3](self.layers[1](self.layers[0](x)))
        return self.block(x)


class Doubled(nn.Module):
    """A layer in another's place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.conv = layer, getattr(layer, "conv", None)
        self.kernel_size, self.eps = getattr(layer, "kernel_size", None), getattr(layer, "eps", None)

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """Twice what it gives."""
        return 2 * self.layer(*args, **keywords)


class Renamed(Block):
    """A block with another forward, for an instance of its base."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Case(NamedTuple):
    """A change of a model.

    Attributes:
        change: makes it; what it returns is called in the model's place.
        released: how many sites are no longer fused.
    """

    change: Callable[[Any], Any]
    released: int = 1


def do(*steps: str) -> Callable[[Any], None]:
    """Statements on m, a model."""

    def change(model: Any) -> None:
        for step in steps:
            exec(step, {"m": model, "nn": nn, "torch": torch, "Doubled": Doubled, "Renamed": Renamed})

    return change


def double(model: Any, name: str) -> None:
    holder, _, last = name.rpartition(".")
    setattr(model.get_submodule(holder), last, Doubled(model.get_submodule(name)))


PLAIN: dict[str, Case] = {
    "norm replaced": Case(do("m.block.norm = nn.Identity()")),
    "activation replaced": Case(do("m.block.act = nn.GELU()")),
    "norm deleted": Case(do("norm = m.block.norm", "del m.block.norm", "m.block.norm = nn.Identity()")),
    "registered": Case(do("m.block.register_module('norm', nn.Identity())")),
    "added by words": Case(do("m.block.add_module(module=nn.GELU(), name='act')")),
    "wrapped": Case(lambda m: double(m, "block.norm")),
    "held twice": Case(do("m.block.shortcut = m.layers[1]"), released=2),
    "item": Case(do("m.layers[1] = nn.Identity()")),
    "activation, by item": Case(do("m.layers[2] = nn.GELU()")),
    "deleted item": Case(do("del m.layers[2]")),
    "popped": Case(do("m.layers.pop(1)")),
    "deleted slice": Case(do("del m.layers[2:]")),
    "item after others moved": Case(do("del m.layers[0]", "m.layers[1] = nn.GELU()")),
    "inserted": Case(do("m.layers.insert(2, nn.Softplus())")),
    "sliced": Case(lambda m: m.layers[:2]),
    "flag": Case(do("m.block.kind = 'scaled'")),
    "child that was None": Case(do("m.block.shortcut = nn.Softplus()")),
    "flag of a holder": Case(do("m.whole = False")),
    "forward of the block": Case(do("m.block.forward = lambda x, b=m.block: b.norm(x)")),
    "forward of the sequence": Case(do("m.layers.forward = lambda x, s=m.layers: s[1](x)")),
    "forward of the model": Case(do("m.forward = lambda x: m.block.norm(m.layers[1](x))"), released=2),
    "class": Case(do("m.block.__class__ = Renamed")),
    "no bias": Case(do("m.block.norm.bias = None")),
    "bias registered": Case(do("m.block.norm.register_parameter('bias', None)")),
    "parametrised": Case(do("nn.utils.parametrizations.weight_norm(m.block.norm, dim=None)")),
    "reparametrised": Case(do("nn.utils.weight_norm(m.block.norm, dim=None)")),
    "activation's flag": Case(do("m.block.act.inplace = True")),
    # What the group does not stand on leaves it as it is.
    "other layer": Case(lambda m: double(m, "block.conv"), released=0),
    "other item": Case(do("m.layers[0] = nn.Softplus()", "m.layers.append(nn.Softplus())"), released=0),
    "eps": Case(do("m.block.norm.eps = 0.5"), released=0),
    "weight": Case(do("m.block.norm.weight = nn.Parameter(torch.full((8,), 3.0))"), released=0),
    "foreign attribute": Case(do("m.block.mark = m.block.norm.mark = 1", "del m.block.norm.mark"), released=0),
    "same flag": Case(do("m.block.kind = m.block.kind", "m.train()", "m.double().float()"), released=0),
    "same forward": Case(do("m.forward = m.forward", "m.block.forward = m.block.forward", "del m.forward"), released=0),
}


def same(called: Callable[[], Any], expected: Callable[[], Any], tolerance: float) -> None:
    """What both give, or that both refuse."""
    results: list[Any] = []
    for run in (called, expected):
        torch.manual_seed(1)
        results.append(run())
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def classes(model: nn.Module) -> dict[str, Any]:
    """Torch makes a new class for each parametrised module."""
    kinds = {name: type(module) for name, module in model.named_modules()}
    return {name: kind.__name__ if "Parametrized" in kind.__name__ else kind for name, kind in kinds.items()}


def check(case: Case, model: Any, run: Callable[[Any], Any], tolerance: float = 1e-5) -> None:
    stock, report = copy.deepcopy(model), ltxkern.patch(model)
    sites = len(report.sites)
    called, expected = (case.change(each) or each for each in (model, stock))
    assert sites - len(report.sites) == len(report._left()) == case.released
    same(lambda: run(called), lambda: run(expected), tolerance)
    report.undo()
    same(lambda: run(called), lambda: run(expected), 0)
    assert classes(model) == classes(stock)


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_a_change_of_a_model(case: Case) -> None:
    model, x = Model(), torch.randn(2, 8, 4, 4)
    for weight in model.parameters():
        nn.init.normal_(weight)
    check(case, model, lambda model: model(x))


VAE: dict[str, Case] = {
    "noise": Case(do("m.decoder.mid_block.resnets[0].per_channel_scale1 = nn.Parameter(torch.ones(32, 1, 1))"), 2),
    "dropout": Case(do("m.decoder.mid_block.resnets[0].dropout.p = 0.5", "m.train()"), 2),
    "dropout replaced": Case(do("m.decoder.mid_block.resnets[0].dropout = nn.Dropout(0.5)", "m.train()"), 2),
    "convolution": Case(lambda m: double(m, "decoder.mid_block.resnets.0.conv1"), 2),
    "forward of a block": Case(do("m.decoder.mid_block.resnets[0].forward = lambda x, *_, **__: 2 * x"), 2),
    "last convolution": Case(lambda m: double(m, "decoder.conv_out")),
    "hook on the last convolution": Case(
        lambda m: m.decoder.conv_out.register_forward_pre_hook(lambda _, given: (2 * given[0],)) and None
    ),
    "last activation": Case(lambda m: double(m, "decoder.conv_act")),
    "last norm": Case(lambda m: double(m, "decoder.norm_out")),
    "last norm's dim": Case(do("m.decoder.norm_out.channel_dim = -1")),
    "upsampler's flag": Case(do("m.decoder.up_blocks[0].upsamplers[0].residual = True"), 0),
    "low-rank update": Case(lambda m: double(m, "decoder.mid_block.resnets.0.conv1.conv"), 0),
}


@pytest.mark.parametrize("case", VAE.values(), ids=VAE)
@torch.no_grad()
def test_a_change_of_the_video_vae(case: Case) -> None:
    latent = torch.randn(1, 8, 2, 2, 2)
    check(case, small_vae(), lambda vae: vae.decode(latent, return_dict=False)[0])


def hooked(model: Any) -> None:
    """Looks at the modulation that a block is given."""
    model.transformer_blocks[1].register_forward_pre_hook(
        lambda _, given, words: (given, words | {"temb": 2 * words["temb"]}), with_kwargs=True
    )


def replaced(model: Any) -> None:
    """Another forward in a block's place, which takes the modulation of each token."""
    model.transformer_blocks[0].forward = lambda hidden_states, audio_hidden_states, temb, **_: (
        hidden_states * temb.mean(),
        audio_hidden_states,
    )


LTX2: dict[str, Case] = {
    "norm": Case(do("m.transformer_blocks[0].norm2 = nn.LayerNorm(64)"), 12),
    "norm's weight": Case(do("m.transformer_blocks[0].norm1.weight = nn.Parameter(torch.full((64,), 3.0))"), 12),
    "norm of queries": Case(do("m.transformer_blocks[0].attn1.norm_q = nn.LayerNorm(64)"), 2),
    "feed-forward": Case(lambda m: double(m, "transformer_blocks.0.ff"), 0),
    "hook on a block": Case(hooked, 0),
    "forward of a block": Case(replaced, 12),
    "no block": Case(do("del m.transformer_blocks[0]"), 0),
}


@pytest.mark.parametrize("case", LTX2.values(), ids=LTX2)
@torch.no_grad()
def test_a_change_of_the_transformer(case: Case) -> None:
    given = inputs_of("2.3", by_token=True)
    check(case, model_of("2.3"), lambda model: model(**given))
