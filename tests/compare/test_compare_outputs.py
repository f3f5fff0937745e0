"""Tests of the parity scores: known values, files of our own, and the errors of files that do not fit."""

import json
import math

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ltxkern.cli import main
from ltxkern.compare import compare_outputs, psnr, signal_score, ssim


def write_clip(path, frames, audio=None):
    """A small lossless-as-can-be mp4: frames (F, H, W, 3) uint8, audio (2, samples) fp32 or None."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=24)
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        video.options = {"crf": "1"}
        sound = container.add_stream("aac", rate=48000) if audio is not None else None
        for frame in frames:
            for packet in video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in video.encode():
            container.mux(packet)
        if sound is not None:
            block = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio), format="fltp", layout="stereo")
            block.sample_rate = 48000
            for packet in [*sound.encode(block), *sound.encode()]:
                container.mux(packet)


def smooth_frames(count=3, height=48, width=64):
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.stack([np.sin(x / 7 + f), np.cos(y / 5 + f), np.sin((x + y) / 9)], -1) for f in range(count)]
    return ((np.stack(waves) * 0.4 + 0.5) * 255).astype(np.uint8)


def test_psnr_of_a_constant_offset():
    a = torch.full((3, 16, 16), 0.5)
    assert psnr(a, a + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert psnr(a, a) == math.inf


def test_ssim_of_constants_has_its_closed_form():
    a, b = torch.full((3, 20, 23), 0.3), torch.full((3, 20, 23), 0.6)
    expected = (2 * 0.3 * 0.6 + 1e-4) / (0.3**2 + 0.6**2 + 1e-4)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-3)
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-6)


def test_ssim_against_a_direct_window_sum():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 13, 12, generator=generator, dtype=torch.float64)
    b = (a + 0.1 * torch.randn(1, 13, 12, generator=generator, dtype=torch.float64)).clamp(0, 1)
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = line[:, None] * line[None, :]
    window /= window.sum()
    values = []
    for top in range(3):
        for left in range(2):
            x, y = a[0, top : top + 11, left : left + 11], b[0, top : top + 11, left : left + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b) == pytest.approx(float(torch.stack(values).mean()), abs=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (11, 11), (12, 31)])
def test_ssim_works_on_small_frames(size):
    frame = torch.rand(3, *size)
    assert ssim(frame, frame) == pytest.approx(1.0, abs=1e-5)


def test_signal_score():
    a = torch.tensor([3.0, 4.0])
    score = signal_score(a, torch.tensor([3.0, 3.0]))
    assert score.relative_l2 == pytest.approx(0.2)
    assert score.max_abs == pytest.approx(1.0)
    assert score.cosine == pytest.approx(21 / (5 * math.sqrt(18)))
    assert signal_score(torch.zeros(4), torch.zeros(4)).relative_l2 == 0.0
    assert signal_score(torch.zeros(4), a.repeat(2)).relative_l2 == math.inf


def test_same_clip_is_identical_and_a_changed_frame_shows(tmp_path):
    frames = smooth_frames()
    audio = np.sin(np.arange(2 * 6000).reshape(2, 6000) / 30).astype(np.float32) * 0.5
    write_clip(tmp_path / "a.mp4", frames, audio)
    write_clip(tmp_path / "same.mp4", frames, audio)
    changed = frames.copy()
    changed[1] = np.clip(changed[1].astype(int) + 40, 0, 255)
    write_clip(tmp_path / "changed.mp4", changed, 0.5 * audio)
    same = compare_outputs(tmp_path / "a.mp4", tmp_path / "same.mp4")
    assert [score.psnr for score in same.frames] == [math.inf] * 3
    assert same.audio is not None
    assert same.audio.relative_l2 == 0.0
    moved = compare_outputs(tmp_path / "a.mp4", tmp_path / "changed.mp4")
    assert moved.frames[1].psnr < 20 < moved.frames[0].psnr
    assert moved.frames[1].ssim < moved.frames[0].ssim
    assert moved.audio is not None
    assert moved.audio.relative_l2 == pytest.approx(0.5, abs=0.02)
    assert moved.audio.cosine == pytest.approx(1.0, abs=1e-2)
    read_back = json.loads(moved.to_json())
    assert read_back["summary"]["psnr_worst"] == pytest.approx(moved.frames[1].psnr)
    assert json.loads(same.to_json())["frames"][0]["psnr"] == "inf"
    assert "PSNR" in moved.table()
    assert "audio" in moved.table()


def test_latents_are_scored_per_tensor_and_frame(tmp_path):
    video, audio = torch.randn(1, 8, 3, 2, 2), torch.randn(1, 8, 5, 4)
    other = video.clone()
    other[:, :, 2] *= 1.1
    save_file({"video": video, "audio": audio}, tmp_path / "a.safetensors")
    save_file({"video": other, "audio": audio}, tmp_path / "b.safetensors")
    result = compare_outputs(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert result.latents["audio"].relative_l2 == 0.0
    assert result.latents["video frame 0"].relative_l2 == 0.0
    assert result.latents["video frame 2"].relative_l2 == pytest.approx(0.1, abs=1e-6)
    assert "video frame 2" in result.table()


def test_files_that_do_not_fit_are_refused(tmp_path):
    write_clip(tmp_path / "three.mp4", smooth_frames(3))
    write_clip(tmp_path / "two.mp4", smooth_frames(2))
    write_clip(tmp_path / "wide.mp4", smooth_frames(3, width=80))
    write_clip(tmp_path / "loud.mp4", smooth_frames(3), np.zeros((2, 4000), np.float32))
    save_file({"video": torch.zeros(1, 2, 1, 1, 1)}, tmp_path / "a.safetensors")
    save_file({"video": torch.full((1, 2, 1, 1, 1), math.nan)}, tmp_path / "nan.safetensors")
    save_file({"audio": torch.zeros(1)}, tmp_path / "audio.safetensors")
    for first, second, words in (
        ("three.mp4", "two.mp4", "has 2 frames"),
        ("three.mp4", "wide.mp4", "64x48"),
        ("three.mp4", "loud.mp4", "has no audio"),
        ("three.mp4", "a.safetensors", "two .mp4 or two .safetensors"),
        ("a.safetensors", "nan.safetensors", "not finite"),
        ("a.safetensors", "audio.safetensors", "same keys"),
    ):
        with pytest.raises(ValueError, match=words):
            compare_outputs(tmp_path / first, tmp_path / second)
    with pytest.raises(FileNotFoundError):
        compare_outputs(tmp_path / "three.mp4", tmp_path / "missing.mp4")


def test_damaged_files_are_named_in_one_sentence(tmp_path):
    write_clip(tmp_path / "a.mp4", smooth_frames(12), np.zeros((2, 4000), np.float32))
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("hello")
    # The index of packets is whole, the pictures it points to are not.
    start = whole.index(b"mdat") + 4
    (tmp_path / "spoiled.mp4").write_bytes(whole[:start] + bytes(len(whole[start:-2000])) + whole[-2000:])
    save_file({"video": torch.zeros(1, 2, 1, 1, 1)}, tmp_path / "a.safetensors")
    latents = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(latents[:-3])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for first, second, words in (
        ("a.mp4", "cut.mp4", "cut.mp4 is no mp4 that can be read"),
        ("a.mp4", "text.mp4", "text.mp4 is no mp4 that can be read"),
        ("spoiled.mp4", "a.mp4", "spoiled.mp4"),
        ("a.safetensors", "cut.safetensors", "cut.safetensors cannot be read as safetensors"),
        ("empty.safetensors", "a.safetensors", "empty.safetensors cannot be read as safetensors"),
    ):
        with pytest.raises(ValueError, match=words):
            compare_outputs(tmp_path / first, tmp_path / second)


def test_pictures_can_be_compared_where_only_one_file_has_sound(tmp_path, capsys):
    write_clip(tmp_path / "quiet.mp4", smooth_frames(2))
    write_clip(tmp_path / "loud.mp4", smooth_frames(2), np.zeros((2, 4000), np.float32))
    arguments = ["compare", str(tmp_path / "quiet.mp4"), str(tmp_path / "loud.mp4")]
    assert main(arguments) == 2
    assert "--no-audio" in capsys.readouterr().err
    assert main([*arguments, "--no-audio", "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert [frame["psnr"] for frame in result["frames"]] == ["inf", "inf"]
    assert result["audio"] is None
    assert "audio: left out as asked for" in result["notes"]
