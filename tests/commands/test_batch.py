"""`ltxkern batch` in one process and under torchrun: resuming, refusals, the bits of `generate`."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from ltxkern.cli import main
from ltxkern.pipeline.result import HQOutput
from tests.commands.typed import BATCH, write
from tests.processes import python


def test_the_command_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bad option, one bad size, two good items; run again with one repaired, only that one runs."""
    lines: list[Any] = [
        {"prompt": "a kite", "name": "kite"},
        {"prompt": "rain", "seed": 3, "name": "rain"},
        {"prompt": "snow", "height": 65, "name": "snow"},
        {"prompt": "fog", "colour": "grey", "name": "fog"},
    ]
    folder = tmp_path / "out"
    command = ["batch", str(write(tmp_path, *lines)), "-o", str(folder), *BATCH]
    assert main(command) == 2
    said = capsys.readouterr()
    assert f"2 of 4 done (0 before), in {folder}" in said.out
    assert "snow failed: ValueError: height 65 is not a multiple of 64: use 64 or 128" in said.err
    assert "fog failed: ValueError: unknown option 'colour'" in said.err
    stamps = {name: (folder / f"{name}.safetensors").stat().st_mtime_ns for name in ("kite", "rain")}
    lines[2]["height"] = 64
    write(tmp_path, *lines[:3])
    assert main(command) == 0
    assert "3 of 3 done (2 before)" in capsys.readouterr().out
    assert stamps == {name: (folder / f"{name}.safetensors").stat().st_mtime_ns for name in stamps}
    assert (folder / "snow.safetensors").is_file()


def test_an_item_equals_the_same_generate(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    path = write(tmp_path, {"prompt": "a kite", "seed": 7, "name": "kite"}, {"prompt": "rain", "name": "rain"})
    assert main(["batch", str(path), "-o", str(folder), *BATCH, "--quiet"]) == 0
    alone = tmp_path / "alone.safetensors"
    small = BATCH[: BATCH.index("--format")]
    assert main(["generate", "--prompt", "rain", *small, "-o", str(alone), "--quiet"]) == 0
    assert (folder / "rain.safetensors").read_bytes() == alone.read_bytes()


def test_an_item_that_was_cut_off_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the batch, and by itself from its folder."""
    path = write(tmp_path, {"prompt": "a kite", "name": "kite"}, {"prompt": "rain", "seed": 7, "name": "rain"})
    command = ["batch", str(path), "-o", str(tmp_path / "out"), *BATCH, "--work-dir", str(tmp_path / "work"), "--quiet"]
    output, folder = tmp_path / "out" / "rain.safetensors", tmp_path / "work" / "rain"

    def full(self: HQOutput, place: Any, **_: Any) -> None:
        if Path(place) == output:
            raise OSError(28, "No space left on device")
        save(self, place)

    save = HQOutput.save
    with monkeypatch.context() as patch:
        patch.setattr(HQOutput, "save", full)
        assert main(command) == 2
    assert f"what is done is kept: ltxkern resume {folder}" in capsys.readouterr().err
    stages = [folder / "stage1.safetensors", folder / "stage2.safetensors"]
    made = [stage.stat().st_mtime_ns for stage in stages]
    assert main(["resume", str(folder), "--quiet"]) == 0
    alone = output.read_bytes()
    output.unlink()
    assert main(command) == 0
    assert output.read_bytes() == alone
    assert [stage.stat().st_mtime_ns for stage in stages] == made
    assert not list((tmp_path / "work" / "kite").glob("steps-*"))
    assert main([*command, "--no-work-dir"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_names_and_places(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is a link to none yet, under ~; names with dots for folders of frames; a name too long, before any work."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to("disk")
    path = write(tmp_path, {"prompt": "a", "name": "kite.mp4"}, {"prompt": "b", "name": "x" * 300})
    assert main(["batch", str(path), "-o", "~/link", *BATCH[:-1], "frames"]) == 2
    assert "File name too long" in capsys.readouterr().err
    assert len(list((tmp_path / "disk" / "kite.mp4").glob("*.png"))) == 9
    assert (tmp_path / "link").is_symlink()
    assert main(["batch", str(path), "-o", str(path)]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "gif"], "format must be one of mp4, latents, frames, got 'gif'"),
        (["--workers", "2"], "workers must be at least 1 and needs --ray, got 2"),
        (["--cfg-parallel-size", "2"], "cfg-parallel-size is 2 and 1 rank started"),
    ],
)
def test_options_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    path = write(tmp_path, {"prompt": "a"})
    assert main(["batch", str(path), "-o", str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_batch_under_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three ranks share out every item, one item is refused on all of them, one rank speaks; run again alone, nothing runs."""
    path = write(tmp_path, {"prompt": "rain", "name": "rain"}, {"prompt": "snow", "height": 65}, {"prompt": "fog"})
    folder, alone = tmp_path / "ranks", tmp_path / "alone"
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "ltxkern"]

    def batch(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
        return python(*command, "batch", path, "-o", folder, *BATCH, status=None, seconds=200)

    first = batch(folder, *several)
    assert first.returncode != 0
    assert first.stdout.splitlines() == [f"2 of 3 done (0 before), in {folder}"]
    assert first.stderr.count("00002 failed: ValueError: height 65 is not a multiple of 64") == 1
    assert "cfg parallel on 3 ranks: 10 evaluations exchanged in 12 collectives" in first.stderr
    assert main(["batch", str(path), "-o", str(folder), *BATCH]) == 2
    assert f"2 of 3 done (2 before), in {folder}" in capsys.readouterr().out
    assert batch(alone, "-m", "ltxkern").returncode == 2
    for name in ("rain", "00003"):
        assert (folder / f"{name}.safetensors").read_bytes() == (alone / f"{name}.safetensors").read_bytes()
