"""The command line as a user types it: outputs, plans, configuration files, refusals, interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ltxkern.cli import main
from ltxkern.pipeline import HQTwoStagePipeline
from ltxkern.pipeline.results.media import probe_mp4

SMALL = ["--prompt", "a kite", "--height", "64", "--width", "128", "--num-frames", "9", "--steps", "2", "--quiet"]


def run(*arguments: str) -> int:
    return main(["generate", *SMALL, *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, command: str = "generate") -> str:
    """Status 2, one line that begins with the program's name, and no traceback."""
    extra = SMALL if command == "generate" else []
    assert main([command, *extra, *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("ltxkern: error: ")
    return lines[0]


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
        ["--dtype", "bf16"],
    ):
        assert run("-o", str(changed), *options) == 0
        video = load_file(changed)["video"].float()
        assert all(not torch.equal(video, other) for other in seen), options
        seen.append(video)


def test_backend_is_honoured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-o", str(tmp_path / "out.safetensors"), "--backend", "torch") == 0
    capsys.readouterr()
    assert "unknown backend 'fast'" in refused(capsys, "--backend", "fast", "-o", str(tmp_path / "o.mp4"))
    if not torch.cuda.is_available():
        assert "cannot run here" in refused(capsys, "--backend", "cuda", "-o", str(tmp_path / "o.mp4"))


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["generate", "--prompt", "a", "--height", "1088", "--width", "1920", "--num-frames", "121", "--dry-run"])
        == 0
    )
    text = capsys.readouterr().out
    assert "stage 1: 544x960, res2s, 15 steps" in text
    assert "8160 tokens" in text
    assert "31 evaluations x 3 branches = 93 forwards" in text
    assert "7 evaluations x 1 branches = 7 forwards" in text
    assert "0.909375 0.725 0.421875 0" in text


