"""Every file of a model and its LoRAs has its checksum compared: with the hub's, or with that of the look before."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltxkern.cli import main
from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.files.found import FoundModel
from ltxkern.pipeline.planning.checksums import check_files, files_of, hub_sha256, record_file
from tests.official_files import write_official_demo


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTXKERN_CACHE", str(tmp_path / "cache"))


def flip(path: Path) -> None:
    """One bit in the middle of the weights: no header shows it."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def test_a_changed_file_is_told_until_it_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(9)}, path)

    def look() -> tuple[bool, str]:
        (found,) = check_files([path])
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        return found.is_whole, found.verdict

    before = hashlib.sha256(path.read_bytes()).hexdigest()
    assert [look(), look()] == [(True, "recorded now"), (True, "as recorded")]
    flip(path)
    told = f"changed, it was {before}: if it should be, remove that from {record_file()}"
    assert [look(), look()] == [(False, told)] * 2
    record_file().write_text("half a rec")
    assert look() == (True, "recorded now")


def test_what_the_hub_says_counts(tmp_path: Path) -> None:
    content = b"weights"
    name = hashlib.sha256(content).hexdigest()
    blob = tmp_path / "models--a--b" / "blobs" / name
    link = tmp_path / "models--a--b" / "snapshots" / "0123" / "a.safetensors"
    plain = tmp_path / "local" / "vae" / "a.safetensors"
    described = tmp_path / "local" / ".cache/huggingface/download/vae/a.safetensors.metadata"
    for file, text in ((blob, content), (plain, content), (described, f"0123\n{name}\n1.5\n".encode())):
        file.parent.mkdir(parents=True)
        file.write_bytes(text)
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert [hub_sha256(path) for path in (link, plain, tmp_path)] == [name, name, None]
    assert [found.verdict for found in check_files([link, plain])] == ["as the hub says"] * 2
    flip(blob)
    (found,) = check_files([link])
    assert not found.is_whole
    assert found.verdict == f"damaged, the hub says {name}: download it again"
    assert not record_file().exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_official_demo(tmp_path, build_demo())["checkpoint"]
    arguments = ["plan", "--model", str(checkpoint), "--device", "cpu", "--checksums"]
    arguments += ["--height", "64", "--width", "128", "--num-frames", "9"]
    assert main(arguments) == 0
    assert f"{checkpoint}: recorded now" in capsys.readouterr().out
    flip(checkpoint)
    assert main(arguments) == 2
    assert "1 of the files are not what they were:" in capsys.readouterr().err
    assert files_of(FoundModel.of("demo-random")) == []
