"""Options that several commands share: configuration files, values and files that cannot be served."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ltxkern.cli import main
from ltxkern.commands import admission, options
from ltxkern.pipeline.files.demo import demo_lora
from tests.commands.typed import MODEL, refused


def test_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("prompt: from the file\nheight: 128\nnum-frames: 17\nvideo-cfg-scale: 2\n")
    assert main(["generate", *MODEL, "--config", str(config), "--num-frames", "25", "--dry-run"]) == 0
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


def test_free_memory_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "plan.yaml"
    size = ["--height", "64", "--width", "128", "--num-frames", "9"]
    config.write_text("device-free-gib: 0\nhost-free-gib: 0.001\n")
    assert main(["plan", *MODEL, "--config", str(config), *size]) == 2
    assert "0 bytes are free" in capsys.readouterr().err


def test_a_picture_on_the_command_line_replaces_the_file_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first.png", "second.png"):
        Image.fromarray(np.full((64, 128, 3), 90, dtype=np.uint8)).save(tmp_path / name)
    config = tmp_path / "run.yaml"
    config.write_text(f"prompt: a\nimage: ['{tmp_path}/first.png']\n")
    for extra, wanted in (([], "first.png"), (["--image", f"{tmp_path}/second.png"], "second.png")):
        assert main(["generate", *MODEL, "--config", str(config), *extra, "--dry-run"]) == 0
        shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("image ")]
        assert len(shown) == 1
        assert wanted in shown[0]


def bad_lora(folder: Path) -> Path:
    path = folder / "lora.safetensors"
    save_file({f"diffusion_model.nothing.to_q.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}, path)
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
        (
            ["--lora", "nowhere.safetensors:half"],
            "nowhere.safetensors: the strength must be a finite number such as -0.5, got 'half'",
        ),
        (["--lora", "nowhere.safetensors:"], "the strength must be a finite number such as -0.5, got ''"),
        (["--distilled-strength-stage-1", "-0.5"], "strength must be a finite number of at least 0"),
        (["--model", "nowhere.safetensors"], "nowhere.safetensors: no such file or folder"),
        (["-o", "/nowhere/at/all/out.mp4"], "/nowhere/at/all"),
        (["-o", "out.gif"], "unknown suffix '.gif'"),
        (["--pipeline", "fast"], "pipeline must be one of hq, two-stage, one-stage"),
        (["--device-mode", "turbo"], "turbo"),
        (
            ["--attention", "fast"],
            "attention must be one of auto, cudnn, fa3, flash, efficient, math, torch, sage, got 'fast'",
        ),
        (
            ["--attention", "cudnn"],
            "attention cudnn cannot serve float32 on cpu: it runs on cuda, not on cpu; use one of auto, flash, math, torch",
        ),
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


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        ("LTXKERN_ATTENTION", "LTXKERN_ATTENTION must be one of auto, cudnn, "),
        ("LTXKERN_POLICY", 'LTXKERN_POLICY must be "rounded" or "exact", got \'bogus\''),
        ("LTXKERN_DEVICE_MODE", "LTXKERN_DEVICE_MODE must be one of auto, resident, "),
    ],
)
def test_a_bad_variable_is_refused_early_by_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str, sentence: str
) -> None:
    monkeypatch.setenv(variable, "bogus")
    assert f"error: {sentence}" in refused(capsys, "--dry-run")


def test_files_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["-o", str(tmp_path / "out.mp4")]
    assert "nothing.to_q" in refused(capsys, "--lora", str(bad_lora(tmp_path)), *out)
    good = tmp_path / "good.safetensors"
    save_file(demo_lora(), good)
    twice = refused(capsys, "--lora", f"{good}:0.5", "--lora", f"{tmp_path}/./good.safetensors:-1", "--dry-run", *out)
    assert "--lora: " in twice
    assert "good.safetensors is given twice: give it once, with the sum of the strengths" in twice
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(bad_lora(tmp_path).read_bytes()[:-8])
    assert "cut.safetensors" in refused(capsys, "--lora", str(cut), *out)
    text = tmp_path / "picture.png"
    text.write_text("no picture")
    assert "is not a picture" in refused(capsys, "--image", str(text), *out)
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf"])
def test_a_lora_strength_is_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str], strength: str) -> None:
    save_file(demo_lora(), tmp_path / "good.safetensors")
    sentence = refused(capsys, "--lora", f"{tmp_path}/good.safetensors:{strength}", "-o", str(tmp_path / "out.mp4"))
    assert "strength must be a finite number, got" in sentence


@pytest.mark.parametrize(
    ("text", "strength"), [("", 1.0), (":-1.5", -1.5), (":+2", 2.0), (":-.5", -0.5), (":1e-1", 0.1)]
)
def test_a_lora_strength_may_have_a_sign_and_a_path_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, strength: float
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "diffusion_model.transformer_blocks.0.attn1.to_k"
    halves = {"A": torch.zeros(4, 64), "B": torch.zeros(64, 4)}
    save_file(
        {f"{name}.lora_{half}.weight": half_tensor for half, half_tensor in halves.items()}, tmp_path / "l.safetensors"
    )
    parser = argparse.ArgumentParser()
    options.add_model_options(parser)
    arguments = parser.parse_args([*MODEL, f"--lora=~/l.safetensors{text}"], argparse.Namespace(command="generate"))
    chosen = admission.read_model_options(arguments)
    assert chosen.loras == (("~/l.safetensors", strength),)


def test_a_lora_of_the_hub_that_cannot_be_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for option in ("--lora", "--distilled-lora"):
        sentence = refused(capsys, option, "owner/no-such-name/some.safetensors", "-o", str(tmp_path / "out.mp4"))
        assert f"{option[2:]}: owner/no-such-name/some.safetensors: no such path here, and the hub" in sentence
