"""`fuse_lora`: the weights of `merge_lora_`, PEFT's layers by a stand-in and by PEFT itself where it is, bits restored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ltxkern
from ltxkern.integrations import fused_lora


class TunedLayer(nn.Module):
    """A LoRA layer with the attributes and the forward of PEFT's."""

    def __init__(self, base_layer: nn.Module, **ranks: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling = {name: 0.5 * rank for name, rank in ranks.items()}
        self.active_adapters, self.merged_adapters = list(ranks), list[str]()
        self.lora_variant, self.use_dora, self.lora_bias = dict[str, Any](), dict[str, bool](), dict[str, bool]()
        for name, rank in ranks.items():
            if isinstance(base_layer, nn.Conv2d):
                given = {"stride": base_layer.stride, "padding": base_layer.padding, "bias": False}
                first = nn.Conv2d(base_layer.in_channels, rank, base_layer.kernel_size, **given)
                last: nn.Module = nn.Conv2d(rank, base_layer.out_channels, 1, bias=False)
            else:
                first = nn.Linear(base_layer.in_features, rank, bias=False)
                last = nn.Linear(rank, base_layer.out_features, bias=False)
            self.lora_A[name], self.lora_B[name] = first, last

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        if self.merged_adapters:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                result = result + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return result


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        TunedLayer(nn.Conv2d(3, 8, 3, padding=1), one=2, two=3),
        nn.Flatten(),
        TunedLayer(nn.Linear(8 * 16, 40), one=4),
        nn.Linear(40, 5),
    ).to(dtype)


def bits(module: nn.Module) -> list[Tensor]:
    return [value.detach().clone().view(torch.uint8) for value in module.state_dict().values()]


def same(module: nn.Module, kept: list[Tensor]) -> bool:
    return all(map(torch.equal, bits(module), kept))


class Pipeline:
    """What of a diffusers pipeline is asked."""

    def __init__(self, module: nn.Module) -> None:
        self.components = {"transformer": module, "scheduler": object(), "vae": None}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("chunk_bytes", [512, 1 << 20])
@pytest.mark.parametrize("rounding", fused_lora.ROUNDINGS)
def test_weights_of_merge_lora_and_their_bits_again(dtype: torch.dtype, chunk_bytes: int, rounding: str) -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(48, 65, bias=False).to(dtype), nn.Linear(65, 33).to(dtype)]
    a = [torch.randn(4, 48), [torch.randn(3, 65), torch.randn(2, 65)]]
    b = [torch.randn(65, 4), [torch.randn(33, 3), torch.randn(33, 2)]]
    with torch.no_grad():
        linears[0].weight[1, :4] = torch.tensor([torch.nan, -0.0, torch.inf, 1e-7])
    wanted = [linear.weight.detach().clone() for linear in linears]
    ltxkern.merge_lora_many_(wanted, a, b, [0.25, [1.0, -2.0]], rounding=rounding)
    kept, versions = list(map(bits, linears)), [linear.weight._version for linear in linears]
    options = {"rounding": rounding, "chunk_bytes": chunk_bytes}
    fused = ltxkern.fuse_lora(linears, a, b, [0.25, [1.0, -2.0]], **options)
    assert fused.layers == ["target[0]", "target[1]"]
    for linear, merged, version in zip(linears, wanted, versions, strict=True):
        # Sums over rank are taken in another order where a matrix product has other rows.
        near = 0.0 if chunk_bytes > 512 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(linear.weight, merged, atol=near, rtol=near, equal_nan=True)
        assert linear.weight._version > version
    assert 0 < fused.nbytes <= sum(linear.weight.nbytes for linear in linears)
    fused.unfuse()
    assert all(map(same, linears, kept))
    assert fused.layers == []
    fused.unfuse()
    assert all(map(same, linears, kept))


@pytest.mark.parametrize("target", [nn.Module, Pipeline])
def test_layers_of_peft(target: type[Any]) -> None:
    """The same outputs by merged weights, marked for PEFT; as they were at the end of the block, after an error too."""
    module = model()
    given = module if target is nn.Module else Pipeline(module)
    x, kept = torch.randn(2, 3, 4, 4), bits(module)
    wanted = module(x)
    plain = fused_lora.fuse_lora(given, scale=0.0)
    without = module(x)
    plain.unfuse()
    with ltxkern.fuse_lora(given) as fused:
        prefix = "" if target is nn.Module else "transformer."
        assert fused.layers == [f"{prefix}0", f"{prefix}2"]
        assert [module[0].merged_adapters, module[2].merged_adapters] == [["one", "two"], ["one"]]
        torch.testing.assert_close(module(x), wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(wanted, without, atol=1e-2)
    assert same(module, kept)
    assert [module[0].merged_adapters, module[2].merged_adapters] == [[], []]
    assert torch.equal(module(x), wanted)
    with ltxkern.fuse_lora(given, adapters=["two"], scale=0.5) as fused:
        assert fused.layers == [f"{prefix}0"]
        weight, layer = module[0].base_layer.weight.flatten(1), module[0]
        added = layer.lora_B["two"].weight.flatten(1) @ layer.lora_A["two"].weight.flatten(1) * 0.75
        torch.testing.assert_close(weight, kept[0].view(torch.float32).view_as(weight) + added)
    assert same(module, kept)


def test_peft_itself() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)).to(torch.bfloat16)
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    x, kept = torch.randn(3, 24, dtype=torch.bfloat16), bits(tuned)
    wanted = tuned(x)
    with ltxkern.fuse_lora(tuned) as fused:
        assert len(fused.layers) == 2
        torch.testing.assert_close(tuned(x), wanted, atol=5e-2, rtol=5e-2)
    assert same(tuned, kept)
    assert torch.equal(tuned(x), wanted)


