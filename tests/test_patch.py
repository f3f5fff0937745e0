"""One line in, one line out: the report, its arguments, and modules that hooks and offloading have got hold of."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import ltxkern
from ltxkern.ops.group_norm_silu import apply_group_norm_silu
from ltxkern.patch import patch
from ltxkern.patching.watch import own_class
from tests.patching.models import CASES, built, call


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 1))


@torch.no_grad()
def test_report() -> None:
    model = nn.ModuleDict({"fused": sequential(), "other": sequential()})
    model["other"][1].register_forward_hook(lambda *_: None)
    report = ltxkern.patch(model)
    assert (report.sites, [left.name for left in report.left]) == (["fused.1"], ["other.1"])
    for _ in range(3):
        model["fused"](torch.randn(1, 3, 4, 4))
    model["fused"].double()(torch.randn(1, 3, 4, 4).double())
    row = {
        "name": "fused.1",
        "op": "group_norm_silu",
        "backend": "cpu",
        "contract": "rounded",
        "calls": 3,
        "composed": 1,
    }
    left = {"name": "other.1", "reason": "has forward hooks"}
    assert json.loads(report.to_json()) == {"sites": [row], "left": [left]}
    lines = str(report).splitlines()
    assert re.split(" {2,}", lines[0]) == ["site", *list(row)[1:4], "eager calls", "composed"]
    assert lines[2].split() == [str(value) for value in row.values()]
    assert lines[3] == "calls within a graph of torch.compile are not counted"
    assert lines[-1].split(maxsplit=1) == list(left.values())
    report.undo()
    assert json.loads(report.to_json())["sites"] == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"policy": "exact"}, "the policy is exact, and group_norm_silu is rounded"),
        ({"ops": ["pixel_norm_silu"]}, "group_norm_silu is not among ops"),
        ({"ops": "head_gate"}, "group_norm_silu is not among ops"),
    ],
)
def test_what_may_serve(arguments: dict[str, Any], reason: str) -> None:
    model = sequential()
    assert [left.reason for left in patch(model, **arguments).left] == [reason]
    assert patch(model, ops=["group_norm_silu"]).sites == ["1"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"policy": "fast"}, ValueError, 'policy must be "rounded" or "exact", got \'fast\''),
        ({"ops": ["gelu"]}, ValueError, "ops must be .* got 'gelu'"),
        (
            {"model_or_pipeline": 3},
            TypeError,
            "model_or_pipeline must be a torch.nn.Module or a diffusers pipeline, got int",
        ),
        (
            {"strict": True, "model_or_pipeline": nn.Linear(2, 2)},
            ValueError,
            "strict: .* the model: Linear holds no norm",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patch(**{"model_or_pipeline": sequential(), **arguments})


def test_strict_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(sequential(), sequential())
    model[1][1].register_forward_hook(lambda *_: None)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"got 1 left alone\. 1\.1: has forward hooks"):
        patch(model, strict=True)
    assert [type(module) for module in model.modules()] == classes
    report = patch(model[0], strict=True)
    assert patch(model[0], strict=True).sites == []
    assert report.sites == ["1"]


def test_pipeline() -> None:
    pipeline = SimpleNamespace(components={"vae": sequential(), "unet": sequential(), "scheduler": object()})
    with patch(pipeline) as report:
        assert report.sites == ["vae.1", "unet.1"]
    assert type(pipeline.components["vae"][1]) is nn.GroupNorm


@torch.no_grad()
def test_context_manager_undoes_on_error() -> None:
    model = sequential()

    def fails() -> None:
        with patch(model):
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fails()
    assert type(model[1]) is nn.GroupNorm


@torch.no_grad()
def test_moves_and_copies() -> None:
    model, x = sequential(), torch.randn(1, 3, 4, 4)
    state = copy.deepcopy(model.state_dict())
    report = patch(model)
    got = model(x)
    assert model.load_state_dict(state).missing_keys == []
    assert isinstance(model[1], nn.GroupNorm)
    assert repr(model) == repr(sequential())
    torch.testing.assert_close(model.to(torch.bfloat16)(x.bfloat16()).float(), got, rtol=0.05, atol=0.05)
    copied = copy.deepcopy(model.float())
    report.undo()
    # The copy stays fused, and a patch of it gives the way out.
    own = patch(copied)
    copied(x)
    assert (own.sites, [row.calls for row in own.rows], report.sites) == (["1"], [1], [])
    own.undo()
    assert type(copied[1]) is nn.GroupNorm


def test_what_the_class_of_a_patched_module_makes_is_plain() -> None:
    """As `type(vae).from_config(vae.config)` makes another VAE."""
    model = built(CASES["Stable Diffusion VAE"])
    report = patch(model)
    kinds = {type(module): own_class(module) for module in model.modules() if type(module) is not own_class(module)}
    assert all(inspect.signature(kind) == inspect.signature(own) for kind, own in kinds.items())
    arguments = {"GroupNorm": {"num_groups": 2, "num_channels": 8}, "ResnetBlock2D": {"in_channels": 32}, "SiLU": {}}
    made = {kind: kind(**arguments[kind.__name__]) for kind in kinds if kind.__name__ in arguments}
    made[type(model)] = type(model).from_config(model.config)
    assert len(made) >= 4
    assert all(type(module) is kinds[kind] for kind, module in made.items())
    assert patch(made[type(model)]).sites == report.sites


def by_jit_trace(model: nn.Module, x: Tensor) -> Tensor:
    traced = torch.jit.trace(model, x, check_trace=False)
    assert "ltxkern::group_norm_silu" in str(traced.inlined_graph)
    return traced(x)


def by_make_fx(model: nn.Module, x: Tensor) -> Tensor:
    traced = make_fx(model)(x)
    assert traced.code.count("ltxkern.group_norm_silu") == 1
    return traced(x)


def by_export(model: nn.Module, x: Tensor) -> Tensor:
    exported = torch.export.export(model, (x,))
    assert "ltxkern.group_norm_silu" in str(exported.graph)
    return exported.module()(x)


def by_vmap(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda one: model(one[None])[0])(x)


def by_functional_call(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functional_call(model, {name: weight.clone() for name, weight in model.named_parameters()}, (x,))


def by_jvp(model: nn.Module, x: Tensor) -> Tensor:
    return torch.stack(torch.func.jvp(model, (x,), (x,)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", [by_jit_trace, by_make_fx, by_export, by_vmap, by_functional_call, by_jvp])
def test_the_first_call_is_a_tracers(way: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Nobody has called the site before: what the report wants to know of it must not come into the graph."""
    model, x = sequential(), torch.randn(2, 3, 4, 4)
    wanted = torch.stack(torch.func.jvp(model, (x,), (x,))) if way is by_jvp else model(x)
    report = patch(model)
    torch.testing.assert_close(way(model, x), wanted, rtol=1e-5, atol=1e-5)
    model(x)
    assert report.rows[0].backend == "cpu"


