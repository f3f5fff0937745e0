"""Records of a run: made once, taken after, made again where damaged; steps that are not finite are never the last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltxkern.pipeline.sampling.finite import NonFiniteError
from ltxkern.pipeline.sampling.state import SamplerPoint
from ltxkern.pipeline.work.folder import WorkFolder, WorkFolderError
from ltxkern.pipeline.work.kept import KeptWork


@pytest.fixture
def work(tmp_path: Path) -> KeptWork:
    folder = WorkFolder(tmp_path)
    folder.begins({"seed": 1})
    return KeptWork(folder)


def point(done: int, value: float = 1.0) -> SamplerPoint:
    states = tuple(torch.Generator().manual_seed(seed).get_state() for seed in (3, 4))
    return SamplerPoint(done, {"video": torch.full((1, 4, 2), float(value)), "audio": torch.ones(1, 3, 2)}, states)


def test_once(work: KeptWork, caplog: pytest.LogCaptureFixture) -> None:
    made: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"b": torch.arange(3), "a": torch.ones(2)}

    for folder in (work, KeptWork(work.folder), KeptWork()):
        assert [tensor.tolist() for _, tensor in sorted(folder.once("text", make).items())] == [[1, 1], [0, 1, 2]]
    assert len(made) == 2
    assert work.folder is not None
    work.folder.record("text").write_bytes(b"half")
    work.once("text", make)
    assert len(made) == 3
    assert "it is made again" in caplog.text
    work.once("text", make)
    assert len(made) == 3


def test_the_last_two_steps_are_there_until_the_stage_is(work: KeptWork) -> None:
    folder = work.folder
    assert folder is not None
    steps = work.steps("stage1", "stage 1")
    assert steps.latest() is None
    for done in (1, 2, 3):
        steps.keep(point(done, done), {"video": torch.full((1,), float(done))})
    assert folder.names("") == ["steps-stage1-00002", "steps-stage1-00003"]
    found = steps.latest()
    assert found is not None
    at, last = found
    assert at.done == 3
    assert float(last["video"]) == float(at.latents["video"].mean()) == 3.0
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(at.generators, point(3).generators, strict=True))
    folder.record("steps-stage1-00003").write_bytes(b"half")
    again = steps.latest()
    assert again is not None
    assert again[0].done == 2
    work.stage("stage1", {"video": torch.ones(1)})
    assert folder.names("") == ["stage1"]


def test_a_step_that_is_not_finite_is_named_and_not_kept(work: KeptWork) -> None:
    steps = work.steps("stage2", "stage 2")
    steps.keep(point(1), {})
    with pytest.raises(NonFiniteError, match=r"stage 2, step 2: the video latent has 8 non-finite of 8 values \(8 NaN"):
        steps.keep(point(2, float("nan")), {})
    found = steps.latest()
    assert found is not None
    assert found[0].done == 1


def test_who_opens_a_folder_closes_it(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with KeptWork.opened(tmp_path, cpu, {"seed": 1}), pytest.raises(WorkFolderError, match="in use"):
        WorkFolder(tmp_path)
    with WorkFolder(tmp_path) as folder:
        assert folder.manifest.finished
        with KeptWork.opened(folder, cpu, {"seed": 1}):
            pass
        assert not folder.manifest.finished
    with pytest.raises(RuntimeError, match="mine"), KeptWork.opened(tmp_path, cpu, {"seed": 1}):
        raise RuntimeError("mine")
    with KeptWork.opened(tmp_path, cpu, {"seed": 1}) as streaming:
        streaming.waiting += 2
    for done in (False, True):
        streaming.done()
        assert streaming.folder is not None
        assert streaming.folder.manifest.finished is done
    WorkFolder(tmp_path).close()


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "the disk is full")

    monkeypatch.setattr("ltxkern.pipeline.work.folder.replacing_file", full)
    with (
        WorkFolder(tmp_path, is_cache=True) as folder,
        KeptWork.opened(folder, torch.device("cpu"), {"seed": 1}) as work,
    ):
        assert work.folder is None
    assert "the run is not kept" in caplog.text
    with WorkFolder(tmp_path) as folder, pytest.raises(OSError, match="the disk is full"):
        folder.begins({"seed": 1})
