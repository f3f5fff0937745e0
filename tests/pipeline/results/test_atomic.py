"""Where results go, and names that cannot be written, found before any work."""

import contextlib
import os
import re
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ltxkern.pipeline.results.atomic import output_kind, writable_output
from ltxkern.pipeline.results.media import write_frames, write_latents, write_mp4
from ltxkern.pipeline.results.probe import probe_mp4
from ltxkern.whole_files import beside
from tests.pipeline.results.samples import leftovers, tone, video


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.mp4", "mp4"), ("A.MP4", "mp4"), ("a.safetensors", "latents"), ("a", "frames"), ("a.b/", "frames")],
)
def test_suffix_decides(tmp_path: Path, name: str, kind: str) -> None:
    assert output_kind(f"{tmp_path}/{name}") == kind
    assert writable_output(f"{tmp_path}/{name}") == kind
    assert leftovers(tmp_path) == []


def test_existing_results_are_legal(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"old")
    assert writable_output(tmp_path / "a.mp4") == "mp4"
    (tmp_path / "v1.5").mkdir()
    assert writable_output(tmp_path / "v1.5") == "frames"
    assert (tmp_path / "a.mp4").read_bytes() == b"old"


def test_unwritable_outputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown suffix '.avi': name a .mp4 file, a .safetensors file"):
        writable_output(tmp_path / "a.avi")
    with pytest.raises(ValueError, match="does not exist"):
        writable_output(tmp_path / "nowhere" / "a.mp4")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        writable_output(tmp_path / "file")
    with pytest.raises(ValueError, match="is a file"):
        writable_output(f"{tmp_path}/file/")
    for unwritable in ("/proc/a.mp4", "/proc/a"):
        with pytest.raises(ValueError, match="is not writable"):
            writable_output(unwritable)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException], after: int) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def chunks() -> Iterator[Tensor]:
        if after:
            yield video(40)
        raise error

    with pytest.raises(error):
        write_mp4(path, chunks(), tone(4800))
    assert path.read_bytes() == b"old"
    folder = tmp_path / "frames"
    with pytest.raises(error):
        write_frames(folder, chunks(), tone(4800))
    assert leftovers(tmp_path) == ["a.mp4"]


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Writes beyond `limit` bytes of a file fail, as on a file system with a maximum file size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_anything(path: Path) -> None:
    """Noise, so that every kind of output is large."""
    noise = torch.rand(24, 96, 128, 3, generator=torch.Generator().manual_seed(0))
    kind = output_kind(path)
    if kind == "mp4":
        write_mp4(path, noise.split(8), tone(48000))
    elif kind == "latents":
        write_latents(path, noise, None)
    else:
        write_frames(path, noise.split(8), tone(48000))


@pytest.mark.parametrize("name", ["a.mp4", "a.safetensors", "a"])
@pytest.mark.parametrize("limit", [1, 5000, 20000])
def test_a_file_that_cannot_grow(tmp_path: Path, name: str, limit: int) -> None:
    expected = f"{name}' failed: the file grew too big; nothing was written there"
    with pytest.raises(OSError, match=re.escape(expected)), file_size_limit(limit):
        write_anything(tmp_path / name)
    assert leftovers(tmp_path) == []
    write_anything(tmp_path / name)
    assert leftovers(tmp_path) == [name]


@pytest.mark.parametrize("missing", [1, 100, 1500, 4000])
def test_mp4_that_fails_while_it_is_closed(tmp_path: Path, missing: int) -> None:
    """The last bytes are written while the muxer closes, where errors are easily lost."""
    path = tmp_path / "a.mp4"
    write_anything(path)
    size = path.stat().st_size
    path.unlink()
    with pytest.raises(OSError, match="grew too big"), file_size_limit(size - missing):
        write_anything(path)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["a.mp4", "a.safetensors", "a"])
