"""Latents become video and sound: whole or as a stream, of the right length."""

from __future__ import annotations

import torch

from ltxkern.pipeline.generator import HQTwoStagePipeline
from tests.pipeline.demo_runs import SMALL


def test_stream_equals_video(pipeline: HQTwoStagePipeline) -> None:
    whole = pipeline("a kite", **SMALL)
    streamed = pipeline("a kite", **SMALL, output_type="stream")
    assert torch.equal(torch.cat(list(streamed.video)), whole.video)
