"""Names and shapes of every parameter, from a configuration alone: files are checked without importing a model class."""

from collections.abc import Callable, Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]
_STRIDES = {"spatial": 4, "temporal": 2, "spatiotemporal": 8}


def expected_shapes(component: str, config: Mapping[str, Any]) -> Shapes:
    """Shapes by diffusers name of a component's parameters and persistent buffers.

    Args:
        component: one of `BUILDABLE`.
        config: arguments of its class.

    Raises:
        ValueError: an argument is missing, or has a value that the class refuses.
    """
    unusual = next((key for key, usual in _USUAL.get(component, {}).items() if config.get(key, usual) != usual), None)
    if unusual is not None:
        # Variants that no published LTX-2.3 file has: the class itself says what they hold.
        from ltxkern.pipeline.model.components import build

        return {name: tuple(tensor.shape) for name, tensor in build(component, config).state_dict().items()}
    try:
        return _READERS[component](config)
    except KeyError as error:
        raise ValueError(f"the configuration of the {component} lacks {error}") from error
    except (TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"the configuration of the {component} has a value of the wrong kind ({error})") from error


def _weighted(shapes: Shapes, name: str, *shape: int, bias: bool = True, width: int | None = None) -> None:
    """A weight and its bias, which is as long as the first side unless `width` says otherwise."""
    shapes[f"{name}.weight"] = shape
    if bias:
        shapes[f"{name}.bias"] = (shape[0] if width is None else width,)


def _attention(
    shapes: Shapes, name: str, heads: int, inner: int, query: int, context: int, *, gated: bool, bias: bool = True
) -> None:
    for norm in ("norm_q", "norm_k"):
        shapes[f"{name}.{norm}.weight"] = (inner,)
    for projection, width in (("to_q", query), ("to_k", context), ("to_v", context)):
        _weighted(shapes, f"{name}.{projection}", inner, width, bias=bias)
    _weighted(shapes, f"{name}.to_out.0", query, inner)
    if gated:
        _weighted(shapes, f"{name}.to_gate_logits", heads, query)


def _feed_forward(shapes: Shapes, name: str, width: int, *, bias: bool = True) -> None:
    _weighted(shapes, f"{name}.net.0.proj", 4 * width, width, bias=bias)
    _weighted(shapes, f"{name}.net.2", width, 4 * width, bias=bias)


def _transformer(config: Mapping[str, Any]) -> Shapes:
    heads, audio_heads = config["num_attention_heads"], config["audio_num_attention_heads"]
    video, audio = heads * config["attention_head_dim"], audio_heads * config["audio_attention_head_dim"]
    gated, audio_gated = config.get("gated_attn", False), config.get("audio_gated_attn", False)
    shapes: Shapes = {}
    for prefix, width, other in (("", video, "a2v"), ("audio_", audio, "v2a")):
        shapes[f"{prefix}scale_shift_table"] = (2, width)
        _weighted(shapes, f"{prefix}proj_in", width, config[f"{prefix}in_channels"])
        _weighted(shapes, f"{prefix}proj_out", config[f"{prefix}out_channels"], width)
        modality = prefix.rstrip("_") or "video"
        for embedder, rows in (
            (f"{prefix}time_embed", 9),
            (f"{prefix}prompt_adaln", 2),
            (f"av_cross_attn_{modality}_scale_shift", 4),
            (f"av_cross_attn_{modality}_{other}_gate", 1),
        ):
            _weighted(shapes, f"{embedder}.emb.timestep_embedder.linear_1", width, 256)
            _weighted(shapes, f"{embedder}.emb.timestep_embedder.linear_2", width, width)
            _weighted(shapes, f"{embedder}.linear", rows * width, width)
    block: Shapes = {}
    for prefix, width in (("", video), ("audio_", audio)):
        modality = prefix.rstrip("_") or "video"
        block[f"{prefix}scale_shift_table"] = (9, width)
        block[f"{prefix}prompt_scale_shift_table"] = (2, width)
        block[f"{modality}_a2v_cross_attn_scale_shift_table"] = (5, width)
    context, audio_context = config["cross_attention_dim"], config["audio_cross_attention_dim"]
    _attention(block, "attn1", heads, video, video, video, gated=gated)
    _attention(block, "attn2", heads, video, video, context, gated=gated)
    _attention(block, "audio_attn1", audio_heads, audio, audio, audio, gated=audio_gated)
    _attention(block, "audio_attn2", audio_heads, audio, audio, audio_context, gated=audio_gated)
    _attention(block, "audio_to_video_attn", audio_heads, audio, video, audio, gated=gated)
    _attention(block, "video_to_audio_attn", audio_heads, audio, audio, video, gated=audio_gated)
    _feed_forward(block, "ff", video, bias=config.get("ff_bias", True))
    _feed_forward(block, "audio_ff", audio, bias=config.get("audio_ff_bias", True))
    for index in range(config["num_layers"]):
        shapes.update({f"transformer_blocks.{index}.{name}": shape for name, shape in block.items()})
    return shapes


