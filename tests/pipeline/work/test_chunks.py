"""Chunks that a writer took are not decoded again; without a folder they go through as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ltxkern.pipeline.work.chunks import VideoChunks
from ltxkern.pipeline.work.folder import WorkFolder
from ltxkern.pipeline.work.kept import KeptWork


def chunks(work: KeptWork, asked: list[int]) -> VideoChunks:
    def decode(skip: int) -> Iterator[torch.Tensor]:
        asked.append(skip)
        for number in range(skip, 3):
            yield torch.full((2, 2, 2, 3), number / 10)

    return VideoChunks(decode, work, "0")


def tenths(chunk: torch.Tensor) -> torch.Tensor:
    return (chunk * 10).round().to(torch.uint8)


def test_without_a_folder() -> None:
    asked: list[int] = []
    found = list(chunks(KeptWork(), asked).written("mp4", tenths))
    assert [float(chunk.mean()) for chunk in found] == [pytest.approx(n / 10) for n in range(3)]
    assert found[0].dtype == torch.float32
    assert [float(chunk.mean()) for chunk in chunks(KeptWork(), asked)] == [pytest.approx(n / 10) for n in range(3)]
    assert asked == [0, 0]


def test_the_next_process_goes_on(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path)
    folder.begins({})
    asked: list[int] = []
    first = chunks(KeptWork(folder), asked).written("mp4", tenths)
    assert [int(next(first).max()) for _ in range(2)] == [0, 1]
    del first
    for expected in ([0, 2], [0, 2]):  # one that goes on, and one that finds everything
        found = list(chunks(KeptWork(folder), asked).written("mp4", tenths))
        assert [int(chunk.max()) for chunk in found] == [0, 1, 2]
        assert asked == expected
    folder.record("chunk-mp4-0-00001").write_bytes(b"half")
    assert [int(chunk.max()) for chunk in chunks(KeptWork(folder), asked).written("mp4", tenths)] == [0, 1, 2]
    assert asked == [0, 2, 1]
    list(chunks(KeptWork(folder), asked).written("frames", tenths))
    assert asked == [0, 2, 1, 0]
