"""Sizes of the trained demo model: the sections of its file's header, and what the loaders read from them."""

from __future__ import annotations

from typing import Any

from ltxkern.pipeline.files.official_config import (
    audio_vae_config,
    connectors_config,
    transformer_config,
    upsampler_config,
    video_vae_config,
    vocoder_config,
)

TEXT_WIDTH, TEXT_LAYERS, TEXT_TOKENS = 32, 2, 32

# fmt: off
_CORE = {
    "upsample_initial_channel": 128, "resblock": "AMP1", "upsample_rates": [5, 4, 4, 2], "upsample_kernel_sizes": [11, 8, 8, 4],
    "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]], "stereo": True, "use_tanh_at_final": False,
    "activation": "snakebeta", "use_bias_at_final": False,
}
SECTIONS: dict[str, Any] = {
    "transformer": {
        "_class_name": "AVTransformer3DModel", "activation_fn": "gelu-approximate", "attention_bias": True,
        "attention_head_dim": 32, "num_attention_heads": 4, "cross_attention_dim": 128, "caption_channels": TEXT_WIDTH,
        "in_channels": 32, "out_channels": 32, "norm_eps": 1e-06, "num_layers": 4, "qk_norm": "rms_norm",
        "positional_embedding_theta": 100.0, "positional_embedding_max_pos": [20, 2048, 2048],
        "timestep_scale_multiplier": 1000, "av_ca_timestep_scale_multiplier": 1000.0, "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 16, "audio_out_channels": 16, "audio_cross_attention_dim": 64,
        "audio_positional_embedding_max_pos": [20], "connector_attention_head_dim": 32,
        "connector_num_attention_heads": 4, "connector_num_layers": 1,
        "connector_positional_embedding_max_pos": [TEXT_TOKENS], "connector_num_learnable_registers": TEXT_TOKENS,
        "apply_gated_attention": True, "connector_apply_gated_attention": True, "caption_proj_before_connector": True,
        "audio_connector_attention_head_dim": 16, "audio_connector_num_attention_heads": 4,
        "cross_attention_adaln": True, "rope_type": "split", "frequencies_precision": "float64",
    },
    "vae": {
        "_class_name": "CausalVideoAutoencoder", "in_channels": 3, "out_channels": 3, "latent_channels": 32,
        "encoder_blocks": [
            ["res_x", {"num_layers": 0}], ["compress_space_res", {"multiplier": 1}],
            ["res_x", {"num_layers": 1}], ["compress_time_res", {"multiplier": 1}],
            ["res_x", {"num_layers": 1}], ["compress_all_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 1}], ["compress_all_res", {"multiplier": 1}],
            ["res_x", {"num_layers": 1}],
        ],
        "decoder_blocks": [
            ["res_x", {"num_layers": 1}], ["compress_space", {"multiplier": 1}],
            ["res_x", {"num_layers": 1}], ["compress_time", {"multiplier": 1}],
            ["res_x", {"num_layers": 2}], ["compress_all", {"multiplier": 1}],
            ["res_x", {"num_layers": 2}], ["compress_all", {"multiplier": 2}],
            ["res_x", {"num_layers": 2}],
        ],
        "patch_size": 4, "causal_decoder": False, "timestep_conditioning": False, "decoder_base_channels": 32,
        "spatial_padding_mode": "zeros",
    },
    "audio_vae": {
        "model": {"params": {
            "ddconfig": {
                "double_z": True, "mel_bins": 64, "z_channels": 1, "resolution": 256, "downsample_time": False,
                "in_channels": 2, "out_ch": 2, "ch": 16, "ch_mult": [1, 2, 4], "num_res_blocks": 1,
                "attn_resolutions": [], "dropout": 0.0, "mid_block_add_attention": False, "norm_type": "pixel",
                "causality_axis": "height",
            },
            "sampling_rate": 16000,
        }},
        "preprocessing": {
            "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
            "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
        },
    },
    "vocoder": {
        "vocoder": _CORE,
        "bwe": _CORE | {
            "upsample_initial_channel": 32, "upsample_rates": [6, 5, 2, 2, 2], "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "apply_final_activation": False, "input_sampling_rate": 16000, "output_sampling_rate": 48000,
            "hop_length": 80, "n_fft": 256, "win_size": 256, "num_mels": 64,
        },
    },
}
UPSAMPLER: dict[str, Any] = {
    "_class_name": "LatentUpsampler", "in_channels": 32, "mid_channels": 32, "num_blocks_per_stage": 1, "dims": 3,
    "spatial_upsample": True, "temporal_upsample": False, "spatial_scale": 2.0, "rational_resampler": False,
}
# fmt: on

CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": transformer_config(SECTIONS["transformer"]),
    "connectors": connectors_config(SECTIONS["transformer"], TEXT_WIDTH * (TEXT_LAYERS + 1)),
    "video_vae": video_vae_config(SECTIONS["vae"]),
    "audio_vae": audio_vae_config(SECTIONS["audio_vae"]),
    "vocoder": vocoder_config(SECTIONS["vocoder"]),
    "upsampler": upsampler_config(UPSAMPLER),
}


def plain(component: str) -> Any:
    """A component with fresh weights, in training mode, without fused ops, whose gradients would compute everything twice."""
    import diffusers
    from diffusers.pipelines import ltx2

    from ltxkern.pipeline.model.components import CLASS_NAMES

    name = CLASS_NAMES[component][-1]
    made = getattr(ltx2, name, None) or getattr(diffusers, name)
    return made(**CONFIGS[component])
