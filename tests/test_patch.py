"""Fused norms inside other stacks' models: same numbers, same keys, found where they are, undone without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltxkern.nn import GroupNormSiLU, PixelNormSiLU
from ltxkern.ops.group_norm_silu import apply_group_norm_silu
from ltxkern.patch import _depth_to_space, patch


def upsampler() -> nn.Module:
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    return LTX2LatentUpsamplerModel(
        in_channels=4, mid_channels=32, num_blocks_per_stage=2, use_rational_resampler=False
    )


def stable_diffusion_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def hunyuan_vae() -> nn.Module:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(block_out_channels=(32, 32, 64, 64), layers_per_block=1)


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    return UNet2DModel(sample_size=16, block_out_channels=(32, 64), down_block_types=down, up_block_types=up)


def sequential() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 1))


CASES: list[tuple[Any, tuple[int, ...], int]] = [
    # Each residual block fuses two norms, and the model its first one.
    (upsampler, (1, 4, 3, 6, 7), 2 * 4 + 1),
    # Encoder: 2 levels of 1 block and 2 in the middle; decoder: 2 levels of 2 and 2; both end in a norm.
    (stable_diffusion_vae, (1, 3, 16, 16), 2 * (2 + 2 + 4 + 2) + 2),
    (hunyuan_vae, (1, 3, 5, 32, 32), 2 * (4 + 2 + 8 + 2) + 2),
    (sequential, (1, 3, 5, 7), 1),
]


def call(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    return result.sample if hasattr(result, "sample") else result


@pytest.mark.parametrize(("build", "shape", "sites"), CASES, ids=[case[0].__name__ for case in CASES])
@torch.no_grad()
def test_patched_equals_plain_and_undo_restores(build: Any, shape: tuple[int, ...], sites: int) -> None:
    torch.manual_seed(0)
    model = build().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(shape)
    plain = call(model, x)
    exact_model = copy.deepcopy(model).double()
    exact = call(exact_model, x.double())
    structure, keys = str(model), list(model.state_dict())
    handle = patch(model)
    assert len(handle.sites) == sites
    assert list(model.state_dict()) == keys
    patch(exact_model)
    torch.testing.assert_close(call(exact_model, x.double()), exact, atol=1e-10, rtol=1e-10)
    # In fp32 both round, and a deep model amplifies it: the patched one may be no further from fp64 than 4 x the plain.
    assert (call(model, x) - exact).abs().max() <= 4 * (plain - exact).abs().max() + 1e-6
    assert patch(model).sites == []
    handle.undo()
    handle.undo()
    assert str(model) == structure
    assert torch.equal(call(model, x), plain)


def test_blocks_whose_activation_serves_twice_are_left_alone() -> None:
    model = unet()
    structure = str(model)
    assert patch(model).sites == []
    assert str(model) == structure


def _own_forward(norm: nn.Module) -> None:
    norm.forward = lambda x: x  # as the hooks of accelerate and diffusers are put in


UNPLAIN: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda norm: norm.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda norm: norm.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda norm: norm.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda norm: norm.register_full_backward_pre_hook(lambda *_: None),
    "own forward": _own_forward,
    "parametrised": lambda norm: nn.utils.parametrizations.weight_norm(norm, dim=None),
    "no weights": lambda norm: norm.to("meta"),
}


@pytest.mark.parametrize("change", UNPLAIN.values(), ids=UNPLAIN)
def test_norms_that_are_more_than_their_class_are_left_alone(change: Callable[[Any], Any]) -> None:
    model = sequential()
    change(model[1])
    assert patch(model).sites == []
    if not any(parameter.is_meta for parameter in model.parameters()):
        x = torch.randn(2, 8, 5, 5)
        assert torch.equal(apply_group_norm_silu(x, model[1], model[2]), model[2](model[1](x)))


@torch.no_grad()
def test_context_manager_undoes_on_error() -> None:
    model = sequential()
    structure = str(model)

    def fails() -> None:
        with patch(model):
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fails()
    assert str(model) == structure


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_group_norm_silu_module(dtype: torch.dtype) -> None:
    norm = nn.GroupNorm(4, 12).to(dtype)
    with torch.no_grad():
        norm.weight.mul_(1.5).add_(0.1)
    fused = GroupNormSiLU.sharing(norm)
    assert fused.weight is norm.weight
    x = torch.randn(2, 12, 5, 3, dtype=dtype)
    expected = torch.nn.functional.silu(norm(x))
    torch.testing.assert_close(fused(x), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_group_norm_silu_module_trains() -> None:
    norm = nn.GroupNorm(4, 12)
    x = torch.randn(2, 12, 5)
    gradients = []
    for module in (GroupNormSiLU.sharing(norm), nn.Sequential(norm, nn.SiLU())):
        norm.zero_grad()
        module(x).square().sum().backward()
        gradients.append(norm.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixel_norm_silu_module(dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 5, 3, dtype=dtype)
    expected = torch.nn.functional.silu(x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt())
    torch.testing.assert_close(PixelNormSiLU(1e-6)(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pipeline_components_run_on_the_fused_ops() -> None:
    import ltxkern.dispatch as dispatch
    from ltxkern.pipeline.files.demo import build_demo

    parts = build_demo()
    for name in ("group_norm_silu", "pixel_norm_silu"):
        dispatch._registry[name].receipts.clear()
    parts.upsampler(torch.randn(1, 16, 2, 2, 2))
    parts.video_vae.decode(torch.randn(1, 16, 2, 2, 2))
    parts.audio_vae.decode(torch.randn(1, 2, 6, 16))
    assert dispatch.served()["group_norm_silu"]
    assert dispatch.served()["pixel_norm_silu"]
    for name in ("video_vae", "audio_vae", "upsampler"):
        left = [
            kind
            for module in getattr(parts, name).modules()
            if (kind := type(module).__name__) in ("PerChannelRMSNorm", "SiLU")
        ]
        assert left.count("PerChannelRMSNorm") == 0, (name, left)


def video_vae() -> nn.Module:
    from examples.patch_vae import small_vae

    return small_vae()


FORWARDS = ("LTX2VideoResnetBlock3d", "LTX2VideoUpsampler3d", "LTX2VideoCausalConv3d")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_video_vae_pads_in_place_with_the_bits_of_its_own_forwards(dtype: torch.dtype) -> None:
    vae = video_vae().to(dtype)
    latent, pictures = torch.randn(2, 8, 3, 2, 3).to(dtype), torch.randn(1, 3, 9, 64, 32).to(dtype)
    keys, structure = list(vae.state_dict()), str(vae)

    def both() -> list[Tensor]:
        return [vae.decode(latent).sample, vae.encode(pictures).latent_dist.mean]

    with patch(vae) as handle:
        assert len(handle.sites) == 22
        assert list(vae.state_dict()) == keys
        assert patch(vae).sites == []
        joined: list[int] = []
        real = torch.concatenate
        with pytest.MonkeyPatch.context() as watch:
            watch.setattr(torch, "concatenate", lambda *args, **more: (joined.append(1), real(*args, **more))[1])
            found = both()
            # What is left stands before no fused norm: the first convolutions, and those that change the resolution.
            assert len(joined) == 2 + 4 + 4
            with torch.enable_grad():
                expected = both()
        assert len(joined) > 2 * (2 + 4 + 4)
        assert all(map(torch.equal, found, expected))
    assert str(vae) == structure


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("stride", [(2, 2, 2), (2, 1, 1), (1, 2, 2)], ids=str)
def test_depth_to_space_and_frames_keep_the_layout(stride: tuple[int, int, int], last: bool) -> None:
    """As the stacks compute it, and without gaps: what follows copies nothing."""
    t, h, w = stride
    x = torch.randn(1, 3 * t * h * w, 4, 5, 6)
    x = x.to(memory_format=torch.channels_last_3d) if last else x
    y = x.reshape(1, -1, t, h, w, 4, 5, 6).permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    found = _depth_to_space(x, stride)
    assert torch.equal(found, y[:, :, t - 1 :])
    padded = PixelNormSiLU().with_frames(found, 2, 1)
    plain = PixelNormSiLU()(found)
    assert torch.equal(padded, torch.cat((plain[:, :, :1], plain[:, :, :1], plain, plain[:, :, -1:]), 2))
    for tensor in (found, padded):
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
