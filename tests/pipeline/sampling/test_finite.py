"""Stages are named where they give NaN, nothing or silence."""

import pytest
import torch

from ltxkern.pipeline.sampling import finite


def test_latent_and_audio_checks(caplog: pytest.LogCaptureFixture) -> None:
    finite.check_latent("stage 1", "video latent", torch.randn(2, 3))
    finite.check_audio("audio", torch.full((2, 4), 0.5))
    assert not caplog.records
    finite.check_latent("stage 1", "video latent", torch.zeros(2, 3))
    finite.check_audio("audio", torch.zeros(2, 4))
    assert ["constant" in caplog.records[0].message, "silent" in caplog.records[1].message] == [True, True]
    broken = torch.tensor([1.0, float("nan"), float("inf"), 0.0])
    with pytest.raises(finite.NonFiniteError, match=r"stage 2: the audio latent has 2 non-finite of 4 .*1 NaN, 1 inf"):
        finite.check_finite("stage 2", "audio latent", broken)
