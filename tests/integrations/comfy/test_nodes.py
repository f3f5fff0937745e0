"""The ComfyUI node pack, loaded as ComfyUI loads it, on a stand-in of its interface: clones are fused, origins never."""

from __future__ import annotations

import copy
import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from torch import Tensor, nn

import ltxkern
from ltxkern.integrations import comfyui
from ltxkern.integrations.samplers import sample_res2s_sde
from tests.integrations.comfy import models, stand_in
from tests.processes import ROOT

CPU = torch.device("cpu")
SIGMAS = torch.tensor([1.0, 0.6, 0.2, 0.0])


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The pack in a custom_nodes folder with a dot in its path, called in inference mode as ComfyUI calls nodes."""
    before = set(sys.modules)
    for name, module in stand_in.modules(tmp_path).items():
        monkeypatch.setitem(sys.modules, name, module)
    pack = shutil.copytree(ROOT / "integrations" / "comfyui", tmp_path / "ComfyUI-0.3" / "custom_nodes" / "ltxkern")
    torch.manual_seed(0)
    with torch.inference_mode():
        classes, titles = stand_in.load_custom_node(str(pack))
        assert classes.keys() == titles.keys()
        yield classes
    for patcher in [*stand_in.loaded_models]:
        patcher.detach()
    stand_in.loaded_models.clear()
    assert comfyui.Fusing._standing == []
    for name in set(sys.modules) - before:
        if name.startswith(str(tmp_path).replace(".", "_x_")):
            del sys.modules[name]


def run(kind: Any, **inputs: Any) -> tuple[Any, ...]:
    """A node as the executor runs it: an instance, its inputs by name, as many outputs as it declares."""
    declared = kind.INPUT_TYPES()
    assert (
        declared["required"].keys()
        <= inputs.keys()
        <= declared["required"].keys() | declared.get("optional", {}).keys()
    )
    out = getattr(kind(), kind.FUNCTION)(**inputs)
    assert len(out) == len(kind.RETURN_TYPES)
    return tuple(out)


def patcher_of(model: nn.Module) -> Any:
    return stand_in.ModelPatcher(model.eval(), CPU, CPU)


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def calls(report: str) -> list[list[str]]:
    """Of each site: calls of the op, and of the composition."""
    return [line.split()[-2:] for line in report.splitlines() if " rounded " in line]


def test_every_node_declares_what_comfyui_reads(nodes: dict[str, Any], tmp_path: Path) -> None:
    torch.save({}, tmp_path / "one.pt")
    for kind in nodes.values():
        inputs = kind.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional", "hidden"}
        for entry in (entry for group in inputs.values() for entry in group.values()):
            assert isinstance(entry, tuple)
            assert isinstance(entry[0], (str, list))
            assert len(entry) == 1 or isinstance(entry[1], dict)
        assert all(isinstance(name, str) and name == name.upper() for name in kind.RETURN_TYPES)
        assert len(getattr(kind, "RETURN_NAMES", kind.RETURN_TYPES)) == len(kind.RETURN_TYPES)
        assert callable(getattr(kind, kind.FUNCTION))
        assert kind.CATEGORY == "ltxkern"
    assert nodes["LTXKernMergeLoRA"].INPUT_TYPES()["required"]["lora_name"] == (["one.pt"],)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "image": (lambda: models.ImageBlock(4), (1, 4, 6, 6), 2),
    "ltx": (lambda: models.VideoBlock(4), (1, 4, 3, 4, 4), 2),
    "wan": (lambda: models.WanBlock(4), (1, 4, 3, 4, 4), 2),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_vae_is_fused_while_its_copy_is_loaded(nodes: dict[str, Any], name: str) -> None:
    build, shape, sites = BLOCKS[name]
    vae = stand_in.VAE(models.Decoder(build(), build()).eval())
    z, before, keys = torch.randn(shape), kinds(vae.first_stage_model), list(vae.first_stage_model.state_dict())
    stock = vae.decode(z)
    patched, report = run(nodes["LTXKernPatchVAE"], vae=vae, policy="rounded")
    assert patched is not vae
    assert patched.patcher is not vae.patcher
    assert kinds(vae.first_stage_model) == before
    assert report.count(" rounded ") == 2 * sites
    fused = patched.decode(z)
    torch.testing.assert_close(fused, stock, atol=1e-5, rtol=1e-5)
    assert kinds(vae.first_stage_model) != before
    assert list(vae.first_stage_model.state_dict()) == keys
    (after,) = run(nodes["LTXKernReport"], vae=patched, after_image=fused)
    assert calls(after) == [["1", "0"]] * (2 * sites)
    # The origin takes the copy out, and its bits are those of before.
    assert torch.equal(vae.decode(z), stock)
    assert kinds(vae.first_stage_model) == before
    assert run(nodes["LTXKernReport"], vae=patched) == (after,)
    assert torch.equal(patched.decode(z), fused)
    # Weights that come only when the model is loaded are no obstacle to the trial.
    waiting = stand_in.VAE(models.Decoder(build()).to("meta"))
    assert run(nodes["LTXKernPatchVAE"], vae=waiting, policy="rounded")[1].count(" rounded ") == sites


def test_an_upscaler_is_copied_on_its_own_weights(nodes: dict[str, Any]) -> None:
    """diffusers' class has the blocks of ComfyUI's: GroupNorm with a residual before the last activation."""
    model = LTX2LatentUpsamplerModel(4, 32, num_blocks_per_stage=1, use_rational_resampler=False).eval()
    x, before = torch.randn(1, 4, 2, 4, 4), kinds(model)
    stock = model(x)
    patched, report = run(nodes["LTXKernPatchUpscaler"], upscale_model=model, policy="rounded")
    assert report.count("group_norm_silu") == 5
    torch.testing.assert_close(patched(x), stock, atol=1e-5, rtol=1e-5)
    assert (kinds(model), kinds(patched) == before) == (before, False)
    assert torch.equal(model(x), stock)
    assert all(one is other for one, other in zip(model.parameters(), patched.parameters(), strict=True))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        run(nodes["LTXKernPatchUpscaler"], upscale_model="x2", policy="rounded")


def test_copies_of_a_copy_and_what_is_left_of_them(nodes: dict[str, Any]) -> None:
    vae = stand_in.VAE(models.Decoder(models.WanBlock(4)).eval())
    z, before = torch.randn(1, 4, 3, 4, 4), kinds(vae.first_stage_model)
    stock = vae.decode(z)
    patched, _ = run(nodes["LTXKernPatchVAE"], vae=vae, policy="rounded")
    patched.decode(z)
    # A trial while another copy is loaded tells the same, and again is no more than once.
    again, report = run(nodes["LTXKernPatchVAE"], vae=patched, policy="rounded")
    assert report.count(" rounded ") == 2
    exact, report = run(nodes["LTXKernPatchVAE"], vae=again, policy="exact")
    assert "the policy is exact" in report
    assert torch.equal(exact.decode(z), stock)
    assert kinds(vae.first_stage_model) == before
    fused = again.decode(z)
    assert kinds(vae.first_stage_model) != before
    # A clone that goes takes nothing with it that comes back at the next load; when all are gone, so are the fused classes.
    del exact
    other = patched.patcher.clone()
    del other
    gc.collect()
    assert torch.equal(again.decode(z), fused)
    stand_in.loaded_models.clear()
    del again, patched
    gc.collect()
    assert kinds(vae.first_stage_model) == before


def test_a_model_is_fused_while_its_clone_samples(nodes: dict[str, Any]) -> None:
    model = patcher_of(models.UNet())
    before, noise = kinds(model.model), torch.randn(1, 4, 6, 6)
    seen: list[bool] = []

    def watch(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        seen.append(kinds(model.model) != before)
        assert (total, step) == (3, len(seen) - 1)

    (sampler,) = run(nodes["LTXKernRes2sSampler"], eta=0.25, substep_eta=0.5, anchor_refinement=True)
    stock = stand_in.CFGGuider(model).sample(noise, sampler, SIGMAS, watch, seed=3)
    assert seen == [False] * 3
    patched, report = run(nodes["LTXKernPatchModel"], model=model, policy="rounded")
    twice, _ = run(nodes["LTXKernPatchModel"], model=patched, policy="rounded")
    assert report.count(" rounded ") == 2
    assert "diffusion_model.block.in_layers.0" in report
    assert (model.wrappers, model.attachments) == ({}, {})
    for one in (patched, twice, twice.clone()):
        seen.clear()
        fused = stand_in.CFGGuider(one).sample(noise, sampler, SIGMAS, watch, seed=3)
        torch.testing.assert_close(fused, stock, atol=1e-5, rtol=1e-5)
        assert seen == [True] * 3
        assert kinds(model.model) == before
        (after,) = run(nodes["LTXKernReport"], model=one, after_latent={"samples": fused})
        assert calls(after) == [["7", "0"]] * 2
    seen.clear()
    assert torch.equal(stand_in.CFGGuider(model).sample(noise, sampler, SIGMAS, watch, seed=3), stock)
    assert seen == [False] * 3


def test_an_error_while_sampling_leaves_the_model_as_it_was(nodes: dict[str, Any]) -> None:
    model = patcher_of(models.UNet())
    before = kinds(model.model)
    patched, _ = run(nodes["LTXKernPatchModel"], model=model, policy="rounded")

    def stop(*_: Any, **__: Any) -> Tensor:
        assert kinds(model.model) != before
        raise InterruptedError

    with pytest.raises(InterruptedError):
        stand_in.CFGGuider(patched).sample(torch.randn(1, 4, 6, 6), stand_in.KSAMPLER(stop), SIGMAS)
    assert kinds(model.model) == before


def test_beside_the_object_patches_of_other_packs(nodes: dict[str, Any]) -> None:
    """A module that another node puts in the place of a site is fused once it is there, and both keep their classes."""
    model = patcher_of(models.UNet())
    other, before = models.GroupNorm(2, 4), kinds(model.model)
    changed = model.clone()
    changed.add_object_patch("diffusion_model.block.out_layers.0", other)
    patched, _ = run(nodes["LTXKernPatchModel"], model=changed, policy="rounded")
    (sampler,) = run(nodes["LTXKernRes2sSampler"], eta=0.5, substep_eta=0.5, anchor_refinement=True)
    noise = torch.randn(1, 4, 6, 6)
    stock = stand_in.CFGGuider(changed).sample(noise, sampler, SIGMAS)
    for _ in range(2):
        torch.testing.assert_close(stand_in.CFGGuider(patched).sample(noise, sampler, SIGMAS), stock)
        assert model.model.diffusion_model["block"].out_layers[0] is other
        assert (kinds(model.model), type(other)) == (before, models.GroupNorm)
    stand_in.load_models_gpu([model])
    assert model.model.diffusion_model["block"].out_layers[0] is not other


def test_the_sampler_is_ours_with_its_options_and_seed(nodes: dict[str, Any]) -> None:
    model, noise = patcher_of(models.UNet()), torch.randn(2, 4, 6, 6)
    (sampler,) = run(nodes["LTXKernRes2sSampler"], eta=0.0, substep_eta=0.25, anchor_refinement=False)
    got = stand_in.CFGGuider(model).sample(noise, sampler, SIGMAS, seed=5)
    wanted = sample_res2s_sde(
        lambda x, sigma, seed: model.model(x, sigma),
        *(noise, SIGMAS, {"seed": 5}),
        disable=True,
        eta=0.0,
        substep_eta=0.25,
        anchor_refinement=False,
    )
    assert torch.equal(got, wanted)


def test_unfit_models_are_left_alone_and_the_node_says_so(nodes: dict[str, Any]) -> None:
    cases = {
        "Transformer holds no norm that is seen to go straight into a SiLU module": models.Transformer(),
        "out_layers is taken apart in ResBlock": models.UNet(use_scale_shift_norm=True),
        "something stands between it and the activation": models.Decoder(models.VideoBlock(4, True)),
    }
    for reason, model in cases.items():
        before = kinds(model)
        patched, report = run(nodes["LTXKernPatchModel"], model=patcher_of(model), policy="rounded")
        assert reason in report
        fit = isinstance(model, models.UNet)  # its in_layers are called as a whole
        assert report.count(" rounded ") == int(fit)
        with comfyui.fuse(patched.model, comfyui.Rules(meta=True)):
            assert (kinds(model) == before) is not fit
        assert kinds(model) == before
    with pytest.raises(
        TypeError, match="expected a ModelPatcher with injections and wrappers, got object: update ComfyUI"
    ):
        run(nodes["LTXKernPatchModel"], model=object(), policy="rounded")
    with pytest.raises(TypeError, match="vae must be a VAE of ComfyUI with a patcher, got object"):
        run(nodes["LTXKernPatchVAE"], vae=object(), policy="rounded")
    with pytest.raises(ValueError, match="went through a patch node of ltxkern"):
        run(nodes["LTXKernReport"], model=patcher_of(models.UNet()))
    with pytest.raises(ValueError, match="model or vae must be connected, got neither"):
        run(nodes["LTXKernReport"])


@pytest.mark.parametrize("waits", ["nothing", "another dtype", "a LoRA", "an old ComfyUI"])
def test_weights_that_are_cast_for_each_call(
    nodes: dict[str, Any], waits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where weights do not lie as the call wants them the op gets ComfyUI's cast of them, given back afterwards."""
    block = models.ImageBlock(4).eval()
    x, temb = torch.randn(1, 4, 6, 6), torch.randn(1, 4)
    for norm in (block.norm1, block.norm2):
        norm.weight = nn.Parameter(torch.rand(4))
        if waits == "another dtype":
            norm.bfloat16().comfy_cast_weights = True
        elif waits == "a LoRA":
            norm.weight_function.append(lambda weight: weight * 2)
        elif waits == "an old ComfyUI":
            norm.comfy_cast_weights = True
    if waits == "an old ComfyUI":
        monkeypatch.delattr(sys.modules["comfy.ops"], "uncast_bias_weight")
    stock = block(x, temb.clone()), block(x)
    with comfyui.fuse(block, comfyui.Rules(meta=True)) as report:
        torch.testing.assert_close((block(x, temb.clone()), block(x)), stock)
        served = (0, 2) if waits == "an old ComfyUI" else (2, 0)
        assert [(site.calls, site.composed) for site in report.rows] == [served] * 2
    assert {getattr(norm, "casts", 0) for norm in (block.norm1, block.norm2)} == {0}
    assert torch.equal(block(x), stock[1])


