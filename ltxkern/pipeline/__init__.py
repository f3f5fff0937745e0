"""The LTX-2.3 generators and their parts; names are imported when first used, so that one part costs only itself."""

from __future__ import annotations

import importlib
from typing import Any

from ltxkern.pipeline import moved

_HOMES = {
    "CFGBranch": "sampling.guidance",
    "CFGPolicy": "sampling.guidance",
    "GuidanceScales": "sampling.guidance",
    "GuidedDenoiser": "sampling.guidance",
    "MultiModalPolicy": "sampling.guidance",
    "PlainCFGPolicy": "sampling.guidance",
    "SingleBranchPolicy": "sampling.guidance",
    "HQOutput": "result",
    "HQTwoStagePipeline": "generator",
    "GenerationRequest": "run.request",
    "ProgressEvent": "run.progress",
    "WorkFolder": "work.folder",
    "ImageCondition": "model.conditioning",
    "TwoStageDeviceManager": "memory.manager",
    "LoRA": "files.lora",
    "LoRAPhase": "files.lora",
    "Res2sStep": "sampling.schedule",
    "dispatch_branches": "parallel.by_branch",
    "run_cfg_parallel": "parallel.by_branch",
    "euler_sample": "sampling.euler",
    "euler_step": "sampling.euler",
    "ltx2_sigmas": "sampling.schedule",
    "res2s_coefficients": "sampling.schedule",
    "res2s_sample": "sampling.res2s",
    "res2s_steps": "sampling.schedule",
    "sde_coefficients": "sampling.schedule",
}

__all__ = sorted(_HOMES)

moved.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