def _connectors(config: Mapping[str, Any]) -> Shapes:
    shapes: Shapes = {}
    features = config["caption_channels"] * config["text_proj_in_factor"]
    for modality in ("video", "audio"):
        heads = config[f"{modality}_connector_num_attention_heads"]
        width = heads * config[f"{modality}_connector_attention_head_dim"]
        _weighted(
            shapes,
            f"{modality}_text_proj_in",
            config[f"{modality}_hidden_dim"],
            features,
            bias=config.get("proj_bias", True),
        )
        registers = config[f"{modality}_connector_num_learnable_registers"]
        shapes[f"{modality}_connector.learnable_registers"] = (registers, width)
        for index in range(config[f"{modality}_connector_num_layers"]):
            block = f"{modality}_connector.transformer_blocks.{index}"
            gated = config.get(f"{modality}_gated_attn", False)
            _attention(shapes, f"{block}.attn1", heads, width, width, width, gated=gated)
            _feed_forward(shapes, f"{block}.ff", width)
    return shapes


def _convolutions(shapes: Shapes, name: str, count: int, width: int) -> None:
    for index in range(count):
        for half in ("conv1", "conv2"):
            _weighted(shapes, f"{name}.resnets.{index}.{half}.conv", width, width, 3, 3, 3)


def _video_vae(config: Mapping[str, Any]) -> Shapes:
    latent, pixels = config["latent_channels"], config["patch_size"] ** 2
    shapes: Shapes = {"latents_mean": (latent,), "latents_std": (latent,)}
    width = latent
    _weighted(shapes, "encoder.conv_in.conv", width, config["in_channels"] * pixels, 3, 3, 3)
    *layers, middle = config["layers_per_block"]
    levels = zip(layers, config["block_out_channels"], config["downsample_type"], strict=True)
    for index, (count, wider, kind) in enumerate(levels):
        block = f"encoder.down_blocks.{index}"
        _convolutions(shapes, block, count, width)
        _weighted(shapes, f"{block}.downsamplers.0.conv.conv", wider // _STRIDES[kind], width, 3, 3, 3)
        width = wider
    _convolutions(shapes, "encoder.mid_block", middle, width)
    _weighted(shapes, "encoder.conv_out.conv", latent + 1, width, 3, 3, 3)
    # Stored from output to input, but for the kinds of upsampling.
    widths, factors = config["decoder_block_out_channels"][::-1], config["upsample_factor"][::-1]
    middle, *layers = config["decoder_layers_per_block"][::-1]
    _weighted(shapes, "decoder.conv_in.conv", widths[0], latent, 3, 3, 3)
    _convolutions(shapes, "decoder.mid_block", middle, widths[0])
    upwards = zip(layers, widths, factors, config["upsample_type"], strict=True)
    for index, (count, wider, factor, kind) in enumerate(upwards):
        block, width = f"decoder.up_blocks.{index}", wider // factor
        _weighted(shapes, f"{block}.upsamplers.0.conv.conv", wider * _STRIDES[kind] // factor, wider, 3, 3, 3)
        _convolutions(shapes, block, count, width)
    _weighted(shapes, "decoder.conv_out.conv", config["out_channels"] * pixels, width, 3, 3, 3)
    return shapes


def _audio_block(shapes: Shapes, name: str, inner: int, outer: int) -> None:
    _weighted(shapes, f"{name}.conv1.conv", outer, inner, 3, 3)
    _weighted(shapes, f"{name}.conv2.conv", outer, outer, 3, 3)
    if inner != outer:
        _weighted(shapes, f"{name}.nin_shortcut.conv", outer, inner, 1, 1)


def _audio_vae(config: Mapping[str, Any]) -> Shapes:
    base, latent, count = config["base_channels"], config["latent_channels"], config["num_res_blocks"]
    widths = [base * factor for factor in config["ch_mult"]]
    shapes: Shapes = {"latents_mean": (base,), "latents_std": (base,)}
    _weighted(shapes, "encoder.conv_in.conv", base, config["in_channels"], 3, 3)
    inner = base
    for level, width in enumerate(widths):
        for index in range(count):
            _audio_block(shapes, f"encoder.down.{level}.block.{index}", inner, width)
            inner = width
        if level < len(widths) - 1:
            _weighted(shapes, f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    _weighted(shapes, "encoder.conv_out.conv", latent * (2 if config.get("double_z", True) else 1), inner, 3, 3)
    _weighted(shapes, "decoder.conv_in.conv", inner, latent, 3, 3)
    for half in ("encoder", "decoder"):
        for index in (1, 2):
            _audio_block(shapes, f"{half}.mid.block_{index}", inner, inner)
    for level, width in reversed(list(enumerate(widths))):
        for index in range(count + 1):
            _audio_block(shapes, f"decoder.up.{level}.block.{index}", inner, width)
            inner = width
        if level:
            _weighted(shapes, f"decoder.up.{level}.upsample.conv.conv", width, width, 3, 3)
    _weighted(shapes, "decoder.conv_out.conv", config["output_channels"], inner, 3, 3)
    return shapes


def _activation(shapes: Shapes, name: str, width: int, taps: int) -> None:
    shapes.update({f"{name}.{half}.filter": (1, 1, taps) for half in ("upsample", "downsample")})
    shapes.update({f"{name}.act.{parameter}": (width,) for parameter in ("alpha", "beta")})


def _generator(shapes: Shapes, name: str, config: Mapping[str, Any], prefix: str) -> None:
    width, taps = config[f"{prefix}hidden_channels"], config.get(f"{prefix}antialias_kernel_size", 12)
    _weighted(shapes, f"{name}.conv_in", width, config[f"{prefix}in_channels"], 7)
    kernels, dilations = config[f"{prefix}resnet_kernel_sizes"], config[f"{prefix}resnet_dilations"]
    for index, size in enumerate(config[f"{prefix}upsample_kernel_sizes"]):
        _weighted(shapes, f"{name}.upsamplers.{index}", width, width // 2, size, width=width // 2)
        width //= 2
        for number, (kernel, steps) in enumerate(zip(kernels, dilations, strict=True)):
            block = f"{name}.resnets.{index * len(kernels) + number}"
            for step in range(len(steps)):
                for half in ("1", "2"):
                    _weighted(shapes, f"{block}.convs{half}.{step}", width, width, kernel)
                    _activation(shapes, f"{block}.acts{half}.{step}", width, taps)
    _activation(shapes, f"{name}.act_out", width, taps)
    _weighted(
        shapes,
        f"{name}.conv_out",
        config[f"{prefix}out_channels"],
        width,
        7,
        bias=config[f"{prefix}final_bias"],
    )


def _vocoder(config: Mapping[str, Any]) -> Shapes:
    shapes: Shapes = {}
    _generator(shapes, "vocoder", config, "")
    _generator(shapes, "bwe_generator", config, "bwe_")
    length = config["filter_length"]
    bins = length // 2 + 1
    shapes["mel_stft.mel_basis"] = (config["num_mel_channels"], bins)
    shapes.update({f"mel_stft.stft_fn.{half}_basis": (2 * bins, 1, length) for half in ("forward", "inverse")})
    return shapes


def _upsampler(config: Mapping[str, Any]) -> Shapes:
    inner, latent = config["mid_channels"], config["in_channels"]
    shapes: Shapes = {}
    _weighted(shapes, "initial_conv", inner, latent, 3, 3, 3)
    _weighted(shapes, "initial_norm", inner)
    for stage in ("res_blocks", "post_upsample_res_blocks"):
        for index in range(config["num_blocks_per_stage"]):
            for half in ("1", "2"):
                _weighted(shapes, f"{stage}.{index}.conv{half}", inner, inner, 3, 3, 3)
                _weighted(shapes, f"{stage}.{index}.norm{half}", inner)
    _weighted(shapes, "upsampler.0", 4 * inner, inner, 3, 3)
    _weighted(shapes, "final_conv", latent, inner, 3, 3, 3)
    return shapes


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "transformer": _transformer,
    "connectors": _connectors,
    "video_vae": _video_vae,
    "audio_vae": _audio_vae,
    "vocoder": _vocoder,
    "upsampler": _upsampler,
}
# Arguments that add or take away parameters, with the only value that the functions above know.
_USUAL: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        "use_prompt_embeddings": False, "cross_attn_mod": True, "audio_cross_attn_mod": True, "patch_size": 1,
        "norm_elementwise_affine": False, "attention_bias": True, "attention_out_bias": True,
    },
    "connectors": {"per_modality_projections": True},
    "video_vae": {"timestep_conditioning": False, "patch_size_t": 1},
    "audio_vae": {"mid_block_add_attention": False, "attn_resolutions": None, "norm_type": "pixel"},
    "vocoder": {
        "act_fn": "snakebeta", "bwe_act_fn": "snakebeta", "antialias": True, "bwe_antialias": True,
    },
    "upsampler": {"dims": 3, "spatial_upsample": True, "temporal_upsample": False, "use_rational_resampler": False},
}  # fmt: skip
