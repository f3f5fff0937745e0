"""`ltxkern generate` as a user types it: outputs, options that reach the run, what is refused."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ltxkern import dispatch
from ltxkern.cli import main
from ltxkern.commands import progress
from ltxkern.pipeline import HQTwoStagePipeline
from ltxkern.pipeline.files import checkpoint
from ltxkern.pipeline.files import found as found_model
from ltxkern.pipeline.files.demo import build_demo, demo_lora
from ltxkern.pipeline.results.probe import probe_mp4
from ltxkern.trust import backends, permitted
from tests.commands.typed import MODEL, refused, run
from tests.official_files import write_diffusers_demo, write_official_demo


def test_mp4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.mp4"
    assert run("-o", str(path)) == 0
    captured = capsys.readouterr()
    assert captured.out.strip().splitlines()[-1] == str(path)
    assert "random weights" in captured.err
    info = probe_mp4(path)
    assert (info.frames, info.width, info.height, float(info.fps)) == (9, 128, 64, 24.0)
    assert (info.audio_rate, info.channels) == (48000, 2)
    assert list(tmp_path.iterdir()) == [path]


def test_latents_and_frames(tmp_path: Path) -> None:
    assert run("-o", str(tmp_path / "out.safetensors")) == 0
    assert set(load_file(tmp_path / "out.safetensors")) == {"video", "audio"}
    assert run("-o", str(tmp_path / "frames")) == 0
    assert len(list((tmp_path / "frames").glob("*.png"))) == 9


def test_options_reach_the_run(tmp_path: Path) -> None:
    picture = tmp_path / "first.png"
    Image.fromarray(np.full((64, 128, 3), 90, dtype=np.uint8)).save(picture)
    base, changed = tmp_path / "base.safetensors", tmp_path / "changed.safetensors"
    assert run("-o", str(base)) == 0
    seen = [load_file(base)["video"]]
    for options in (
        ["--seed", "11"],
        ["--negative-prompt", "rain"],
        ["--image", f"{picture}:0:0.9"],
        ["--image", f"{picture}:0:0.9", "--image-crf", "0"],
        ["--video-cfg-scale", "2"],
        ["--video-stg-scale", "1", "--video-stg-blocks", "0,1"],
        ["--distilled-strength-stage-2", "0.75"],
        ["--eta", "0.25"],
        ["--substep-eta", "0"],
        ["--dtype", "bf16"],
    ):
        assert run("-o", str(changed), *options) == 0
        video = load_file(changed)["video"].float()
        assert all(not torch.equal(video, other) for other in seen), options
        seen.append(video)


def test_backend_is_honoured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    options = ("--backend", "torch", "--attention", "math")
    with caplog.at_level("INFO", logger="ltxkern"):
        assert run("-o", str(tmp_path / "out.safetensors"), *options) == 0
    assert "attention is computed by math on cpu" in caplog.messages
    capsys.readouterr()
    assert "unknown backend 'fast'" in refused(capsys, "--backend", "fast", "-o", str(tmp_path / "o.mp4"))
    if not torch.cuda.is_available():
        assert "cannot run here" in refused(capsys, "--backend", "cuda", "-o", str(tmp_path / "o.mp4"))


def test_dry_run_prints_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "1088", "--width", "1920", "--num-frames", "121"]
    assert main(["generate", "--prompt", "a", *MODEL, *size, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "stage 1: 544x960, res2s, 15 steps" in text
    assert "8160 tokens" in text
    assert "31 evaluations x 3 branches = 93 forwards" in text
    assert "7 evaluations x 1 branches = 7 forwards" in text
    assert "0.909375 0.725 0.421875 0" in text
    assert "unknown suffix '.mov'" in refused(capsys, "--dry-run", "-o", "nowhere/a.mov")


def test_the_output_is_judged_with_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-o", f"{tmp_path}/nowhere/a.mp4", "--image", "~nobody-of-this-name/a.png", "--height", "100") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 4
    for part in ("3 problems", "--output: output", "nowhere' does not exist", "--image: image '~nobody", "height 100"):
        assert part in said


def test_the_distilled_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--prompt", "a kite", *MODEL, "--height", "64", "--width", "128", "--num-frames", "9", "--quiet"]
    for pipeline, samplers in (
        ("distilled", ["euler-ancestral, 8", "euler, 3"]),
        ("one-stage-distilled", ["euler-ancestral, 8"]),
    ):
        assert main(["generate", "--pipeline", pipeline, *size, "--dry-run"]) == 0
        text = capsys.readouterr().out
        assert [line for line in text.splitlines() if line.startswith("stage")] == [
            f"stage {number}: {side}x{2 * side}, {sampler} steps"
            for number, (side, sampler) in enumerate(zip((64 // len(samplers), 64), samplers, strict=False), 1)
        ]
        assert "8 evaluations x 1 branches = 8 forwards" in text
        output = tmp_path / f"{pipeline}.safetensors"
        assert main(["generate", "--pipeline", pipeline, *size, "--device", "cpu", "-o", str(output)]) == 0
        assert load_file(output)["video"].isfinite().all()
    capsys.readouterr()
    assert "steps must be 8 with pipeline distilled" in refused(capsys, "--pipeline", "distilled")


def test_a_checkpoint_that_does_not_fit_its_pipeline_is_told_early(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint_file = write_official_demo(tmp_path, build_demo())["checkpoint"]
    for name, pipeline, warned in (
        ("dev", "distilled", True),
        ("distilled", "hq", True),
        ("distilled", "distilled", False),
    ):
        checkpoint_file = checkpoint_file.rename(tmp_path / f"ltx-2.3-{name}.safetensors")
        caplog.clear()
        assert (
            main(["generate", "--prompt", "a", "--model", str(checkpoint_file), "--pipeline", pipeline, "--dry-run"])
            == 0
        )
        assert len(caplog.messages) == warned


def test_a_model_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the request, the memory plan and the loader take what was found."""
    demo = build_demo()
    folder = write_diffusers_demo(tmp_path / "model", demo)
    lora = tmp_path / "distilled.safetensors"
    save_file(demo_lora(), lora)
    found: list[object] = []
    real = checkpoint.find_model

    def find_model(path: object, **parts: object) -> object:
        found.append(path)
        return real(path, **parts)

    for module in (checkpoint, found_model):
        monkeypatch.setattr(module, "find_model", find_model)
    options = ["--model", str(folder), "--distilled-lora", str(lora), "--dtype", "fp32", "--device", "cpu"]
    output = tmp_path / "out.safetensors"
    assert run(*options, "--embedding-cache", "off", "-o", str(output)) == 0
    assert found == [str(folder)]
    base = tmp_path / "base.safetensors"
    assert run("-o", str(base), "--dtype", "fp32", "--device", "cpu") == 0
    torch.testing.assert_close(load_file(output)["video"], load_file(base)["video"], atol=1e-4, rtol=1e-4)