def _own_forward(norm: nn.Module) -> None:
    norm.forward = lambda x: x  # as the hooks of accelerate and diffusers are put in


def _foreign_hook(norm: nn.Module) -> None:
    HookRegistry.check_if_exists_or_initialize(norm).register_hook(ModelHook(), "idle")


UNPLAIN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward hook": (lambda norm: norm.register_forward_hook(lambda *_: None), "has forward hooks"),
    "forward pre-hook": (lambda norm: norm.register_forward_pre_hook(lambda *_: None), "has forward pre-hooks"),
    "backward hook": (lambda norm: norm.register_full_backward_hook(lambda *_: None), "has backward hooks"),
    "backward pre-hook": (lambda norm: norm.register_full_backward_pre_hook(lambda *_: None), "has backward pre-hooks"),
    "accelerate": (lambda norm: setattr(norm, "_hf_hook", object()), "has a hook of accelerate"),
    "diffusers": (_foreign_hook, "has a hook of diffusers"),
    "own forward": (_own_forward, "has a forward of its own"),
    "parametrised": (lambda norm: nn.utils.parametrizations.weight_norm(norm, dim=None), "is no norm that"),
    "no weights": (lambda norm: norm.to("meta"), "has its weight on the meta device"),
    "foreign weight": (
        lambda norm: norm._parameters.update(weight=torch.ones(8).as_subclass(_Sharded)),
        "has a _Sharded as weight",
    ),
}


class _Sharded(Tensor):
    """As DTensor and the tensors of quantising libraries are."""


@pytest.mark.parametrize(
    ("changed", "change", "reason"),
    # An activation has no weights.
    [("norm", *row) for row in UNPLAIN.values()] + [("activation", *row) for row in list(UNPLAIN.values())[:7]],
    ids=[*UNPLAIN, *(f"activation, {name}" for name in list(UNPLAIN)[:7])],
)
def test_modules_that_are_more_than_their_class_are_left_alone(
    changed: str, change: Callable[[Any], Any], reason: str
) -> None:
    model = sequential()
    change(model[1 if changed == "norm" else 2])
    report = patch(model)
    assert report.sites == []
    assert reason in report.left[0].reason
    if not any(parameter.is_meta or type(parameter) is _Sharded for parameter in model.parameters()):
        x = torch.randn(2, 8, 5, 5)
        assert torch.equal(apply_group_norm_silu(x, model[1], model[2]), model[2](model[1](x)))