def test_nothing_is_left_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the middle restores what was merged; a weight that was changed since is not touched."""
    module = model(torch.bfloat16)
    kept, calls = bits(module), 0

    def failing(part: Tensor, *args: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("out of memory")
        return ltxkern.merge_lora_(part, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fused_lora, "merge_lora_", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            ltxkern.fuse_lora(module, chunk_bytes=8 * 128 * 2)
    assert calls > 5
    assert same(module, kept)
    assert module[0].merged_adapters == []
    fused = ltxkern.fuse_lora(module)
    element = module[2].base_layer.weight.data[0, 0]
    before = element.clone()
    element += 1
    with pytest.raises(
        RuntimeError, match="2: its weight was changed after fuse_lora, and is left as it is: undo that"
    ):
        fused.unfuse()
    element.copy_(before)
    fused.unfuse()
    with monkeypatch.context() as patch:
        fused = ltxkern.fuse_lora(module)
        patch.setattr(fused_lora, "merge_lora_", lambda part, *args, **options: part.add_(1))
        with pytest.raises(
            RuntimeError, match=r"2: cpu subtracts otherwise than cpu, where it was fused, .* left as it is"
        ):
            fused.unfuse()
    fused.unfuse()
    assert same(module, kept)


def changed(name: str) -> Any:
    """A target that is refused for one reason."""
    module = model()
    layer = module[2]
    match name:
        case "meta":
            layer.base_layer.to("meta")
        case "quantised":
            layer.base_layer.weight.data = layer.base_layer.weight.data.to(torch.float8_e4m3fn)
        case "made":
            nn.utils.parametrizations.weight_norm(layer.base_layer)
        case "dora":
            layer.use_dora["one"] = True
        case "merged":
            layer.merged_adapters.append("one")
        case "embedding":
            layer.base_layer = nn.Embedding(4, 4)
        case "strides":
            layer.base_layer.weight.data = layer.base_layer.weight.data.t().contiguous().t()
        case "other":
            del layer.lora_A
        case "shared":
            module[3] = TunedLayer(layer.base_layer, one=2)
        case "group":
            module._diffusers_hook = type("Registry", (), {"hooks": {"group_offloading": None}})()
        case "inference":
            with torch.inference_mode():
                layer.base_layer.weight = nn.Parameter(torch.randn(40, 128), requires_grad=False)
    return module


REFUSED = {
    "meta": r"2: its weight lies on the meta device: fuse before offloading is enabled",
    "quantised": r"2: a float8 weight has a scale that is not known here: use merge_lora_",
    "made": r"2 must have a plain weight, got one that is made or quantised: leave it out",
    "dora": r"2: adapter one is no plain LoRA",
    "merged": r"2: one is merged already: unmerge it first",
    "embedding": r"2 must be a Linear or a convolution of one group, got Embedding: leave it out",
    "strides": r"2: its weight has strides \(1, 40\)",
    "other": r"2 must be a LoRA layer, got TunedLayer: leave it out",
    "shared": r"3 and 2 share one weight: fuse it once",
    "group": r": its weights are under group offload: fuse before it is enabled",
    "inference": r"ltxkern\.fuse_lora writes into a tensor of shape \(40, 128\) made in inference mode",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused_changes_nothing(reason: str) -> None:
    module = changed(reason)
    first = module[0].base_layer.weight.detach().clone()
    with pytest.raises((TypeError, ValueError, RuntimeError), match=REFUSED[reason]):
        ltxkern.fuse_lora(module)
    assert torch.equal(module[0].base_layer.weight, first)
    assert module[0].merged_adapters == []


def test_wrong_arguments() -> None:
    linear, a, b = nn.Linear(4, 5), torch.randn(2, 4), torch.randn(5, 2)
    for words, call in {
        r"target has no active LoRA layers: load one first": lambda: ltxkern.fuse_lora(linear),
        r"adapters must be among one, two, got three": lambda: ltxkern.fuse_lora(model(), adapters=["three"]),
        r"target must be a module, a pipeline, or a list of Linears .*, got int": lambda: ltxkern.fuse_lora(3),
        r"must have one length, got 1, 2, 1 and 1": lambda: ltxkern.fuse_lora([linear], [a, a], [b]),
        r"target\[0\]: lora_a\[0\] and lora_b\[0\] must be": lambda: ltxkern.fuse_lora([linear], [b], [a]),
        r'rounding must be "single" or "reference"': lambda: ltxkern.fuse_lora([linear], [a], [b], rounding="x"),
        r"scale must be finite, got nan": lambda: ltxkern.fuse_lora(model(), scale=float("nan")),
    }.items():
        with pytest.raises((TypeError, ValueError), match=words):
            call()
