"""Paths and text files as people write them: ~ in every option, wrong encodings by file and line, null in YAML."""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from ltxkern.cli import main
from ltxkern.commands import options
from ltxkern.commands.text_files import home_in_paths, read_text
from ltxkern.pipeline.results.probe import probe_mp4
from tests.commands.typed import MODEL, SMALL, refused

DRY = ["generate", *SMALL, "--dry-run"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a\nb caf\u00e9\n".encode("latin-1"), "line 2: byte 0xe9 does not belong to UTF-8"),
        ("a\n\nb \u201cc\u201d".encode("cp1252"), "line 3: byte 0x93 does not belong to UTF-8"),
        (b"\xef\xbb\xbfa\n\xff", "line 2: byte 0xff does not belong to UTF-8"),
        ("a\nb".encode("utf-16-le"), "line 1: a zero byte, as in UTF-16 without a byte order mark"),
        ("a\nb".encode("utf-16-be"), "line 1: a zero byte, as in UTF-16 without a byte order mark"),
        ("a\nb".encode("utf-16")[:-1], "line 2: byte 0x62 does not belong to UTF-16"),
        (b"\x80", "line 1: byte 0x80 does not belong to UTF-8"),
    ],
    ids=["latin-1", "cp1252", "marked", "utf-16-le", "utf-16-be", "cut", "first"],
)
@pytest.mark.parametrize("kind", ["config", "prompts"])
def test_another_encoding_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, content: bytes, words: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    arguments = ["--config", str(path)] if kind == "config" else [str(path), "-o", str(tmp_path / "out")]
    said = refused(capsys, *arguments, command="generate" if kind == "config" else "batch")
    assert f"{kind}: {path}, {words}: save the file as UTF-8" in said


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marks_are_skipped(tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("height: 128\nnegative-prompt: caf\u00e9\n".encode(encoding))
    assert read_text(path, "config").startswith("height")
    assert main(["generate", "--prompt", "a", *MODEL, "--config", str(path), "--dry-run"]) == 0
    assert "128x192" in capsys.readouterr().out


def test_a_date_that_is_none_is_said_with_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("prompt: 2024-13-45\n")
    assert f"config {tmp_path}/run.yaml: not valid YAML (month must be" in refused(
        capsys, "--config", f"{tmp_path}/run.yaml"
    )


def test_null_in_a_file_is_not_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    names = ("seed", "frame-rate", "model", "device-mode", "image", "lora", "quiet", "output", "eta", "height")
    path.write_text("".join(f"{name}: {text}\n" for name, text in zip(names, ("null", "~", "") * 4, strict=False)))
    assert main([*DRY, "--config", str(path)]) == 0
    with_nulls = capsys.readouterr().out
    assert main(DRY) == 0
    assert capsys.readouterr().out == with_nulls
    path.write_text("a: b\nc: [d\n")
    assert f"config {path}, line 3: not valid YAML" in refused(capsys, "--config", str(path))


def test_home_in_every_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line and in a file, whole names and those with something behind."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    for option in ("--model=~/no.safetensors", "--lora=~/no.safetensors:0.5", "--distilled-lora=~/no.safetensors"):
        assert f"{tmp_path}/no.safetensors" in refused(capsys, option)
    assert f"{tmp_path}/no" in refused(capsys, "--config=~/no")
    parser = argparse.ArgumentParser()
    options.add_model_options(parser)
    home_in_paths(parser)
    for name in ("model", "upsampler", "text_encoder", "embedding_cache", "distilled_lora"):
        assert getattr(parser.parse_args([f"--{name.replace('_', '-')}=~/no"]), name) == f"{tmp_path}/no"
    assert f"{tmp_path}/no" in refused(capsys, "-o", "~/no/a.mp4")
    assert "~nobody-of-this-name' does not exist" in refused(capsys, "-o", "~nobody-of-this-name/a.mp4")
    assert f"{tmp_path}/no" in refused(capsys, "~/no", command="batch")
    assert f"{tmp_path}/no" in refused(capsys, "~/no.mp4", "~/no.mp4", command="compare")
    config = tmp_path / "run.yaml"
    config.write_text("image: ['~/p.png:0:0.5']\nlora: ~/no.safetensors\noutput: ~/no/a.mp4\n")
    assert main([*DRY[:-1], "--config=~/run.yaml"]) == 2
    said = capsys.readouterr().err
    assert all(f"{tmp_path}/no{end}" in said for end in (".safetensors", "' does not exist"))
    config.write_text("num-frames: 9\nnum_frames: 17\n")
    assert "run.yaml: num_frames is there twice" in refused(capsys, "--config=~/run.yaml")
    config.write_text("image: ['~/p.png:0:0.5', '~/p.png']\nframe-rate: 24000/1001\n")
    assert main([*DRY, "--config=~/run.yaml"]) == 0
    said = capsys.readouterr().out
    assert f"image {tmp_path}/p.png at frame 0, strength 0.5" in said
    assert "23.976 fps" in said


@pytest.mark.parametrize("rate", ["24000/1001", " 24000 / 1001", "23.976", "23.98"])
def test_a_rate_as_a_fraction(capsys: pytest.CaptureFixture[str], rate: str) -> None:
    assert main([*DRY, f"--frame-rate={rate}"]) == 0
    assert "23.976 fps" in capsys.readouterr().out
    assert "frame_rate must be a positive number" in refused(capsys, "--frame-rate", "0")
    assert "frame_rate must be between 1 and 300, got 1e+09: use 300" in refused(capsys, "--frame-rate", "1e9")
    with pytest.raises(SystemExit):
        main([*DRY, "--frame-rate", "24:1"])
    assert "fps must be a positive number or a fraction such as 24000/1001, got 24:1" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_that_cannot_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """A run that is done is done, whatever the terminal makes of its name."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", shown)
    for name in ("k\u00fcche \u732b.mp4", os.fsdecode(b"k\xfcche.mp4")):
        assert main(["generate", *SMALL, "-o", str(tmp_path / name)]) == 0
        assert probe_mp4(tmp_path / name).frames == 9
    shown.flush()
    assert shown.buffer.getvalue().count(b"che") == 2
