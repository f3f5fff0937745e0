"""Parameter names of the official LTX-2.3 files and of diffusers, one table read in both directions."""

TRANSFORMER_PREFIX = "model.diffusion_model."
LORA_PREFIX = "diffusion_model."

# Start of a key in the official file -> start of the module key. The longer prefixes come first.
_PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "connectors": (
        (TRANSFORMER_PREFIX + "video_embeddings_connector.", "video_connector."),
        (TRANSFORMER_PREFIX + "audio_embeddings_connector.", "audio_connector."),
        ("text_embedding_projection.video_aggregate_embed.", "video_text_proj_in."),
        ("text_embedding_projection.audio_aggregate_embed.", "audio_text_proj_in."),
    ),
    "transformer": ((TRANSFORMER_PREFIX, ""),),
    "video_vae": (
        ("vae.encoder.", "encoder."),
        ("vae.decoder.", "decoder."),
        ("vae.per_channel_statistics.", "per_channel_statistics."),
        ("encoder.", "encoder."),
        ("decoder.", "decoder."),
        ("per_channel_statistics.", "per_channel_statistics."),
    ),
    "audio_vae": (
        ("audio_vae.encoder.", "encoder."),
        ("audio_vae.decoder.", "decoder."),
        ("audio_vae.per_channel_statistics.", "per_channel_statistics."),
    ),
    "vocoder": (("vocoder.", ""),),
}

# Official piece <-> diffusers piece, replaced anywhere in the key.
_PIECES: dict[str, tuple[tuple[str, str], ...]] = {
    "transformer": (
        ("patchify_proj", "proj_in"),
        ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
        ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
        ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
        ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
        ("scale_shift_table_a2v_ca_video", "video_a2v_cross_attn_scale_shift_table"),
        ("scale_shift_table_a2v_ca_audio", "audio_a2v_cross_attn_scale_shift_table"),
        ("q_norm", "norm_q"),
        ("k_norm", "norm_k"),
        ("prompt_adaln_single", "prompt_adaln"),
    ),
    "connectors": (("transformer_1d_blocks", "transformer_blocks"), ("q_norm", "norm_q"), ("k_norm", "norm_k")),
    "video_vae": (("res_blocks", "resnets"),),
    "vocoder": (
        ("resblocks", "resnets"),
        ("conv_pre", "conv_in"),
        ("conv_post", "conv_out"),
        ("act_post", "act_out"),
        ("downsample.lowpass", "downsample"),
        (".ups.", ".upsamplers."),
    ),
}

_STATISTICS = (
    ("per_channel_statistics.mean-of-means", "latents_mean"),
    ("per_channel_statistics.std-of-means", "latents_std"),
)
_VIDEO_VAE_LEVELS = 4

# Official start <-> diffusers start of a module key, after the prefix; the first that matches is applied.
_STARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "transformer": (("audio_adaln_single.", "audio_time_embed."), ("adaln_single.", "time_embed.")),
    "video_vae": (
        *_STATISTICS,
        *((f"encoder.down_blocks.{2 * i}.", f"encoder.down_blocks.{i}.") for i in range(_VIDEO_VAE_LEVELS)),
        *(
            (f"encoder.down_blocks.{2 * i + 1}.", f"encoder.down_blocks.{i}.downsamplers.0.")
            for i in range(_VIDEO_VAE_LEVELS)
        ),
        (f"encoder.down_blocks.{2 * _VIDEO_VAE_LEVELS}.", "encoder.mid_block."),
        ("decoder.up_blocks.0.", "decoder.mid_block."),
        *(
            (f"decoder.up_blocks.{2 * i + 1}.", f"decoder.up_blocks.{i}.upsamplers.0.")
            for i in range(_VIDEO_VAE_LEVELS)
        ),
        *((f"decoder.up_blocks.{2 * i + 2}.", f"decoder.up_blocks.{i}.") for i in range(_VIDEO_VAE_LEVELS)),
    ),
    "audio_vae": _STATISTICS,
}


def component_of(key: str) -> str | None:
    """The component that a key of an official single file belongs to, or None for a key of none of them."""
    for component, prefixes in _PREFIXES.items():
        if key.startswith(tuple(official for official, _ in prefixes)):
            return component
    return None


def diffusers_name(component: str, key: str) -> str | None:
    """The diffusers name of an official key; None for keys that no module reads (other VAE statistics)."""
    for official, module in _PREFIXES.get(component, ()):
        if key.startswith(official):
            key = module + key.removeprefix(official)
            break
    for official, module in _STARTS.get(component, ()):
        if key.startswith(official):
            key = module + key.removeprefix(official)
            break
    for official, module in _PIECES.get(component, ()):
        key = key.replace(official, module)
    return None if key.startswith("per_channel_statistics.") else key


def official_name(component: str, name: str) -> str:
    """The key of a diffusers parameter in an official file; the inverse of `diffusers_name`."""
    for official, module in reversed(_PIECES.get(component, ())):
        name = name.replace(module, official)
    # Longest first: `up_blocks.0.upsamplers.0.` also starts with `up_blocks.0.`.
    for official, module in sorted(_STARTS.get(component, ()), key=lambda pair: -len(pair[1])):
        if name.startswith(module):
            name = official + name.removeprefix(module)
            break
    for official, module in _PREFIXES.get(component, ()):
        if name.startswith(module):
            return official + name.removeprefix(module)
    return name
