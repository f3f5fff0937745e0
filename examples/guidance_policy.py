"""A guidance policy of one's own: `python examples/guidance_policy.py`.

A policy says which forwards one evaluation runs and how their predictions become one. This one clips classifier-free guidance: no
element moves further from the conditional prediction than `LIMIT`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline import CFGBranch, CFGPolicy, GenerationRequest, GuidanceScales, HQTwoStagePipeline
from ltxkern.pipeline.sampling.guidance import GuidanceRequest

LIMIT = 0.5


@dataclass(frozen=True, eq=False)
class ClippedGuidance(CFGPolicy):
    """`cond + clip((cfg - 1) (cond - neg), -LIMIT, LIMIT)`, video and audio with scales of their own."""

    branches: tuple[CFGBranch, ...]
    request: GuidanceRequest

    @classmethod
    def build(
        cls, request: GuidanceRequest, positive: Mapping[str, Any], negative: Mapping[str, Any] | None = None
    ) -> ClippedGuidance:
        """Two branches; `positive` and `negative` are what the transformer takes besides latents and sigma."""
        if negative is None:
            raise ValueError("negative is needed: give negative_prompt or negative_embeddings")
        return cls((CFGBranch("cond", True, positive), CFGBranch("neg", False, {**positive, **negative})), request)

    def combine(self, predictions: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The clipped prediction of each modality."""
        cond, neg = predictions["cond"], predictions["neg"]
        guided = {}
        for name, scales in self.request.present.items():
            move = (scales.cfg - 1) * (cond[name] - neg[name])
            guided[name] = cond[name] + move.clamp(-LIMIT, LIMIT)
        return guided


def main() -> None:
    request = GenerationRequest(
        "a red kite over a winter beach",
        height=64,
        width=128,
        num_frames=9,
        steps=2,
        video_guidance=GuidanceScales(cfg=3.0),
        audio_guidance=GuidanceScales(cfg=7.0),
    )
    with HQTwoStagePipeline.from_pretrained("demo-random", device="cpu", dtype=torch.float32) as pipeline:
        result = pipeline.generate(request, guidance_policy=ClippedGuidance, output_type="latents")
    print(
        f"latents of the video {tuple(result.latents['video'].shape)}, of the sound {tuple(result.latents['audio'].shape)}"
    )


if __name__ == "__main__":
    main()
