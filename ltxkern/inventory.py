"""The kernels that each op's launches may name. A build of the extension that lacks one cannot serve the op.

The names are those of `LTXK_KERNEL` in `csrc/cuda` and of `LTXK_CPU_KERNEL` in `csrc/cpu`.
"""

from __future__ import annotations

from collections.abc import Iterable


def _instances(stems: Iterable[str], arguments: Iterable[str]) -> tuple[str, ...]:
    arguments = tuple(arguments)
    return tuple(f"ltxk::{stem}<{argument}>" for stem in stems for argument in arguments)


_VECTORS = ("float, 4", "ltxk::f16, 8", "ltxk::bf16, 8")
_ACTIVATIONS = (*_VECTORS, "float, 1", "ltxk::f16, 1", "ltxk::bf16, 1")
_WIDE = ("float, 4", "float, 1", "double, 4", "double, 1")
_ROWS = ("8", "4", "1")
_CPU_ACTIVATIONS = ("f32", "f16", "bf16")
_GROUP_NORM = (
    *("group_norm_stats", "group_norm_apply", "group_norm_stats_columns", "group_norm_apply_columns"),
    "group_norm_resident",
)
_COLUMNS = ("float, 4, 8", "float, 1, 4", *(f"ltxk::{half}, {v}, 4" for half in ("f16", "bf16") for v in (8, 1)))

CUDA: dict[str, tuple[str, ...]] = {
    "group_norm_silu": (
        "ltxk::group_norm_finalize",
        *_instances(_GROUP_NORM, _ACTIVATIONS),
        *_instances(["group_norm_pipeline"], _VECTORS),
    ),
    "pixel_norm_silu": (
        *_instances(["pixel_norm_rows"], _ACTIVATIONS),
        *_instances(["pixel_norm_columns"], _COLUMNS),
    ),
    **{op: _instances([op], _WIDE) for op in ("res2s_midpoint", "res2s_advance", "res2s_sde_step")},
    **{op: _instances(["noise_measure", "noise_apply"], "41") for op in ("normalize_noise", "channelwise_normalize")},
    "noise_statistics": ("ltxk::noise_statistics", *_instances(["noise_measure"], "41")),
    "combine_guidance": _instances(["guidance_measure", "guidance_apply"], _WIDE),
    "merge_lora_": (
        "ltxk::merge_lora",
        *_instances(
            ["merge_lora_tensor_cores"],
            (f"ltxk::{half}, {steps}" for half in ("f16", "bf16") for steps in ("false", "true")),
        ),
    ),
    "dual_add": _instances(["dual_add"], (*_ACTIVATIONS, "double, 2", "double, 1")),
    **{
        op: _instances(["rms_norm_modulate_rows"], _ROWS)
        for op in ("rms_norm_modulate", "gated_residual_rms_norm_modulate")
    },
    **{op: _instances(["gated_residual_rows"], _ROWS) for op in ("gated_residual", "head_gate")},
    "qk_norm_rope": _instances(["qk_norm_rope"], _ROWS),
}

CPU: dict[str, tuple[str, ...]] = {
    **{op: tuple(f"{op}<{t}>" for t in _CPU_ACTIVATIONS) for op in ("group_norm_silu", "pixel_norm_silu")},
    **{op: (f"{op}<f32>", f"{op}<f64>") for op in ("res2s_midpoint", "res2s_advance", "res2s_sde_step")},
    **dict.fromkeys(("normalize_noise", "channelwise_normalize", "noise_statistics"), ("normalize_noise",)),
    "combine_guidance": ("combine_guidance<f32>", "combine_guidance<f64>"),
    "dual_add": tuple(f"dual_add<{t}>" for t in (*_CPU_ACTIVATIONS, "f64")),
    **dict.fromkeys(("rms_norm_modulate", "gated_residual_rms_norm_modulate"), ("rms_norm_modulate_rows",)),
    **dict.fromkeys(("gated_residual", "head_gate"), ("gated_residual_rows",)),
    "qk_norm_rope": ("qk_norm_rope",),
}
