"""The LTX-2.3 generators and their parts; names are imported when first used, so that one part costs only itself."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "CFGBranch": "guidance",
    "CFGPolicy": "guidance",
    "GuidanceScales": "guidance",
    "GuidedDenoiser": "guidance",
    "MultiModalPolicy": "guidance",
    "PlainCFGPolicy": "guidance",
    "SingleBranchPolicy": "guidance",
    "HQOutput": "output",
    "HQTwoStagePipeline": "hq",
    "GenerationRequest": "request",
    "ImageCondition": "conditioning",
    "TwoStageDeviceManager": "devices",
    "LoRA": "lora",
    "LoRAPhase": "lora",
    "Res2sStep": "schedule",
    "dispatch_branches": "cfg_parallel",
    "run_cfg_parallel": "cfg_parallel",
    "euler_sample": "euler",
    "euler_step": "euler",
    "ltx2_sigmas": "schedule",
    "res2s_coefficients": "schedule",
    "res2s_sample": "res2s",
    "res2s_steps": "schedule",
    "sde_coefficients": "schedule",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
