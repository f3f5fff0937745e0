"""ltxkern: fused kernels for diffusion video, and the exact LTX-2.3 HQ two-stage generator on top of them."""

import importlib
from typing import Any

from ltxkern import reference
from ltxkern.dispatch import Backend, BackendError, backends, capabilities, served, use_backend
from ltxkern.ops.combine_guidance import combine_guidance
from ltxkern.ops.dual_add import dual_add
from ltxkern.ops.gated_residual import gated_residual, head_gate
from ltxkern.ops.group_norm_silu import apply_group_norm_silu, group_norm_silu
from ltxkern.ops.merge_lora import merge_lora_, merge_lora_many_
from ltxkern.ops.normalize_noise import channelwise_normalize, merge_noise_statistics, noise_statistics, normalize_noise
from ltxkern.ops.pixel_norm_silu import pixel_norm_silu
from ltxkern.ops.qk_norm_rope import qk_norm_rope
from ltxkern.ops.res2s import res2s_advance, res2s_midpoint, res2s_sde_step
from ltxkern.ops.res2s_step import Res2sStep, res2s_coefficients, res2s_steps, sde_coefficients
from ltxkern.ops.rms_norm_modulate import (
    gated_residual_rms_norm_modulate,
    gated_residual_rms_norm_modulate_twice,
    rms_norm_modulate,
)
from ltxkern.patch import patch

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendError",
    "FusedLoRA",
    "Res2sStep",
    "apply_group_norm_silu",
    "backends",
    "capabilities",
    "channelwise_normalize",
    "combine_guidance",
    "dual_add",
    "fuse_lora",
    "gated_residual",
    "gated_residual_rms_norm_modulate",
    "gated_residual_rms_norm_modulate_twice",
    "group_norm_silu",
    "head_gate",
    "merge_lora_",
    "merge_lora_many_",
    "merge_noise_statistics",
    "noise_statistics",
    "normalize_noise",
    "patch",
    "pixel_norm_silu",
    "qk_norm_rope",
    "reference",
    "res2s_advance",
    "res2s_coefficients",
    "res2s_midpoint",
    "res2s_sde_step",
    "res2s_steps",
    "rms_norm_modulate",
    "sde_coefficients",
    "served",
    "use_backend",
]

# What stands above the ops is imported when it is first used.
_LATER = {"FusedLoRA": "fused_lora", "fuse_lora": "fused_lora"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.integrations.{_LATER[name]}"), name)
