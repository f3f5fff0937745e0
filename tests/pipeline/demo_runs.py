"""Small runs of the demo model, and what the tests ask of them."""

from __future__ import annotations

from typing import Any

import torch

from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.run.progress import ProgressEvent

SMALL: dict[str, Any] = {"height": 64, "width": 128, "num_frames": 9, "steps": 2}


def make(preset: str = "hq", dtype: torch.dtype = torch.float32, **settings: Any) -> HQTwoStagePipeline:
    settings = {"device": "cpu", "dtype": dtype, "preset": preset, **settings}
    return HQTwoStagePipeline.from_pretrained("demo-random", **settings)


def latents(pipe: HQTwoStagePipeline, prompt: Any = "a kite", **changes: Any) -> dict[str, torch.Tensor]:
    return pipe(prompt, **{**SMALL, "output_type": "latents", **changes}).latents


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def count_forwards(pipe: HQTwoStagePipeline, **changes: Any) -> dict[str, int]:
    """Forwards of branches by stage: a call of the transformer runs those of all its batches."""
    counts: dict[str, int] = {}
    stage = "stage 1"

    def count(_: Any, given: tuple[Any, ...]) -> None:
        counts[stage] = counts.get(stage, 0) + sum(len(batch.perturbations) for batch in given[2])

    def follow(event: ProgressEvent) -> None:
        nonlocal stage
        if event.stage.startswith("stage"):
            stage = event.stage

    handle = pipe.components.transformer.register_forward_pre_hook(count)
    try:
        latents(pipe, progress=follow, **changes)
    finally:
        handle.remove()
    return counts
