"""Small models of diffusers that `patch` knows, each with a call; and a count of their sites that knows nothing of `patch`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Case(NamedTuple):
    """A model of diffusers.

    Attributes:
        sites: fused ones.
        left: pairs of a norm and SiLU that are not fused, and that the report tells of.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sites: int
    left: int = 0
    run: Callable[[Any, Tensor], Any] = lambda model, x: model(x)
    seed: int = 1


def _ltx(kind: Any, **settings: Any) -> Callable[[], nn.Module]:
    flat = {"layers_per_block": (1,) * 5, "block_out_channels": (8,) * 4, "patch_size": 1, "patch_size_t": 1}
    return lambda: kind(latent_channels=8, **flat, **settings)


def _image(kind: Any, blocks: tuple[str, str], **settings: Any) -> Callable[[], nn.Module]:
    down, up = blocks
    return lambda: kind(block_out_channels=(32, 64), down_block_types=(down,) * 2, up_block_types=(up,) * 2, **settings)


def _unet(**settings: Any) -> Callable[[], nn.Module]:
    return _image(diffusers.UNet2DModel, ("DownBlock2D", "UpBlock2D"), sample_size=16, **settings)


def _chunks(kind: str, blocks: str, width: int) -> Callable[[], nn.Module]:
    types = {"down_block_types": (f"{blocks}DownBlock3D",) * 4, "up_block_types": (f"{blocks}UpBlock3D",) * 4}
    sizes = {"block_out_channels": (width,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
    return lambda: getattr(diffusers, kind)(**types, **sizes, temporal_compression_ratio=4)


def _wan(kind: Any, width: int) -> Callable[[], nn.Module]:
    sizes = {"z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    if kind is diffusers.AutoencoderKLWan:
        sizes |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return lambda: kind(base_dim=width, **sizes)


def _audio_vae() -> nn.Module:
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=8,
        output_channels=2,
        ch_mult=(1, 2),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        mel_bins=16,
    )


def _upsampler() -> nn.Module:
    return LTX2LatentUpsamplerModel(
        in_channels=4, mid_channels=32, num_blocks_per_stage=2, use_rational_resampler=False
    )


def _conditional_unet() -> nn.Module:
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), cross_attention_dim=16, layers_per_block=1, **kinds
    )


def _at_step(model: Any, x: Tensor) -> Any:
    return model(x, torch.tensor(3))


def _with_text(model: Any, x: Tensor) -> Any:
    return model(x, torch.tensor(3), torch.ones(1, 4, 16, dtype=x.dtype))


def _parts(model: Any, x: Tensor) -> Any:
    """Allegro encodes in tiles alone; its parts take any size."""
    return model.decoder(model.encoder(x)[:, :4])


