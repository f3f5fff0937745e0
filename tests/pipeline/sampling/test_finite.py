"""Stages are named where they give NaN, nothing or silence; so are steps and modalities, with one host read."""

import pytest
import torch

from ltxkern.pipeline.sampling import finite
from tests.pipeline.sampling.test_host_reads import NoHostReads


def test_latent_and_audio_checks(caplog: pytest.LogCaptureFixture) -> None:
    finite.check_latents("stage 1", {"video latent": torch.randn(2, 3)})
    finite.check_audio("audio", torch.full((2, 4), 0.5))
    finite.check_audio("audio", torch.full((2, 4), -0.5))
    assert not caplog.records
    finite.check_latents("stage 1", {"video latent": torch.zeros(2, 3)})
    finite.check_audio("audio", torch.zeros(2, 4))
    assert ["constant" in caplog.records[0].message, "silent" in caplog.records[1].message] == [True, True]
    assert all("likely causes: " in record.message for record in caplog.records)
    broken = torch.tensor([1.0, float("nan"), float("inf"), 0.0])
    with pytest.raises(finite.NonFiniteError, match=r"stage 2: the audio latent has 2 non-finite of 4 .*1 NaN, 1 inf"):
        finite.check_finite("stage 2", "audio latent", broken)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_spreads(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[-2.0, 1.0], [0.5, 4.0]], dtype=dtype)
    found = finite.spreads({"a": tensor, "b": torch.tensor([float("-inf"), float("nan"), 0.0], dtype=dtype)})
    assert found["a"][:4] == (0, 0, -2.0, 4.0)
    assert found["a"].std == pytest.approx(float(tensor.double().std(correction=0)))
    assert found["b"][:2] == (1, 1)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({}, None),
        ({2: ["audio"], 3: ["audio", "video"]}, "stage 1, step 2: the audio latent is the first that is not finite"),
        ({3: ["video", "audio"]}, "stage 1, step 3: the video and the audio latents are the first"),
        ({2: ["video"]}, None),  # it healed
    ],
)
def test_the_first_step_that_is_not_finite(bad: dict[int, list[str]], words: str | None) -> None:
    watch = finite.StageWatch("stage 1")
    latents = {"video": torch.randn(1, 4, 2), "audio": torch.randn(1, 3, 2)}
    with NoHostReads():
        for done in (1, 2, 3):
            latents = {
                name: latent * float("nan") if name in bad.get(done, []) else torch.ones_like(latent) * done
                for name, latent in latents.items()
            }
            watch.after_step(done, latents)
    if words is None:
        watch.check(latents)
    else:
        with pytest.raises(finite.NonFiniteError, match=words):
            watch.check(latents)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([0.2, 0.2, 0.2], "every frame of the video is the same"),
        ([0.2, 0.2, 0.3], None),
        ([0.3, 0.2, 0.2], None),
    ],
)
def test_a_video_that_does_not_move(frames: list[float], words: str | None, caplog: pytest.LogCaptureFixture) -> None:
    watch = finite.VideoWatch("video decoding")
    picture = torch.linspace(-1, 0.5, 3 * 16 * 16).view(1, 3, 1, 16, 16)
    for frame in frames:  # a change between chunks counts as well
        watch.chunk(picture + frame)
    watch.end()
    assert [words in record.message for record in caplog.records] == ([True] if words else [])