HOOKS: dict[str, Callable[[Any, Any], Any]] = {
    "forward hook": lambda module, hook: module.register_forward_hook(hook),
    "forward pre-hook": lambda module, hook: module.register_forward_pre_hook(hook),
    "backward hook": lambda module, hook: module.register_full_backward_hook(hook),
    "backward pre-hook": lambda module, hook: module.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("place", [1, 2])
def test_a_hook_that_comes_later_sees_what_the_class_gives(register: Callable[[Any, Any], Any], place: int) -> None:
    """A norm's hook must see the norm's result, not one that includes the activation."""
    seen: dict[str, list[Any]] = {"plain": [], "patched": []}
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    plain = sequential()
    patched = copy.deepcopy(plain)
    report = patch(patched)
    for name, model in (("plain", plain), ("patched", patched)):
        register(model[place], lambda _, *args, name=name: seen[name].append(args))
        model(x).sum().backward()
    assert report.sites == []
    assert "a hook was registered on it or beside it" in report.to_json()
    flat = [
        [t for args in values for part in args for t in (part if isinstance(part, tuple) else (part,))]
        for values in seen.values()
    ]
    assert flat[0]
    assert all(torch.equal(one, other) for one, other in zip(*flat, strict=True) if one is not None)


class Fill(ModelHook):
    """Brings the weights for one call, as offloading does."""

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.kept = {name: weight.data.clone() for name, weight in module.named_parameters(recurse=False)}
        return self._empty(module)

    def pre_forward(self, module: nn.Module, *args: Any, **keywords: Any) -> Any:
        for name, weight in module.named_parameters(recurse=False):
            weight.data.copy_(self.kept[name])
        return args, keywords

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._empty(module)
        return output

    def _empty(self, module: nn.Module) -> nn.Module:
        for weight in module.parameters(recurse=False):
            weight.data.fill_(float("nan"))
        return module


def _fill(model: nn.Module) -> None:
    for module in model.modules():
        if not list(module.children()) and list(module.parameters(recurse=False)):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(Fill(), "fill")


def _align(model: nn.Module) -> None:
    """As accelerate hooks a module: a forward of its own around the old one, weights on the meta device between calls."""
    for module in model.modules():
        if not (names := [name for name, _ in module.named_parameters(recurse=False)]):
            continue
        weights = {name: module._parameters[name] for name in names}
        empty = {name: nn.Parameter(weight.to("meta"), requires_grad=False) for name, weight in weights.items()}

        def forward(module: Any, old: Any, weights: Any, empty: Any, *args: Any, **keywords: Any) -> Any:
            module._parameters.update(weights)
            result = old(*args, **keywords)
            module._parameters.update(empty)
            return result

        module._hf_hook, module._old_forward = object(), module.forward
        module.forward = partial(forward, module, module.forward, weights, empty)
        module._parameters.update(empty)


@pytest.mark.parametrize("offload", [_fill, _align])
@pytest.mark.parametrize("name", ["Stable Diffusion VAE", "UNet", "LTX-2 upsampler", "Mochi"])
@torch.no_grad()
def test_offloading(name: str, offload: Callable[[nn.Module], None]) -> None:
    """Offloaded before the patch, a model is left alone; after it, it stays fused, and comes out as it went in."""
    model = built(CASES[name])
    late = copy.deepcopy(model)
    plain = call(CASES[name], model)
    offload(model)
    early = patch(model)
    assert early.sites == []
    assert all("has a hook of" in left.reason for left in early.left)
    assert torch.equal(call(CASES[name], model), plain)
    report = patch(late)
    got = call(CASES[name], late)
    offload(late)
    assert torch.equal(call(CASES[name], late), got)
    assert all(row.calls == 2 for row in report.rows)
    report.undo()
    assert torch.equal(call(CASES[name], late), plain)


def test_a_changed_class_is_not_given_back_in_silence() -> None:
    model = sequential()
    report = patch(model)
    fused = type(model[1])
    object.__setattr__(model[1], "__class__", type("Changed", (fused,), {}))
    with pytest.raises(RuntimeError, match="has become a Changed since it was patched"):
        report.undo()
    object.__setattr__(model[1], "__class__", fused)
    report.undo()
    assert type(model[1]) is nn.GroupNorm


@torch.no_grad()
def test_pipeline_components_run_on_the_fused_ops() -> None:
    from ltxkern.pipeline.files.demo import DEMO_CONFIGS
    from ltxkern.pipeline.model.components import build

    # On meta, as checkpoints are loaded: the weights come when the module is built.
    sizes = {"upsampler": (1, 16, 2, 2, 2), "video_vae": (1, 16, 2, 2, 2), "audio_vae": (1, 2, 6, 16)}
    for name, shape in sizes.items():
        module = build(name, DEMO_CONFIGS[name]).to_empty(device="cpu")
        decode = module if name == "upsampler" else module.decode
        decode(torch.randn(shape))
        sites = [vars(part).get("_ltxkern") for part in module.modules()]
        assert sum(getattr(site, "calls", 0) > 0 for site in sites) >= 5