def _hunyuan_video(width: int) -> Callable[[], nn.Module]:
    sizes = {"block_out_channels": (width,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    return lambda: diffusers.AutoencoderKLHunyuanVideo(**sizes)


# Sizes at which a norm goes over more than a handful of numbers: see FEW.
CASES: dict[str, Case] = {
    # A residual block holds two sites; encoders and decoders end in one.
    "LTX VAE": Case(
        _ltx(
            diffusers.AutoencoderKLLTXVideo,
            decoder_block_out_channels=(8,) * 4,
            decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
        ),
        (1, 3, 5, 16, 16),
        22,
    ),
    "LTX-2 VAE": Case(
        _ltx(
            diffusers.AutoencoderKLLTX2Video,
            decoder_block_out_channels=(16, 32, 64),
            decoder_layers_per_block=(1,) * 4,
            spatio_temporal_scaling=(True,) * 4,
            decoder_spatio_temporal_scaling=(True,) * 3,
            decoder_inject_noise=(False,) * 4,
            upsample_residual=(True,) * 3,
            upsample_factor=(2,) * 3,
        ),
        (1, 3, 9, 32, 32),
        20,
    ),
    "LTX-2 audio VAE": Case(_audio_vae, (1, 2, 13, 16), 22),
    "LTX-2 upsampler": Case(_upsampler, (1, 4, 3, 6, 7), 9),
    # The norms of its decoder take a scale and shift from the latents.
    "CogVideoX": Case(_chunks("AutoencoderKLCogVideoX", "CogVideoX", 8), (1, 3, 5, 16, 16), 13, left=21),
    "Allegro": Case(_chunks("AutoencoderKLAllegro", "Allegro", 16), (1, 3, 8, 16, 16), 114, run=_parts),
    "Mochi": Case(
        lambda: diffusers.AutoencoderKLMochi(
            latent_channels=4,
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1,) * 5,
        ),
        (1, 3, 7, 32, 32),
        21,
    ),
    "Wan": Case(_wan(diffusers.AutoencoderKLWan, 3), (1, 3, 5, 16, 16), 34),
    "QwenImage": Case(_wan(diffusers.AutoencoderKLQwenImage, 6), (1, 3, 5, 16, 16), 34),
    "HunyuanVideo": Case(_hunyuan_video(16), (1, 3, 5, 32, 32), 34),
    "HunyuanVideo-1.5": Case(
        lambda: diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(16,) * 5, layers_per_block=1
        ),
        (1, 3, 5, 32, 32),
        40,
    ),
    "Stable Diffusion VAE": Case(
        _image(diffusers.AutoencoderKL, ("DownEncoderBlock2D", "UpDecoderBlock2D")), (1, 3, 16, 16), 22
    ),
    "Stable Video Diffusion VAE": Case(
        lambda: diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2
        ),
        (2, 3, 16, 16),
        30,
        run=lambda model, x: model(x, num_frames=2),
    ),
    "UNet": Case(_unet(), (1, 3, 16, 16), 25, run=_at_step),
    # Scale and shift of the time embedding stand between the second norm and the activation that it shares with the first.
    "UNet, scale and shift": Case(_unet(resnet_time_scale_shift="scale_shift"), (1, 3, 16, 16), 1, 24, _at_step),
    "UNet with text": Case(_conditional_unet, (1, 4, 16, 16), 17, run=_with_text),
}
# Norms over 4 to 16 numbers, whose spread may be far below their mean: what a norm rounds comes out several hundred times as large.
FEW: dict[str, Case] = {
    "Mochi": CASES["Mochi"]._replace(shape=(1, 3, 7, 16, 16)),
    "HunyuanVideo": CASES["HunyuanVideo"]._replace(build=_hunyuan_video(8), shape=(1, 3, 5, 16, 16)),
}


def built(case: Case) -> nn.Module:
    """The model with norms that do something."""
    torch.manual_seed(0)
    model = case.build().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def call(case: Case, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers in every dtype."""
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(case.seed)).to(dtype)
    result = case.run(model, x)
    return result.sample if hasattr(result, "sample") else result


class Pairs(TorchDispatchMode):
    """Counts the SiLUs whose input is a norm's result, or that with nothing but arithmetic and views between."""

    NORMS = frozenset({"native_group_norm", "linalg_vector_norm", "rsqrt", "sqrt"})
    VIEWS = frozenset(
        {
            "alias",
            "expand",
            "permute",
            "select",
            "slice",
            "split",
            "squeeze",
            "transpose",
            "unbind",
            "unsqueeze",
            "view",
        }
    )
    BETWEEN = VIEWS | {
        "add",
        "cat",
        "clamp_min",
        "clone",
        "div",
        "mul",
        "native_group_norm",
        "sub",
        "_to_copy",
        "_unsafe_view",
    }

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.normed: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        flat = [part for value in args for part in (value if isinstance(value, (list, tuple)) else (value,))]
        after_norm = any(id(part) in self.normed for part in flat)
        if name in ("silu", "silu_"):
            self.count += after_norm
        elif name in self.NORMS or (name in self.BETWEEN and after_norm):
            for part in result if isinstance(result, (list, tuple)) else (result,):
                self.normed[id(part)] = part
        return result
