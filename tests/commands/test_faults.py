"""Whatever ends a run, it says so and leaves nothing half-written; `ltxkern resume` gives the bytes of a whole run."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import av.error
import pytest

from ltxkern.cli import main
from ltxkern.commands.progress import Shown
from ltxkern.pipeline.results import media
from ltxkern.pipeline.run.progress import ProgressEvent
from tests.commands.typed import run

Fault = Callable[[pytest.MonkeyPatch, Path], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "out.mp4"
    assert run("--no-work-dir", "-o", str(path)) == 0
    return path.read_bytes()


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@contextlib.contextmanager
def encoder_gives_up(patch: pytest.MonkeyPatch, _: Path) -> Iterator[None]:
    patch.setattr(media._Mp4Writer, "write", raising(av.error.ExternalError(-542398533, "Generic error")))
    yield


@contextlib.contextmanager
def broken_pipe(patch: pytest.MonkeyPatch, _: Path) -> Iterator[None]:
    patch.setattr(media._Sink, "write", lambda sink, _: setattr(sink, "error", BrokenPipeError(32, "Broken pipe")))
    yield


def mount_small(folder: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("NO REAL SMALL DISK: mounting one needs root")


@contextlib.contextmanager
def disk_that_fills_up(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """A real small one, which something else fills while the video is written."""
    mount_small(folder)
    other = folder / "other"

    def fill(_: Any, event: ProgressEvent) -> None:
        if (event.stage, event.done) == ("audio", event.total):
            with contextlib.suppress(OSError), other.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    patch.setattr(Shown, "__call__", fill)
    yield
    other.unlink()


FAULTS: dict[str, tuple[Fault, str]] = {
    "encoder": (encoder_gives_up, "out.mp4' failed: the encoder gave up (["),
    "disk": (disk_that_fills_up, "out.mp4' failed: the disk is full; nothing was written there"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_that_a_fault_ended_goes_on(
    name: str, whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, words = FAULTS[name]
    place, work = tmp_path / "disk", tmp_path / "work"
    place.mkdir()
    output = place / "out.mp4"
    try:
        with monkeypatch.context() as patch, fault(patch, place):
            assert run("-o", str(output), "--work-dir", str(work)) == 2
        said = capsys.readouterr().err
        assert f"ltxkern: what is done is kept: ltxkern resume {work}\n" in said
        assert words in said.splitlines()[-1]
        assert list(place.iterdir()) == []
        assert main(["resume", str(work), "--quiet"]) == 0
        assert output.read_bytes() == whole
        assert list(place.iterdir()) == [output]
    finally:
        if place.is_mount():
            subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_clock_that_goes_backwards(
    whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a broken pipe: neither what lies in the future nor time that runs back is taken for anything that it is not."""
    work, output = tmp_path / "work", tmp_path / "out.mp4"
    backwards = itertools.count(2_000_000_000, -3600)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(backwards)))
        patch.setattr(time, "time_ns", lambda: next(backwards) * 10**9)
        with patch.context() as broken, broken_pipe(broken, tmp_path):
            assert run("-o", str(output), "--work-dir", str(work)) == 2
        assert "out.mp4' failed: Broken pipe; nothing was written there" in capsys.readouterr().err
        for record, second in zip(sorted(work.iterdir()), itertools.count(4_000_000_000, -86400), strict=False):
            os.utime(record, (second, second))
        assert main(["resume", str(work), "--quiet"]) == 0
    assert output.read_bytes() == whole


def test_a_cache_that_is_read_only_or_corrupt(
    whole: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs what it would have kept, and nothing else."""
    output, cache = tmp_path / "out.mp4", tmp_path / "cache"
    monkeypatch.setenv("LTXKERN_CACHE", str(cache))
    with monkeypatch.context() as patch, encoder_gives_up(patch, tmp_path):
        assert run("-o", str(output)) == 2
    (folder,) = (cache / "work").iterdir()
    for file in folder.glob("*.*"):
        file.write_bytes(b"neither JSON nor safetensors")
    assert run("-o", str(output)) == 0
    assert output.read_bytes() == whole
    cache.rename(tmp_path / "before")
    cache.mkdir()
    try:
        mount_small(cache)
        subprocess.run(["mount", "-o", "remount,ro", str(cache)], check=True)
        assert run("-o", str(output)) == 0
        assert "the run is not kept: work folder" in caplog.text
    finally:
        if cache.is_mount():
            subprocess.run(["umount", "-l", str(cache)], check=True)
    assert output.read_bytes() == whole
