"""The nodes; what they do is in `ltxkern.integrations.comfyui` and `ltxkern.integrations.samplers`."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.samplers
import comfy.utils
import comfy.weight_adapter
import folder_paths

from ltxkern.integrations import comfyui
from ltxkern.integrations.samplers import sample_res2s_sde

Inputs = dict[str, dict[str, Any]]

POLICY = (
    ["rounded", "exact"],
    {"tooltip": "exact fuses only what gives the same bits: nothing so far, and the report says so"},
)


class PatchModel:
    """Fused ops in a model."""

    CATEGORY = "ltxkern"
    DESCRIPTION = (
        "A clone of the model that samples on fused ops. The report says what is fused and what is not, and why."
    )
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        return {"required": {"model": ("MODEL",), "policy": POLICY}}

    def patch(self, model: Any, policy: str) -> tuple[Any, str]:
        return comfyui.patch_model(model, policy)


class PatchVAE:
    """Fused ops in a VAE."""

    CATEGORY = "ltxkern"
    DESCRIPTION = "A copy of the VAE that runs on fused ops. The report says what is fused and what is not, and why."
    RETURN_TYPES = ("VAE", "STRING")
    RETURN_NAMES = ("vae", "report")
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        return {"required": {"vae": ("VAE",), "policy": POLICY}}

    def patch(self, vae: Any, policy: str) -> tuple[Any, str]:
        return comfyui.patch_vae(vae, policy)


class PatchUpscaler:
    """Fused ops in a latent upscaler."""

    CATEGORY = "ltxkern"
    DESCRIPTION = (
        "A copy of the upscaler on the same weights, with fused ops. The report says what is fused and what is not."
    )
    RETURN_TYPES = ("LATENT_UPSCALE_MODEL", "STRING")
    RETURN_NAMES = ("upscale_model", "report")
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        return {"required": {"upscale_model": ("LATENT_UPSCALE_MODEL",), "policy": POLICY}}

    def patch(self, upscale_model: Any, policy: str) -> tuple[Any, str]:
        return comfyui.patch_module(upscale_model, policy)


class Report:
    """What a patched model or VAE has done."""

    CATEGORY = "ltxkern"
    DESCRIPTION = "The report after a use, with the calls of each site. Connect what the use made as well, so that it comes first."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    FUNCTION = "report"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        return {
            "required": {},
            "optional": {"model": ("MODEL",), "vae": ("VAE",), "after_latent": ("LATENT",), "after_image": ("IMAGE",)},
        }

    def report(
        self, model: Any = None, vae: Any = None, after_latent: Any = None, after_image: Any = None
    ) -> tuple[str]:
        patchers = [model] if model is not None else []
        patchers += [vae.patcher] if vae is not None else []
        if not patchers:
            raise ValueError("model or vae must be connected, got neither")
        return ("\n\n".join(map(comfyui.report_of, patchers)),)


class Res2sSampler:
    """The sampler of LTX-2."""

    CATEGORY = "ltxkern"
    DESCRIPTION = (
        "The res2s sampler of LTX-2 for flow models: two evaluations a step, noise from the seed of the sampling node."
    )
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "sampler"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        share = {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "eta": ("FLOAT", {**share, "tooltip": "share of fresh noise at the end of a step"}),
                "substep_eta": ("FLOAT", {**share, "tooltip": "share of fresh noise between its two evaluations"}),
                "anchor_refinement": ("BOOLEAN", {"default": True}),
            }
        }

    def sampler(self, eta: float, substep_eta: float, anchor_refinement: bool) -> tuple[Any]:
        options = {"eta": eta, "substep_eta": substep_eta, "anchor_refinement": anchor_refinement}
        return (comfy.samplers.KSAMPLER(sample_res2s_sde, extra_options=options),)


class MergeLoRA:
    """A LoRA file in the weights of a model."""

    CATEGORY = "ltxkern"
    DESCRIPTION = (
        "A clone of the model with a LoRA merged in chunks of rows: no product as large as a weight, one rounding."
    )
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    FUNCTION = "merge"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
        names = folder_paths.get_filename_list("loras")
        return {"required": {"model": ("MODEL",), "lora_name": (names,), "strength": ("FLOAT", strength)}}

    def merge(self, model: Any, lora_name: str, strength: float) -> tuple[Any, str]:
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        file = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(path, safe_load=True))
        patches = comfy.lora.load_lora(file, comfy.lora.model_lora_keys_unet(model.model, {}))
        return comfyui.merge_lora(model, patches, strength, comfy.weight_adapter.LoRAAdapter)


NODE_CLASS_MAPPINGS = {
    "LTXKernPatchModel": PatchModel,
    "LTXKernPatchVAE": PatchVAE,
    "LTXKernPatchUpscaler": PatchUpscaler,
    "LTXKernReport": Report,
    "LTXKernRes2sSampler": Res2sSampler,
    "LTXKernMergeLoRA": MergeLoRA,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LTXKernPatchModel": "Fused ops: model (ltxkern)",
    "LTXKernPatchVAE": "Fused ops: VAE (ltxkern)",
    "LTXKernPatchUpscaler": "Fused ops: latent upscaler (ltxkern)",
    "LTXKernReport": "Fused ops: report (ltxkern)",
    "LTXKernRes2sSampler": "Sampler res2s (ltxkern)",
    "LTXKernMergeLoRA": "Merge LoRA in chunks (ltxkern)",
}
