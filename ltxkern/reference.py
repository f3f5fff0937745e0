"""The torch reference of every op, under the op's public name: read these to know what the kernels compute."""

from ltxkern.ops.combine_guidance import reference as combine_guidance
from ltxkern.ops.dual_add import reference as dual_add
from ltxkern.ops.gated_residual import head_gate_reference as head_gate
from ltxkern.ops.gated_residual import residual_reference as gated_residual
from ltxkern.ops.group_norm_silu import reference as group_norm_silu
from ltxkern.ops.merge_lora import reference as merge_lora_
from ltxkern.ops.normalize_noise import channelwise_reference as channelwise_normalize
from ltxkern.ops.normalize_noise import normalize_reference as normalize_noise
from ltxkern.ops.normalize_noise import statistics_reference as noise_statistics
from ltxkern.ops.pixel_norm_silu import reference as pixel_norm_silu
from ltxkern.ops.qk_norm_rope import reference as qk_norm_rope
from ltxkern.ops.res2s import advance_reference as res2s_advance
from ltxkern.ops.res2s import midpoint_reference as res2s_midpoint
from ltxkern.ops.res2s import sde_step_reference as res2s_sde_step
from ltxkern.ops.rms_norm_modulate import gated_reference as gated_residual_rms_norm_modulate
from ltxkern.ops.rms_norm_modulate import reference as rms_norm_modulate

__all__ = [
    "channelwise_normalize",
    "combine_guidance",
    "dual_add",
    "gated_residual",
    "gated_residual_rms_norm_modulate",
    "group_norm_silu",
    "head_gate",
    "merge_lora_",
    "noise_statistics",
    "normalize_noise",
    "pixel_norm_silu",
    "qk_norm_rope",
    "res2s_advance",
    "res2s_midpoint",
    "res2s_sde_step",
    "rms_norm_modulate",
]