def test_dtypes_and_autocast_of_the_wan_norm() -> None:
    block, x = models.WanBlock(8), torch.randn(1, 8, 3, 4, 4)
    stock = block(x)
    half = copy.deepcopy(block).bfloat16()
    half.residual[0].gamma = nn.Parameter(block.residual[0].gamma.clone())
    stock_half, stock_double = half(x.bfloat16()), copy.deepcopy(block).double()(x.double())
    with comfyui.fuse(block, comfyui.Rules()) as report, comfyui.fuse(half, comfyui.Rules()):
        torch.testing.assert_close(block(x), stock)
        torch.testing.assert_close(half(x.bfloat16()), stock_half, atol=0.05, rtol=0.05)
        torch.testing.assert_close(copy.deepcopy(block).double()(x.double()), stock_double)
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
        assert [(site.calls, site.composed) for site in report.rows] == [(1, 1)] * 2


def lora_of(model: nn.Module, rank: int, **extra: Tensor) -> dict[str, Tensor]:
    file = dict(extra)
    for key, weight in model.state_dict().items():
        if key.endswith(".weight") and weight.dim() > 1:
            name = key.removesuffix(".weight")
            file[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], rank, *(1,) * (weight.dim() - 2))
            file[f"{name}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:])
            file[f"{name}.alpha"] = torch.tensor(rank / 2)
    return file


def test_a_lora_is_merged_in_chunks_and_comes_out_again(
    nodes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patcher_of(models.UNet())
    dora = "diffusion_model.block.emb_layers.1"
    torch.save(lora_of(model.model, 2, **{f"{dora}.dora_scale": torch.tensor(2.0)}), tmp_path / "one.pt")
    weights = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    lora = sys.modules["comfy.lora"]
    patches = lora.load_lora(torch.load(tmp_path / "one.pt"), lora.model_lora_keys_unet(model.model, {}))
    theirs = model.clone()
    theirs.add_patches(patches, 0.7)
    stand_in.load_models_gpu([theirs])
    wanted = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    calls: list[torch.Size] = []

    def counted(weight: Tensor, *args: Any) -> Tensor:
        calls.append(weight.shape)
        return ltxkern.merge_lora_(weight, *args)

    monkeypatch.setattr(comfyui, "merge_lora_", counted)
    merged, report = run(nodes["LTXKernMergeLoRA"], model=model, lora_name="one.pt", strength=0.7)
    assert report.splitlines() == [
        "2 weights: ltxkern.merge_lora_ at strength 0.7, in chunks of rows",
        f"{dora}.weight: left to ComfyUI, has a DoRA scale",
    ]
    assert (model.patches, calls) == ({}, [])
    stand_in.load_models_gpu([merged])
    assert sorted(calls) == [(4, 4), (4, 36)]
    for key, weight in model.model.state_dict().items():
        torch.testing.assert_close(weight, wanted[key])
        assert torch.equal(weight, weights[key]) == (key not in merged.patches)
    stand_in.load_models_gpu([model])
    assert all(torch.equal(weight, weights[key]) for key, weight in model.model.state_dict().items())


def test_parts_of_weights_and_what_does_not_fit(nodes: dict[str, Any]) -> None:
    model = patcher_of(models.Transformer())
    key = "diffusion_model.1.weight"
    up, down, wide = torch.randn(2, 2), torch.randn(2, 4), torch.randn(4, 2)
    plain = stand_in.LoRAAdapter(set(), (up, down, None, None, None, None))
    whole = stand_in.LoRAAdapter(set(), (wide, down, 1.0, None, None, None))
    before = model.model.state_dict()[key].clone()
    patches = {
        (key, (0, 2, 2)): plain,
        (key, (0, 0, 2), lambda delta: 3 * delta): plain,
        key: whole,
        "elsewhere.weight": whole,
        "other.weight": stand_in.WeightAdapterBase(set(), ()),
    }
    merged, report = comfyui.merge_lora(model, patches, 0.5, stand_in.LoRAAdapter)
    assert report.splitlines()[0].startswith("2 weights: ")
    assert set(report.splitlines()[1:]) == {
        f"{key}: left to ComfyUI, goes through a function",
        "other.weight: left to ComfyUI, is a WeightAdapterBase, no plain LoRA",
        "elsewhere.weight: left to ComfyUI, the model has no such weight",
        "other.weight: left to ComfyUI, the model has no such weight",
    }
    stand_in.load_models_gpu([merged])
    wanted = before + 0.25 * wide @ down
    wanted[2:] += 0.5 * up @ down
    wanted[:2] += 1.5 * up @ down
    torch.testing.assert_close(model.model.state_dict()[key], wanted)
    # Shapes that do not fit are ComfyUI's to refuse.
    (adapter,) = (
        entry[1] for entry in merged.patches[key] if type(entry[1]).__name__ == "ChunkedLoRA" and entry[3] is None
    )
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        adapter.calculate_weight(torch.zeros(3, 4), key, 1.0, 1.0, None, lambda delta: delta)