def test_a_full_disk(tmp_path: Path, name: str) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        expected = f"{name}' failed: the disk is full; nothing was written there"
        with pytest.raises(OSError, match=re.escape(expected)):
            write_anything(tmp_path / name)
        assert leftovers(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_frames_never_remove_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for call in (lambda: writable_output(tmp_path), lambda: write_frames(tmp_path, [video(1)])):
        with pytest.raises(ValueError, match=r"already holds 'thesis.txt'"):
            call()
    assert leftovers(tmp_path) == ["thesis.txt"]


RESULTS = ["a.mp4", "A.MP4", "a.safetensors", "a"]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", RESULTS)
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, name: str, there: bool) -> None:
    """A link to a result on another disk, to nothing yet, and through a second link; the new result lies beside the old."""
    disk, here = tmp_path / "disk", tmp_path / "here"
    disk.mkdir()
    here.mkdir()
    target, link = disk / f"blob{Path(name).suffix}", here / name
    (here / "second").symlink_to(target)
    link.symlink_to("second")
    if there:
        write_small(target)
    assert writable_output(link) == output_kind(name)
    write_small(link)
    assert link.is_symlink()
    assert (here / "second").is_symlink()
    assert leftovers(disk) == [target.name]
    assert target.is_dir() if name == "a" else target.stat().st_size > 500
    assert (leftovers(here), leftovers(tmp_path)) == (sorted([name, "second"]), ["disk", "here"])


def write_small(path: Path) -> None:
    kind = output_kind(path)
    if kind == "latents":
        write_latents(path, torch.zeros(1, 4, 2, 3, 5), None)
    else:
        (write_mp4 if kind == "mp4" else write_frames)(path, [video(3)], tone(6000))


def test_what_must_not_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "circle.mp4").symlink_to("back.mp4")
    (tmp_path / "back.mp4").symlink_to("circle.mp4")
    (tmp_path / "null.mp4").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "kept.mp4").write_bytes(b"old")
    (tmp_path / "kept.mp4").chmod(0o444)
    (tmp_path / "away.mp4").symlink_to("nowhere/a.mp4")
    before = leftovers(tmp_path)
    for name, words in (
        ("circle.mp4", "a link that leads in a circle"),
        ("null.mp4", "a device or a pipe"),
        ("pipe.mp4", "a device or a pipe"),
        ("kept.mp4", "is read-only: make it writable or name another file"),
        ("away.mp4", "nowhere' does not exist"),
        ("kept.mp4/a.mp4", "does not exist"),
        ("x" * 252 + ".mp4", "File name too long"),
    ):
        with pytest.raises(ValueError, match=words):
            writable_output(tmp_path / name)
    assert leftovers(tmp_path) == before
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    "name",
    ["k\u00fcche \u732b", os.fsdecode(b"k\xfcche"), "new\nline", "a" * 251, "-rf", "per cent %d", "a:b"],
    ids=["unicode", "latin-1", "newline", "longest", "dash", "pattern", "colon"],
)
def test_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.mp4"
    assert writable_output(path) == "mp4"
    write_small(path)
    assert probe_mp4(path).frames == 3
    assert leftovers(tmp_path) == [path.name]


@pytest.mark.parametrize("name", RESULTS)
def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert writable_output(f"~/{name}") == output_kind(name)
    write_small(Path("~") / name)
    assert leftovers(tmp_path) == [name]


@pytest.mark.parametrize("name", RESULTS)
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path, name: str) -> None:
    """Only what was to be this very result, and of nobody who still writes."""
    (tmp_path / ".ltxkern-of another version.mp4").write_bytes(b"stays")
    gone = os.fork()
    if gone == 0:
        with beside(tmp_path / name, folder=name == "a"), beside(tmp_path / "b.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(gone, 0)
    assert len(leftovers(tmp_path)) == 3
    with beside(tmp_path / name, folder=name == "a") as living:
        write_small(tmp_path / name)
        assert living.exists()
    of_b = [left for left in leftovers(tmp_path) if left.startswith(".ltxkern-") and left.endswith(".mp4")]
    assert len(leftovers(tmp_path)) == 3
    assert len(of_b) == 2
