"""Runs that nobody named a folder for take a bounded part of the disk; the oldest go first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ltxkern.pipeline.work.folder import MANIFEST, WorkFolder
from ltxkern.pipeline.work.kept import KeptWork
from ltxkern.pipeline.work.place import default_folder, limit_bytes, root, trim


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTXKERN_CACHE", str(tmp_path))


def test_a_folder_for_each_request() -> None:
    one, two = default_folder({"seed": 1, "prompt": "a"}), default_folder({"prompt": "a", "seed": 1})
    assert one == two
    assert one.parent == root()
    assert default_folder({"seed": 2, "prompt": "a"}) != one


def test_the_oldest_go_until_the_rest_fits() -> None:
    folders = [root() / name for name in "abcd"]
    for age, path in enumerate(folders):
        with WorkFolder(path) as folder:
            folder.begins({})
            KeptWork(folder).leave("text", {"a": torch.zeros(1000, dtype=torch.uint8)})
        for file in (path / MANIFEST, path):
            os.utime(file, (age, age))
    (root() / "notes").mkdir()
    (root() / "notes" / "mine.txt").write_bytes(b"x" * 5000)
    with WorkFolder(folders[1]):
        os.utime(folders[1], (1, 1))
        assert trim(folders[2], 10**6) == []
        assert trim(folders[2], 3000 + 5000) == [folders[0], folders[3]]
    assert {path.name for path in root().iterdir()} == {"b", "c", "notes"}


@pytest.mark.parametrize(("text", "gib"), [(None, 16.0), ("0.5", 0.5), ("0", 0.0)])
def test_the_limit(monkeypatch: pytest.MonkeyPatch, text: str | None, gib: float) -> None:
    if text is not None:
        monkeypatch.setenv("LTXKERN_WORK_LIMIT", text)
    assert limit_bytes() == gib * 2**30


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_no_limit(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LTXKERN_WORK_LIMIT", text)
    with pytest.raises(ValueError, match=f"LTXKERN_WORK_LIMIT must be a number of GiB, got '{text}': use 16"):
        limit_bytes()
