"""The modules a generator is made of: how each is built, the production sizes of LTX-2.3, and the set that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ltxkern.patch import fuse
from ltxkern.patching.report import give_back
from ltxkern.patching.rules import Rules

if TYPE_CHECKING:
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
    from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE

    from ltxkern.pipeline.model.transformer import LTX2Transformer

COMPONENT_NAMES = (
    "transformer",
    "upsampler",
    "video_vae",
    "audio_vae",
    "vocoder",
    "connectors",
    "text_encoder",
    "tokenizer",
)

# fmt: off
PRODUCTION_CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "in_channels": 128, "out_channels": 128, "num_attention_heads": 32, "attention_head_dim": 128, "cross_attention_dim": 4096,
        "pos_embed_max_pos": 20, "base_height": 2048, "base_width": 2048, "gated_attn": True, "cross_attn_mod": True,
        "audio_in_channels": 128, "audio_out_channels": 128, "audio_num_attention_heads": 32, "audio_attention_head_dim": 64,
        "audio_cross_attention_dim": 2048, "audio_pos_embed_max_pos": 20, "audio_gated_attn": True, "audio_cross_attn_mod": True,
        "num_layers": 48, "norm_eps": 1e-6, "rope_theta": 10000.0, "rope_double_precision": True, "timestep_scale_multiplier": 1000,
        "cross_attn_timestep_scale_multiplier": 1000, "rope_type": "split", "use_prompt_embeddings": False, "perturbed_attn": True,
        "ff_bias": True, "audio_ff_bias": True,
    },
    "connectors": {
        "caption_channels": 3840, "text_proj_in_factor": 49, "video_connector_num_attention_heads": 32,
        "video_connector_attention_head_dim": 128, "video_connector_num_layers": 8,
        "video_connector_num_learnable_registers": 128, "video_gated_attn": True, "audio_connector_num_attention_heads": 32,
        "audio_connector_attention_head_dim": 64, "audio_connector_num_layers": 8,
        "audio_connector_num_learnable_registers": 128, "audio_gated_attn": True, "connector_rope_base_seq_len": 4096,
        "rope_theta": 10000.0, "rope_double_precision": True, "rope_type": "split", "per_modality_projections": True,
        "video_hidden_dim": 4096, "audio_hidden_dim": 2048, "proj_bias": True,
    },
    "video_vae": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 128, "block_out_channels": (256, 512, 1024, 1024),
        "down_block_types": ("LTX2VideoDownBlock3D",) * 4, "decoder_block_out_channels": (256, 512, 512, 1024),
        "layers_per_block": (4, 6, 4, 2, 2), "decoder_layers_per_block": (4, 6, 4, 2, 2),
        "spatio_temporal_scaling": (True,) * 4, "decoder_spatio_temporal_scaling": (True,) * 4,
        "decoder_inject_noise": (False,) * 5, "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"), "upsample_residual": (False,) * 4,
        "upsample_factor": (2, 2, 1, 2), "timestep_conditioning": False, "patch_size": 4, "patch_size_t": 1, "encoder_causal": True,
        "decoder_causal": False, "encoder_spatial_padding_mode": "zeros", "decoder_spatial_padding_mode": "zeros",
        "spatial_compression_ratio": 32, "temporal_compression_ratio": 8,
    },
    "audio_vae": {
        "base_channels": 128, "output_channels": 2, "ch_mult": (1, 2, 4), "num_res_blocks": 2, "attn_resolutions": None,
        "in_channels": 2, "resolution": 256, "latent_channels": 8, "norm_type": "pixel", "causality_axis": "height", "dropout": 0.0,
        "mid_block_add_attention": False, "sample_rate": 16000, "mel_hop_length": 160, "is_causal": True, "mel_bins": 64,
        "double_z": True,
    },
    "vocoder": {
        "in_channels": 128, "hidden_channels": 1536, "out_channels": 2, "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        "upsample_factors": [5, 2, 2, 2, 2, 2], "resnet_kernel_sizes": [3, 7, 11], "resnet_dilations": [[1, 3, 5]] * 3,
        "act_fn": "snakebeta", "final_act_fn": "clamp", "final_bias": False, "bwe_in_channels": 128, "bwe_hidden_channels": 512,
        "bwe_out_channels": 2, "bwe_upsample_kernel_sizes": [12, 11, 4, 4, 4], "bwe_upsample_factors": [6, 5, 2, 2, 2],
        "bwe_resnet_kernel_sizes": [3, 7, 11], "bwe_resnet_dilations": [[1, 3, 5]] * 3, "bwe_act_fn": "snakebeta",
        "bwe_final_act_fn": None, "bwe_final_bias": False, "filter_length": 512, "hop_length": 80, "window_length": 512,
        "num_mel_channels": 64, "input_sampling_rate": 16000, "output_sampling_rate": 48000,
    },
    "upsampler": {
        "in_channels": 128, "mid_channels": 1024, "num_blocks_per_stage": 4, "dims": 3, "spatial_upsample": True,
        "temporal_upsample": False, "rational_spatial_scale": 2.0, "use_rational_resampler": False,
    },
}
# fmt: on

# Names of the classes as a diffusers folder's config.json gives them; the first is the one that is built.
CLASS_NAMES: Mapping[str, tuple[str, ...]] = {
    "transformer": ("LTX2Transformer", "LTX2VideoTransformer3DModel"),
    "connectors": ("LTX2TextConnectors",),
    "video_vae": ("AutoencoderKLLTX2Video",),
    "audio_vae": ("AutoencoderKLLTX2Audio",),
    "vocoder": ("LTX2VocoderWithBWE",),
    "upsampler": ("LTX2LatentUpsamplerModel",),
}
BUILDABLE = tuple(CLASS_NAMES)
VAE_PARTS = ("encoder", "decoder")
FUSED = ("video_vae", "audio_vae", "upsampler")  # components whose norms and activations are fused


def _class_of(component: str) -> Callable[..., torch.nn.Module]:
    """The class of a component; its library, which takes many seconds to import, only now."""
    import diffusers
    from diffusers.pipelines import ltx2

    from ltxkern.pipeline.model.transformer import LTX2Transformer

    name = CLASS_NAMES[component][0]
    return LTX2Transformer if component == "transformer" else getattr(ltx2, name, None) or getattr(diffusers, name)


def build(
    component: str,
    config: Mapping[str, Any],
    *,
    parts: tuple[str, ...] = VAE_PARTS,
    device: str | torch.device = "meta",
) -> Any:
    """Builds one component, by default on the meta device: names, shapes and no memory.

    Args:
        component: one of `BUILDABLE`.
        config: arguments of the diffusers class; `PRODUCTION_CONFIGS[component]` for the published model.
        parts: which halves of a VAE to keep; the other half becomes None.
        device: where the weights lie; elsewhere than on meta they are drawn from torch's global generator.

    Returns:
        The module in eval mode, without gradients, norms and activations fused by `ltxkern.patch`.

    Raises:
        ValueError: an argument that the class does not have, or a value it refuses.
    """
    settings = dict(config)
    if component == "vocoder" and settings.get("final_act_fn") != "tanh":
        # diffusers leaves the first waveform unbounded; the official vocoder clamps it to [-1, 1].
        settings["final_act_fn"] = "clamp"
    try:
        with torch.device(device):
            module: Any = _class_of(component)(**settings)
    except TypeError as error:
        raise ValueError(f"{component}: {error}") from error
    if component == "vocoder":
        from diffusers.pipelines.ltx2.vocoder import UpSample1d

        # This filter is computed, not stored: no checkpoint fills it.
        module.resampler = UpSample1d(
            ratio=module.config.output_sampling_rate // module.config.input_sampling_rate,
            window_type="hann",
            persistent=False,
        )
    if component in ("video_vae", "audio_vae"):
        for part in VAE_PARTS:
            if part not in parts:
                setattr(module, part, None)
    if component in FUSED:
        # Weights come later where the device is meta.
        fuse(module, Rules(meta=True))
    return module.eval().requires_grad_(False)


def component_dtype(component: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype a component runs in: the vocoder is always fp32, the others take the model dtype."""
    return torch.float32 if component == "vocoder" else dtype


