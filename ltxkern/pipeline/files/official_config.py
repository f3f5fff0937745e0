"""Reads the constructor arguments of diffusers' LTX-2.3 classes from the configuration in an official file's header."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

_COMPRESS = {"compress_all": "spatiotemporal", "compress_time": "temporal", "compress_space": "spatial"}


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the transformer, from the `transformer` section.

    Raises:
        ValueError: the section describes a model of another generation.
    """
    for key in ("cross_attention_adaln", "caption_proj_before_connector"):
        if not config.get(key, False):
            raise ValueError(f"not an LTX-2.3 transformer: expected {key} true in the header, got {config.get(key)!r}")
    frames, height, width = config.get("positional_embedding_max_pos", (20, 2048, 2048))
    gated = bool(config.get("apply_gated_attention", False))
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "num_attention_heads": config["num_attention_heads"],
        "attention_head_dim": config["attention_head_dim"],
        "cross_attention_dim": config["cross_attention_dim"],
        "pos_embed_max_pos": frames,
        "base_height": height,
        "base_width": width,
        "gated_attn": gated,
        "cross_attn_mod": True,
        "audio_in_channels": config.get("audio_in_channels", config["audio_out_channels"]),
        "audio_out_channels": config["audio_out_channels"],
        "audio_num_attention_heads": config["audio_num_attention_heads"],
        "audio_attention_head_dim": config["audio_attention_head_dim"],
        "audio_cross_attention_dim": config["audio_cross_attention_dim"],
        "audio_pos_embed_max_pos": config.get("audio_positional_embedding_max_pos", (20,))[0],
        "audio_gated_attn": gated,
        "audio_cross_attn_mod": True,
        "num_layers": config["num_layers"],
        "norm_eps": config.get("norm_eps", 1e-6),
        "rope_theta": config.get("positional_embedding_theta", 10000.0),
        "rope_double_precision": config.get("frequencies_precision", "float64") == "float64",
        "timestep_scale_multiplier": config.get("timestep_scale_multiplier", 1000),
        # The official default is 1, not 1000.
        "cross_attn_timestep_scale_multiplier": config.get("av_ca_timestep_scale_multiplier", 1),
        "rope_type": config.get("rope_type", "split"),
        "use_prompt_embeddings": False,
        "perturbed_attn": True,
        "ff_bias": config.get("ff_bias", True),
        "audio_ff_bias": config.get("audio_ff_bias", True),
    }


def connectors_config(config: Mapping[str, Any], text_features: int) -> dict[str, Any]:
    """Arguments of the text connectors, from the `transformer` section and the input width of the text projection."""
    channels = config["caption_channels"]
    if text_features % channels:
        raise ValueError(
            f"text projection: expected an input width that is a multiple of {channels}, got {text_features}"
        )
    video = (config["connector_num_attention_heads"], config["connector_attention_head_dim"])
    audio = (config["audio_connector_num_attention_heads"], config["audio_connector_attention_head_dim"])
    registers, layers = config["connector_num_learnable_registers"], config["connector_num_layers"]
    gated = bool(config.get("connector_apply_gated_attention", False))
    return {
        "caption_channels": channels,
        "text_proj_in_factor": text_features // channels,
        "video_connector_num_attention_heads": video[0],
        "video_connector_attention_head_dim": video[1],
        "video_connector_num_layers": layers,
        "video_connector_num_learnable_registers": registers,
        "video_gated_attn": gated,
        "audio_connector_num_attention_heads": audio[0],
        "audio_connector_attention_head_dim": audio[1],
        "audio_connector_num_layers": layers,
        "audio_connector_num_learnable_registers": registers,
        "audio_gated_attn": gated,
        "connector_rope_base_seq_len": config.get("connector_positional_embedding_max_pos", (4096,))[0],
        "rope_theta": config.get("positional_embedding_theta", 10000.0),
        "rope_double_precision": config.get("frequencies_precision", "float64") == "float64",
        "rope_type": config.get("rope_type", "split"),
        "per_modality_projections": True,
        "video_hidden_dim": prod(video),
        "audio_hidden_dim": prod(audio),
        "proj_bias": True,
    }


def _layers(blocks: Sequence[Any]) -> tuple[int, ...]:
    return tuple(settings["num_layers"] for kind, settings in blocks if kind == "res_x")


def _resamplers(blocks: Sequence[Any]) -> list[tuple[str, int]]:
    return [
        (_COMPRESS[kind.removesuffix("_res")], settings["multiplier"]) for kind, settings in blocks if kind != "res_x"
    ]


