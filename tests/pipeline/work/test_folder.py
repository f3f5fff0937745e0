"""A work folder belongs to one process and one run; what differs is named, and later stages may differ alone."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ltxkern.pipeline.work.folder import MANIFEST, WorkFolder, WorkFolderError, read_manifest
from ltxkern.pipeline.work.kept import KeptWork

FACTS: dict[str, Any] = {"prompt": "a kite", "seed": 10, "steps": 4, "audio_source": None, "dtype": "fp32"}


def begun(path: Path, *names: str, **changes: Any) -> WorkFolder:
    """A folder with a run and records of these names."""
    folder = WorkFolder(path, **changes)
    folder.begins(FACTS)
    for name in names:
        KeptWork(folder).leave(name, {"a": torch.zeros(1)})
    return folder


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with begun(tmp_path / "w"), pytest.raises(WorkFolderError, match=r"'.*w' is in use by process \d+: wait for it"):
        WorkFolder(tmp_path / "w")
    WorkFolder(tmp_path / "w").close()
    assert (tmp_path / "w").stat().st_mode & 0o77 == 0, "others can read what was asked for"


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(WorkFolderError, match="holds other files than a run's: name an empty or a new folder"):
        WorkFolder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(WorkFolderError, match="cannot be written"):
        WorkFolder(tmp_path / "holiday.jpg" / "w")


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    begun(tmp_path, "text").close()
    (tmp_path / ".ltxkern-abc.safetensors").write_bytes(b"half")
    with WorkFolder(tmp_path) as folder:
        assert folder.names("") == ["text"]
        assert not list(tmp_path.glob(".ltxkern-*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 7}, r"differs in seed \(10 there, 7 here\): .*resume .* --from stage2 --set"),
        ({"audio_source": "stage2"}, "differs in audio_source .*--from decode"),
        ({"steps": 9, "seed": 7}, r"steps \(4 there, 9 here\).*--from stage1|seed.*; steps.*--from stage1"),
        ({"prompt": "a boat", "steps": 9}, "prompt .*: name another folder$"),
        ({"prompt": "a " * 99}, r"\.\.\. here\)"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    begun(tmp_path, "text").close()
    with WorkFolder(tmp_path) as folder, pytest.raises(WorkFolderError, match=words):
        folder.begins(FACTS | changes)
    with WorkFolder(tmp_path) as folder:
        assert folder.begins(FACTS)
        assert folder.names("") == ["text"]


EVERY = [
    "text",
    "stage1",
    "stage1-images",
    "stage1-upsampled",
    "stage2",
    "steps-stage2-00001",
    "decode-audio",
    "chunk-mp4-0",
]


@pytest.mark.parametrize(
    ("first", "changes", "left"),
    [
        ("text", {"prompt": "a boat"}, 0),
        ("stage1", {"steps": 9}, 1),
        ("stage2", {"seed": 7}, 4),
        ("stage2", {}, 4),
        ("decode", {"audio_source": "stage2"}, 6),
        ("decode", {"dtype": "fp16"}, 6),
        ("stage1", {"prompt": "a boat"}, None),
        ("stage2", {"steps": 9}, None),
        ("decode", {"seed": 7}, None),
    ],
)
def test_later_stages_anew(tmp_path: Path, first: str, changes: dict[str, Any], left: int | None) -> None:
    begun(tmp_path, *EVERY).close()
    with WorkFolder(tmp_path, restart=first) as folder:
        if left is None:
            with pytest.raises(WorkFolderError, match="differs in"):
                folder.begins(FACTS | changes)
            assert folder.names("") == sorted(EVERY)
            return
        folder.begins(FACTS | changes)
        assert sorted(folder.names("")) == sorted(EVERY[:left])
    found = read_manifest(tmp_path)
    assert found is not None
    assert found.facts == FACTS | changes
    then = {name: FACTS[name] for name in changes}
    assert found.earlier == (
        {stage: then for stage in ("text", "stage1", "stage2") if stage in EVERY[:left]} if then else {}
    )


def test_a_stage_of_other_settings_that_is_damaged_is_not_made_of_todays(tmp_path: Path) -> None:
    begun(tmp_path, *EVERY).close()
    with WorkFolder(tmp_path, restart="stage2") as folder:
        folder.begins(FACTS | {"seed": 7})
        folder.record("stage1").write_bytes(b"half")
        with pytest.raises(ValueError, match="it was made with seed 10: start a new run"):
            KeptWork(folder).take("stage1")


def test_a_folder_of_the_cache_makes_room(tmp_path: Path) -> None:
    begun(tmp_path, "text").close()
    with WorkFolder(tmp_path, is_cache=True) as folder:
        assert folder.begins(FACTS)
        assert folder.names("") == ["text"]
        folder.finish()
        assert folder.begins(FACTS)
        assert folder.names("") == []
        KeptWork(folder).leave("text", {"a": torch.zeros(1)})
        assert folder.begins(FACTS | {"seed": 7})
        assert folder.names("") == []
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(WorkFolderError, match="cannot be read"):
        WorkFolder(tmp_path)
    WorkFolder(tmp_path, is_cache=True).close()


def test_what_only_a_run_in_progress_needs_goes_at_its_end(tmp_path: Path) -> None:
    with begun(tmp_path, *EVERY) as folder:
        folder.finish()
        assert folder.names("") == sorted(set(EVERY) - {"steps-stage2-00001", "chunk-mp4-0"})
    found = read_manifest(tmp_path)
    assert found is not None
    assert found.finished


def test_words_for_what_cannot_be_read(tmp_path: Path) -> None:
    assert read_manifest(tmp_path / "nowhere") is None
    with pytest.raises(WorkFolderError, match="from must be one of text, stage1, stage2, decode, got 'stage3'"):
        WorkFolder(tmp_path, restart="stage3")
    begun(tmp_path).close()
    manifest = tmp_path / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(WorkFolderError, match="of format 9, this version reads 1"):
        read_manifest(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """64 KiB of a real file system."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("NO REAL SMALL DISK: mounting one needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_is_full_or_read_only(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    with begun(small_disk / "w", "text") as folder:
        work = KeptWork(folder)
        for name in ("stage1", "stage2"):
            work.leave(name, {"a": torch.zeros(100_000)})
        assert [record.getMessage() for record in caplog.records] == [
            f"the run goes on, but stage1 is not kept: writing {str(folder.record('stage1'))!r} failed: the disk is full; "
            "nothing was written there"
        ]
        assert folder.names("") == ["text"]
        assert {path.name for path in folder.path.iterdir()} == {"lock", MANIFEST, "text.safetensors"}
        work.leave("stage1", {"a": torch.zeros(10)})
        assert folder.names("") == ["stage1", "text"]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for place in ("w", "new"):
        with pytest.raises(WorkFolderError, match=r"cannot be written \(Read-only file system\): name another"):
            WorkFolder(small_disk / place)