class ComponentSource(Protocol):
    """Where components that were not given come from."""

    def has(self, name: str) -> bool:
        """Whether the component can be loaded."""

    def load(self, name: str) -> Any:
        """The component, loaded."""

    def config(self, name: str) -> Mapping[str, Any]:
        """Its constructor arguments, without loading weights."""

    def paths(self, name: str) -> list[Path]:
        """Files and folders that it is read from."""


class Components:
    """The modules of one generator; any may be None where its stage is not run.

    A component that was not given is asked from `source` when it is first read, and kept until it is released.

    Attributes:
        built_in: name of the model that this version of the package makes them of; None where they come from elsewhere.
        exact: what is built here has no fused norm; see `run_apart`.
    """

    built_in: str | None = None
    exact: bool = False

    transformer: LTX2Transformer | None
    upsampler: LTX2LatentUpsamplerModel | None
    video_vae: AutoencoderKLLTX2Video | None
    audio_vae: AutoencoderKLLTX2Audio | None
    vocoder: LTX2VocoderWithBWE | None
    connectors: LTX2TextConnectors | None
    text_encoder: Any
    tokenizer: Any

    def __init__(self, *, source: ComponentSource | None = None, **modules: Any) -> None:
        unknown = sorted(set(modules) - set(COMPONENT_NAMES))
        if unknown:
            raise TypeError(f"components: expected names among {', '.join(COMPONENT_NAMES)}, got {', '.join(unknown)}")
        self._source = source
        for name, module in modules.items():
            setattr(self, name, module)

    def __getattr__(self, name: str) -> Any:
        # Reached only while the attribute is not set: the component has neither been given nor loaded.
        if name not in COMPONENT_NAMES:
            raise AttributeError(f"{type(self).__name__} has no component {name!r}")
        module = None if self.is_absent(name) or self._source is None else self._source.load(name)
        setattr(self, name, module)
        if self.exact:
            self._take_apart(name)
        return module

    def run_apart(self) -> None:
        """Leave VAEs and upsampler what keeps the bits of what `build` fused, now and whenever one is loaded.

        Modules that were given are as they were given.
        """
        self.exact = True
        for name in FUSED if self.built_in else ():
            self._take_apart(name)

    def _take_apart(self, name: str) -> None:
        if name in FUSED and self.is_loaded(name):
            give_back(vars(self)[name], "the policy is exact")
            fuse(vars(self)[name], Rules(exact=True))

    def is_loaded(self, name: str) -> bool:
        """Whether reading the component would give a module at once, without loading anything."""
        return vars(self).get(name) is not None

    def is_absent(self, name: str) -> bool:
        """Whether reading the component would give None; loads nothing."""
        if name in vars(self):
            return vars(self)[name] is None
        return self._source is None or not self._source.has(name)

    def require(self, stages: int, encodes_images: bool, encodes_text: bool, decodes: bool) -> None:
        """Refuses a run that needs a component which is absent.

        Raises:
            ValueError: with the names of all that are.
        """
        needed = ["transformer", *(["upsampler"] if stages == 2 else [])]
        needed += ["video_vae"] if encodes_images or decodes else []
        needed += ["audio_vae", "vocoder"] if decodes else []
        needed += ["tokenizer", "text_encoder", "connectors"] if encodes_text else []
        absent = [name for name in needed if self.is_absent(name)]
        if absent:
            raise ValueError(
                f"this run needs {', '.join(absent)}: give them to from_components, or the inputs that replace them"
            )

    def config(self, name: str) -> Mapping[str, Any] | None:
        """Constructor arguments of a component, from its module or from its file's header; None where it is absent."""
        if self.is_loaded(name):
            return vars(self)[name].config
        if self.is_absent(name) or self._source is None:
            return None
        return self._source.config(name)

    def dtype(self, name: str) -> torch.dtype | None:
        """Of a component's weights, from its module or from its source; None where neither says."""
        if self.is_loaded(name):
            return next(vars(self)[name].parameters()).dtype
        loaded = getattr(self._source, "dtype", None)
        return None if loaded is None else component_dtype(name, loaded)

    def reloadable(self, name: str) -> bool:
        """Whether a released component can be read again."""
        return self._source is not None and self._source.has(name)

    def paths(self, name: str) -> list[Path]:
        """Files and folders that a component is read from; none where it was given."""
        return [] if self._source is None else self._source.paths(name)

    def release(self, name: str) -> None:
        """Lets go of a component so that its memory can be freed; with a source, reading it again loads it again."""
        vars(self).pop(name, None)