def test_a_full_disk_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(HQTwoStagePipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model was opened"))
    for name in ("out.mp4", "out.safetensors", "frames"):
        assert "make room or name another folder" in refused(capsys, "-o", str(tmp_path / name))


def test_json_lines_and_previews(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, seen = tmp_path / "a.mp4", tmp_path / "seen"
    shown = ("--progress", "json", "--preview", str(seen), "--preview-every", "2")
    assert run("-o", str(output), "--no-work-dir", *shown) == 0
    said = capsys.readouterr()
    *events, last = map(json.loads, said.out.splitlines())
    assert last == {"output": str(output)}
    assert {tuple(event) for event in events} == {("stage", "done", "total", "seconds", "remaining")}
    steps = [(event["stage"], event["done"], event["total"]) for event in events]
    assert [step for step in steps if step[0] == "stage 1"] == [("stage 1", done, 3) for done in range(4)]
    assert steps[-1] == ("writing", 9, 9)
    assert "%|" not in said.err  # no bar
    assert [path.name for path in sorted(seen.iterdir())][:2] == ["stage-1-step-002.png", "stage-1-step-003.png"]
    assert "got 0: use 1" in refused(capsys, "--preview-every", "0")
    assert "progress must be one of bars, json, got 'xml'" in refused(capsys, "--progress", "xml")


def test_progress_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys.stdout, "write", closed)
    with pytest.raises(BrokenPipeError, match="nobody reads the progress on standard output any more"):
        progress._line({})


def test_one_error_has_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables, options, sizes, files and the place of the result, before the note that a demo begins with."""
    variables = {
        "LTXKERN_BACKEND": "LTXKERN_BACKEND: unknown backend 'on'",
        "LTXKERN_DISABLE": "LTXKERN_DISABLE=on: unknown backend 'on'",
        "LTXKERN_SELFCHECK": "LTXKERN_SELFCHECK=on: expected first",
        "LTXKERN_DECODER_LAYOUT": "LTXKERN_DECODER_LAYOUT must be one of auto, contiguous, channels-last, got 'on'",
    }
    for name in variables:
        monkeypatch.setenv(name, "on")
    for asked in (permitted.environment_choice, dispatch.disabled, backends.probing):
        asked.cache_clear()
    wrong = {
        "--on-nan": ("hope", "on-nan must be one of stop, retry-fp32, got 'hope'"),
        "--progress": ("xml", "progress must be one of bars, json, got 'xml'"),
        "--preview": (f"{__file__}/a", f"preview '{__file__}/a': '{__file__}' is no folder: name another folder"),
        "--work-dir": (str(tmp_path / "w"), "work-dir is kept by one process, and no-work-dir keeps nothing"),
        "-o": ("a.gif", "--output: output 'a.gif' has the unknown suffix '.gif'"),
        "--height": ("65", "height 65 is not a multiple of 64: use 64 or 128"),
        "--num-frames": ("10", "num_frames 10 is not 8k+1: use 9 or 17"),
        "--image": (str(tmp_path / "none.png"), "none.png' does not exist"),
        "--steps": ("1", "steps must be at least 2"),
    }
    options = [word for name, (value, _) in wrong.items() for word in (name, value)]
    assert run(*options, "--no-work-dir") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ltxkern: error: {len(variables) + len(wrong)} problems:\n")
    assert all(words in said for words in (*variables.values(), *(words for _, words in wrong.values()))), said
    assert list(tmp_path.iterdir()) == []
