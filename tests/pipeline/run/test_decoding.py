"""Decoding after a run: sound beside pictures, and looked at only when those are on their way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.model.decode import decode_audio
from ltxkern.pipeline.run import decoding
from ltxkern.pipeline.sampling import finite
from tests.pipeline.demo_runs import SMALL


@pytest.mark.parametrize("output_type", ["video", "stream"])
def test_nothing_waits_for_the_sound_before_the_first_pictures(
    pipeline: HQTwoStagePipeline, output_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def noting(name: str, real: Any) -> Any:
        return lambda *args, **more: (events.append(name), real(*args, **more))[1]

    monkeypatch.setattr(decoding, "decode_audio", noting("sound", decode_audio))
    monkeypatch.setattr(finite, "check_audio", noting("look at the sound", finite.check_audio))
    monkeypatch.setattr(finite.VideoWatch, "chunk", noting("look", finite.VideoWatch.chunk))
    monkeypatch.setattr(finite, "spreads", noting("read", finite.spreads))
    run = pipeline("a kite", **SMALL, output_type=output_type)
    begun = events.index("sound")
    # The pictures' own look comes when they are there; the last is that of the sound.
    assert events[begun:] == ["sound", "look", "look at the sound", "read"]
    pictures = run.video if output_type == "video" else torch.cat(list(run.video))
    assert len(pictures) == SMALL["num_frames"]
    assert events[begun:].count("sound") == 1


def test_broken_sound_is_refused(pipeline: HQTwoStagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode_audio", lambda *_, **__: torch.full((2, 9), torch.nan))
    with pytest.raises(finite.NonFiniteError, match="audio decoding: the waveform has"):
        pipeline("a kite", **SMALL)
