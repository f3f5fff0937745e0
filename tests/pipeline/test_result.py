"""What a generation gives, on disk: mp4, latents, frames."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.results.probe import probe_mp4
from tests.pipeline.demo_runs import SMALL, same


def test_same_seed_same_bytes(pipeline: HQTwoStagePipeline, tmp_path: Path) -> None:
    files = []
    for name in ("first.mp4", "second.mp4"):
        output = pipeline("a kite", **SMALL)
        files.append((output.latents, output.save(tmp_path / name).read_bytes()))
    assert same(files[0][0], files[1][0])
    assert files[0][1] == files[1][1]


def test_output_shapes_and_waveform_length(pipeline: HQTwoStagePipeline, tmp_path: Path) -> None:
    output = pipeline("a kite", height=64, width=128, num_frames=17, steps=2, frame_rate=25.0)
    assert output.video.shape == (17, 64, 128, 3)
    assert 0 <= float(output.video.min()) <= float(output.video.max()) <= 1
    assert output.audio.shape == (2, 480 * (4 * round(25 * 17 / 25.0) - 3))
    assert output.latents["video"].shape == (1, 16, 3, 2, 4)
    info = probe_mp4(output.save(tmp_path / "out.mp4"))
    assert (info.frames, info.height, info.width, float(info.fps)) == (17, 64, 128, 25.0)
    assert (info.audio_rate, info.channels) == (48000, 2)


def test_latents_and_frames_on_disk(pipeline: HQTwoStagePipeline, tmp_path: Path) -> None:
    output = pipeline("a kite", **SMALL)
    stored = load_file(output.save(tmp_path / "out.safetensors"))
    assert torch.equal(stored["video"], output.latents["video"])
    assert torch.equal(stored["audio"], output.latents["stage1_audio"])
    assert set(stored) == {"video", "audio"}
    folder = output.save(tmp_path / "frames")
    assert len(list(folder.glob("*.png"))) == 9
    assert len(list(folder.glob("*.wav"))) == 1


def test_stream_equals_video(pipeline: HQTwoStagePipeline) -> None:
    whole = pipeline("a kite", **SMALL)
    streamed = pipeline("a kite", **SMALL, output_type="stream")
    assert torch.equal(torch.cat(list(streamed.video)), whole.video)