def test_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("prompt: from the file\nheight: 128\nnum-frames: 17\nvideo-cfg-scale: 2\n")
    assert main(["generate", "--config", str(config), "--num-frames", "25", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "stage 2: 128x192" in text
    assert "25 frames" in text
    assert "cfg=2.0" in text
    config.write_text("hight: 128\n")
    assert "unknown option hight: did you mean height?" in refused(capsys, "--config", str(config))
    for text, sentence in (
        ("height: tall", "height must be a whole number, got 'tall'"),
        ("height: 128.7", "height must be a whole number, got 128.7"),
        ("steps: true", "steps must be a whole number, got True"),
        ("prompt: 5", "prompt must be a text, got 5"),
        ("model: 5", "model must be a text, got 5"),
        ('quiet: "no"', "quiet must be true or false, got 'no'"),
        ("image: [1]", "image must be a text, got 1"),
    ):
        config.write_text(text + "\n")
        assert sentence in refused(capsys, "--config", str(config))
    assert "there is no file" in refused(capsys, "--config", str(tmp_path / "none.yaml"))


def test_a_picture_on_the_command_line_replaces_the_file_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first.png", "second.png"):
        Image.fromarray(np.full((64, 128, 3), 90, dtype=np.uint8)).save(tmp_path / name)
    config = tmp_path / "run.yaml"
    config.write_text(f"prompt: a\nimage: ['{tmp_path}/first.png']\n")
    for options, wanted in (([], "first.png"), (["--image", f"{tmp_path}/second.png"], "second.png")):
        assert main(["generate", "--config", str(config), *options, "--dry-run"]) == 0
        shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("image ")]
        assert len(shown) == 1
        assert wanted in shown[0]


def test_a_full_disk_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(HQTwoStagePipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model was opened"))
    for name in ("out.mp4", "out.safetensors", "frames"):
        assert "make room or name another folder" in refused(capsys, "-o", str(tmp_path / name))


def bad_lora(folder: Path) -> Path:
    path = folder / "lora.safetensors"
    save_file(
        {f"diffusion_model.nothing.to_q.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"},
        path,
    )
    return path


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--height", "1080"], "height 1080 is not a multiple of 64: use 1088 or 1024"),
        (["--num-frames", "120"], "num_frames 120 is not 8k+1: use 113 or 121"),
        (["--video-cfg-scale", "nan"], "cfg must be finite, got nan"),
        (["--audio-rescale-scale", "-1"], "rescale must be at least 0"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--lora", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
        (["--distilled-strength-stage-1", "-0.5"], "strength must be a finite number of at least 0"),
        (["--model", "nowhere.safetensors"], "nowhere.safetensors: no such file or folder"),
        (["-o", "/nowhere/at/all/out.mp4"], "/nowhere/at/all"),
        (["-o", "out.gif"], "unknown suffix '.gif'"),
        (["--pipeline", "fast"], "pipeline must be one of hq, two-stage, one-stage"),
        (["--device-mode", "turbo"], "turbo"),
        (["--dtype", "int8"], "dtype must be one of bf16, fp16, fp32"),
        (["--device", "foo"], "device must be one of cpu"),
        (["--device", "cuda:99"], "device 'cuda:99' is not there: use one of cpu"),
        (["-o", ".mp4"], "has no name before the suffix"),
        (["--upsampler", "nothere"], "upsampler: there is no file or folder nothere"),
        (["--prompt", " "], "prompt is missing"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], options: list[str], sentence: str) -> None:
    assert sentence in refused(capsys, *options)


def test_files_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["-o", str(tmp_path / "out.mp4")]
    assert "nothing.to_q" in refused(capsys, "--lora", str(bad_lora(tmp_path)), *out)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(bad_lora(tmp_path).read_bytes()[:-8])
    assert "cut.safetensors" in refused(capsys, "--lora", str(cut), *out)
    text = tmp_path / "picture.png"
    text.write_text("no picture")
    assert "is not a picture" in refused(capsys, "--image", str(text), *out)
    assert not (tmp_path / "out.mp4").exists()


def test_negative_lora_strength(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refused(capsys, "--lora", f"{bad_lora(tmp_path)}:-1", "-o", str(tmp_path / "out.mp4"))
    assert "strength must be a finite number of at least 0" in sentence


def test_plan_prints_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--height", "64", "--width", "128", "--num-frames", "9"]) == 0
    assert "stage 2" in capsys.readouterr().out
    assert (
        main(["plan", "--height", "1088", "--width", "1920", "--device-free-gib", "0.2", "--host-free-gib", "0.2"]) == 2
    )
    assert "ltxkern: error: " in capsys.readouterr().err


@pytest.mark.parametrize("free", ["-1", "nan", "inf", "much"])
def test_free_memory_must_be_a_number(free: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["plan", f"--device-free-gib={free}"])
    assert error.value.code == 2
    assert f"expected a number of GiB of at least 0, got '{free}'" in capsys.readouterr().err


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a.mp4", "1"), ("b.mp4", "2")):
        assert run("-o", str(tmp_path / name), "--seed", seed) == 0
    capsys.readouterr()
    report = tmp_path / "report.json"
    assert main(["compare", str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"), "--json", str(report)]) == 0
    assert "PSNR" in capsys.readouterr().out
    assert len(json.loads(report.read_text())["frames"]) == 9
    assert "none.mp4" in refused(capsys, str(tmp_path / "none.mp4"), str(tmp_path / "b.mp4"), command="compare")


def test_doctor_and_bench_env(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # A bare installation has no rich.
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "group_norm_silu" in text
    assert "torch" in text
    assert main(["bench-env"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["torch"] == torch.__version__


def test_ctrl_c_leaves_no_half_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ltxkern", "generate", *SMALL, "--steps", "400", "-o", str(tmp_path / "out.mp4")]
    command.remove("--quiet")
    # A shell that runs the tests in the background hands down an ignored interrupt.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    seen = ""
    deadline = time.monotonic() + 240
    while "stage 1" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_import_is_light() -> None:
    script = (
        "import sys, ltxkern; heavy = {'diffusers', 'transformers', 'triton', 'cupy'} & set(sys.modules); assert not heavy; "
        "import ltxkern.pipeline; heavy = {'diffusers', 'transformers'} & set(sys.modules); assert not heavy"
    )
    # torch itself may import triton where it is installed; a torch-only import tells which modules are torch's own.
    own = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print('triton' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    if own.stdout.strip() == "True":
        script = script.replace("'triton', ", "")
    subprocess.run([sys.executable, "-c", script], check=True)
