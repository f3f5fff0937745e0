"""Writes tiny official LTX-2.3 files for tests: the header configuration of each section, and the tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ltxkern.pipeline.files.official_names import official_name
from ltxkern.pipeline.model.components import COMPONENT_NAMES


def write_official(path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    """An official single file: `config` as JSON and the version in the header."""
    metadata = {"config": json.dumps(config), "model_version": "2.3.0"}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


# fmt: off
def audio_vae_section(
    *, ch: int, ch_mult: list[int], num_res_blocks: int, z_channels: int, mel_bins: int
) -> dict[str, Any]:
    return {
        "model": {
            "params": {
                "ddconfig": {
                    "double_z": True, "mel_bins": mel_bins, "z_channels": z_channels, "resolution": 256,
                    "downsample_time": False, "in_channels": 2, "out_ch": 2, "ch": ch, "ch_mult": ch_mult,
                    "num_res_blocks": num_res_blocks, "attn_resolutions": [], "dropout": 0.0,
                    "mid_block_add_attention": False, "norm_type": "pixel", "causality_axis": "height",
                },
                "sampling_rate": 16000,
            }
        },
        "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True}},
    }


def generator_section(
    initial: int, rates: list[int], kernels: list[int], resblock_kernels: list[int], dilations: list[list[int]]
) -> dict[str, Any]:
    """One half of the vocoder."""
    return {
        "upsample_initial_channel": initial, "resblock": "AMP1", "upsample_rates": rates,
        "resblock_kernel_sizes": resblock_kernels, "upsample_kernel_sizes": kernels,
        "resblock_dilation_sizes": dilations, "stereo": True, "use_tanh_at_final": False, "activation": "snakebeta",
        "use_bias_at_final": False,
    }


def vocoder_section(core: dict[str, Any], bwe: dict[str, Any], *, hop: int, n_fft: int, mels: int) -> dict[str, Any]:
    extension = {
        "apply_final_activation": False, "input_sampling_rate": 16000, "output_sampling_rate": 48000,
        "hop_length": hop, "n_fft": n_fft, "win_size": n_fft, "num_mels": mels,
    }
    return {"vocoder": core, "bwe": bwe | extension}


def upsampler_section(*, in_channels: int, mid_channels: int, num_blocks_per_stage: int) -> dict[str, Any]:
    return {
        "_class_name": "LatentUpsampler", "in_channels": in_channels, "mid_channels": mid_channels,
        "num_blocks_per_stage": num_blocks_per_stage, "dims": 3, "spatial_upsample": True, "temporal_upsample": False,
        "spatial_scale": 2.0, "rational_resampler": False,
    }


# Resampling stages of the published video VAE: encoder in order, decoder from output to input.
_ENCODER_STAGES = [
    ("compress_space_res", 2),
    ("compress_time_res", 2),
    ("compress_all_res", 2),
    ("compress_all_res", 1),
]
_DECODER_STAGES = [("compress_space", 2), ("compress_time", 2), ("compress_all", 1), ("compress_all", 2)]


def video_vae_section(*, latent_channels: int, base_channels: int, layers: list[int]) -> dict[str, Any]:
    def blocks(stages: list[tuple[str, int]]) -> list:
        listed: list = [["res_x", {"num_layers": layers[0]}]]
        for (kind, multiplier), count in zip(stages, layers[1:], strict=True):
            listed += [[kind, {"multiplier": multiplier}], ["res_x", {"num_layers": count}]]
        return listed

    return {
        "_class_name": "CausalVideoAutoencoder", "in_channels": 3, "out_channels": 3,
        "latent_channels": latent_channels, "encoder_blocks": blocks(_ENCODER_STAGES),
        "decoder_blocks": blocks(_DECODER_STAGES), "patch_size": 4, "causal_decoder": False,
        "timestep_conditioning": False, "decoder_base_channels": base_channels, "spatial_padding_mode": "zeros",
    }


def transformer_section(
    *, channels: int, heads: int, head_dim: int, audio_channels: int, audio_head_dim: int, layers: int,
    caption_channels: int, connector_layers: int,
) -> dict[str, Any]:
    """The section that describes the transformer and the connectors; the keys of the published header that matter."""
    return {
        "_class_name": "AVTransformer3DModel", "activation_fn": "gelu-approximate", "attention_bias": True,
        "attention_head_dim": head_dim, "num_attention_heads": heads, "cross_attention_dim": heads * head_dim,
        "caption_channels": caption_channels, "in_channels": channels, "out_channels": channels, "norm_eps": 1e-06,
        "num_layers": layers, "qk_norm": "rms_norm", "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048], "timestep_scale_multiplier": 1000,
        "av_ca_timestep_scale_multiplier": 1000.0, "audio_num_attention_heads": heads,
        "audio_attention_head_dim": audio_head_dim, "audio_out_channels": audio_channels,
        "audio_cross_attention_dim": heads * audio_head_dim, "audio_positional_embedding_max_pos": [20],
        "connector_attention_head_dim": head_dim, "connector_num_attention_heads": heads,
        "connector_num_layers": connector_layers, "connector_positional_embedding_max_pos": [4096],
        "connector_num_learnable_registers": 128, "apply_gated_attention": True,
        "connector_apply_gated_attention": True, "caption_proj_before_connector": True,
        "audio_connector_attention_head_dim": audio_head_dim, "audio_connector_num_attention_heads": heads,
        "cross_attention_adaln": True, "rope_type": "split", "frequencies_precision": "float64",
    }


PRODUCTION_SECTIONS: dict[str, Any] = {
    "transformer": transformer_section(
        channels=128, heads=32, head_dim=128, audio_channels=128, audio_head_dim=64, layers=48,
        caption_channels=3840, connector_layers=8,
    ),
    "vae": video_vae_section(latent_channels=128, base_channels=128, layers=[4, 6, 4, 2, 2]),
    "audio_vae": audio_vae_section(ch=128, ch_mult=[1, 2, 4], num_res_blocks=2, z_channels=8, mel_bins=64),
    "vocoder": vocoder_section(
        generator_section(1536, [5, 2, 2, 2, 2, 2], [11, 4, 4, 4, 4, 4], [3, 7, 11], [[1, 3, 5]] * 3),
        generator_section(512, [6, 5, 2, 2, 2], [12, 11, 4, 4, 4], [3, 7, 11], [[1, 3, 5]] * 3),
        hop=80, n_fft=512, mels=64,
    ),
}
PRODUCTION_UPSAMPLER = upsampler_section(in_channels=128, mid_channels=1024, num_blocks_per_stage=4)

DEMO_SECTIONS: dict[str, Any] = {
    "transformer": transformer_section(
        channels=16, heads=4, head_dim=16, audio_channels=32, audio_head_dim=8, layers=2,
        caption_channels=32, connector_layers=2,
    ),
    "vae": video_vae_section(latent_channels=16, base_channels=16, layers=[1] * 5),
    "audio_vae": audio_vae_section(ch=32, ch_mult=[1, 2, 4], num_res_blocks=1, z_channels=2, mel_bins=64),
    "vocoder": vocoder_section(
        generator_section(64, [5, 2, 2, 2, 2, 2], [11, 4, 4, 4, 4, 4], [3, 7, 11], [[1, 3, 5]] * 3),
        generator_section(32, [6, 5, 2, 2, 2], [12, 11, 4, 4, 4], [3, 7, 11], [[1, 3, 5]] * 3),
        hop=80, n_fft=512, mels=64,
    ),
}
DEMO_UPSAMPLER = upsampler_section(in_channels=16, mid_channels=64, num_blocks_per_stage=1)
# fmt: on


def write_official_demo(folder: Path, demo: Any) -> dict[str, Path]:
    """The demo model in official files: `checkpoint`, `upsampler` and a `text_encoder` folder with the tokenizer."""
    tensors = {}
    for component in ("transformer", "connectors", "video_vae", "audio_vae", "vocoder"):
        for name, tensor in getattr(demo, component).state_dict().items():
            tensors[official_name(component, name)] = tensor
    paths = {
        "checkpoint": write_official(folder / "ltx-demo.safetensors", tensors, DEMO_SECTIONS),
        "upsampler": write_official(folder / "ltx-demo-x2.safetensors", demo.upsampler.state_dict(), DEMO_UPSAMPLER),
        "text_encoder": folder / "gemma",
    }
    demo.text_encoder.save_pretrained(paths["text_encoder"])
    demo.tokenizer.save_pretrained(paths["text_encoder"])
    return paths


def write_diffusers_demo(folder: Path, demo: Any) -> Path:
    """The demo model in the layout of a diffusers pipeline."""
    folders = {"video_vae": "vae", "upsampler": "latent_upsampler"}
    for component in COMPONENT_NAMES:
        getattr(demo, component).save_pretrained(folder / folders.get(component, component))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LTX2Pipeline"}))
    return folder