def video_vae_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the video VAE, from the `vae` section; its decoder blocks are listed from output to input."""
    latent = config["latent_channels"]
    down = _resamplers(config["encoder_blocks"])
    up = _resamplers(config["decoder_blocks"])[::-1]
    patch = config.get("patch_size", 4)
    widths, width = [], latent
    for _, factor in down:
        width *= factor
        widths.append(width)
    # The decoder ends at its base width; diffusers wants each level's width times its factor, from output to input.
    decoder_widths, width = [], config.get("decoder_base_channels", 128)
    for _, factor in reversed(up):
        width *= factor
        decoder_widths.append(width)
    padding = config.get("spatial_padding_mode", "zeros")
    return {
        "in_channels": config.get("in_channels", 3),
        "out_channels": config.get("out_channels", 3),
        "latent_channels": latent,
        "block_out_channels": tuple(widths),
        "down_block_types": ("LTX2VideoDownBlock3D",) * len(down),
        "decoder_block_out_channels": tuple(decoder_widths),
        "layers_per_block": _layers(config["encoder_blocks"]),
        "decoder_layers_per_block": _layers(config["decoder_blocks"]),
        "spatio_temporal_scaling": (True,) * len(down),
        "decoder_spatio_temporal_scaling": (True,) * len(up),
        "decoder_inject_noise": (False,) * (len(up) + 1),
        "downsample_type": tuple(kind for kind, _ in down),
        "upsample_type": tuple(kind for kind, _ in up),
        "upsample_residual": (False,) * len(up),
        "upsample_factor": tuple(factor for _, factor in reversed(up)),
        "timestep_conditioning": config.get("timestep_conditioning", False),
        "patch_size": patch,
        "patch_size_t": 1,
        "encoder_causal": True,
        "decoder_causal": config.get("causal_decoder", False),
        "encoder_spatial_padding_mode": padding,
        "decoder_spatial_padding_mode": padding,
        "spatial_compression_ratio": patch * 2 ** sum(kind != "temporal" for kind, _ in down),
        "temporal_compression_ratio": 2 ** sum(kind != "spatial" for kind, _ in down),
    }


def audio_vae_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the audio VAE, from the `audio_vae` section."""
    params = config["model"]["params"]
    shape = params["ddconfig"]
    return {
        "base_channels": shape["ch"],
        "output_channels": shape["out_ch"],
        "ch_mult": tuple(shape["ch_mult"]),
        "num_res_blocks": shape["num_res_blocks"],
        "attn_resolutions": tuple(shape["attn_resolutions"]) or None,
        "in_channels": shape["in_channels"],
        "resolution": shape["resolution"],
        "latent_channels": shape["z_channels"],
        "norm_type": shape["norm_type"],
        "causality_axis": shape["causality_axis"],
        "dropout": shape["dropout"],
        "mid_block_add_attention": shape["mid_block_add_attention"],
        "sample_rate": params["sampling_rate"],
        "mel_hop_length": config["preprocessing"]["stft"]["hop_length"],
        "is_causal": config["preprocessing"]["stft"]["causal"],
        "mel_bins": shape["mel_bins"],
        "double_z": shape["double_z"],
    }


def _generator(config: Mapping[str, Any], final_activation: str | None) -> dict[str, Any]:
    channels = 2 if config["stereo"] else 1
    for one, other in (
        ("upsample_rates", "upsample_kernel_sizes"),
        ("resblock_kernel_sizes", "resblock_dilation_sizes"),
    ):
        if len(config[one]) != len(config[other]):
            raise ValueError(f"vocoder: expected as many {one} as {other}, got {config[one]} and {config[other]}")
    return {
        "in_channels": 64 * channels,
        "hidden_channels": config["upsample_initial_channel"],
        "out_channels": channels,
        "upsample_kernel_sizes": config["upsample_kernel_sizes"],
        "upsample_factors": config["upsample_rates"],
        "resnet_kernel_sizes": config["resblock_kernel_sizes"],
        "resnet_dilations": config["resblock_dilation_sizes"],
        "act_fn": config["activation"],
        "final_act_fn": final_activation,
        "final_bias": config["use_bias_at_final"],
    }


def vocoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the vocoder with bandwidth extension, from the `vocoder` section."""
    core, bwe = config["vocoder"], config["bwe"]
    return dict(
        **_generator(core, "tanh" if core["use_tanh_at_final"] else "clamp"),
        **{
            f"bwe_{key}": value
            for key, value in _generator(bwe, "clamp" if bwe["apply_final_activation"] else None).items()
        },
        filter_length=bwe["n_fft"],
        hop_length=bwe["hop_length"],
        window_length=bwe["win_size"],
        num_mel_channels=bwe["num_mels"],
        input_sampling_rate=bwe["input_sampling_rate"],
        output_sampling_rate=bwe["output_sampling_rate"],
    )


def upsampler_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the latent upsampler, from the configuration of its own file."""
    return {
        "in_channels": config["in_channels"],
        "mid_channels": config["mid_channels"],
        "num_blocks_per_stage": config["num_blocks_per_stage"],
        "dims": config.get("dims", 3),
        "spatial_upsample": config["spatial_upsample"],
        "temporal_upsample": config["temporal_upsample"],
        "rational_spatial_scale": config.get("spatial_scale", 2.0),
        "use_rational_resampler": config.get("rational_resampler", False),
    }
