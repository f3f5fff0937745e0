"""The ranks of a job: the launcher's environment, ranks that do not answer, interrupts."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from ltxkern.commands import parallel
from ltxkern.pipeline.parallel.ranks import RankError, Ranks, Started
from tests.pipeline.parallel.jobs import arguments


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Started(0, 0, 1)),
        ({"LOCAL_RANK": "0"}, Started(0, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Started(3, 1, 8)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Started(3, 3, 8)),
    ],
)
def test_the_launchers_environment(environment: dict[str, str], expected: Started) -> None:
    assert Started.from_environment(environment) == expected


def test_environments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="RANK and WORLD_SIZE must both be set"):
        Started.from_environment({"RANK": "0"})
    with pytest.raises(ValueError, match="RANK must be a whole number, got 'x'"):
        Started.from_environment({"RANK": "x", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="RANK must be between 0 and WORLD_SIZE - 1, got 2 of 2"):
        Started.from_environment({"RANK": "2", "WORLD_SIZE": "2"})


def test_a_rank_that_never_arrives(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RankError, match="rank 1 did not answer within 3 s"), Ranks(store, 0, 2, limit_s=5) as ranks:
        ranks.compare({"seed": 10})


@pytest.fixture
def job_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Rank 0 of a job whose rank 1 has failed; `parallel.job` joins it."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("failure", "1\nrank 1 failed in branch neg")
    store.set("bye/1", "1")
    ranks = Ranks(store, 0, 2)
    monkeypatch.setattr(ranks, "compare", lambda facts: None)
    monkeypatch.setattr(Ranks, "meet", lambda *_, **__: ranks)
    return ranks


def heard_of_failure(ranks: Ranks) -> None:
    """The watch knows, and had time to interrupt, if it does so at once."""
    while ranks._watch.failure is None:
        time.sleep(0.001)
    time.sleep(0.05)


def test_a_rank_that_leaves_by_itself_is_not_interrupted(job_of_two: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that find the same fault together: the others' message must not cut this one's way out short."""

    def leave_by_itself() -> None:
        with job_of_two:
            heard_of_failure(job_of_two)
            raise RankError("its latents differ")

    monkeypatch.setattr("ltxkern.pipeline.parallel.ranks._BEAT_S", 30.0)
    with pytest.raises(RankError, match="its latents differ"):
        leave_by_itself()
    assert not job_of_two._watch.interrupted


@pytest.mark.parametrize("by_watch", [True, False])
def test_an_interrupt_while_the_block_is_left(
    job_of_two: Ranks, by_watch: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The watch's ends the rank as any failure does; a person's goes on as one."""

    def leave(*_: object) -> None:
        job_of_two._watch.acknowledge()
        job_of_two._watch.interrupted = by_watch
        raise KeyboardInterrupt

    def work() -> None:
        with parallel.job(arguments(device="cpu")) as job:
            assert job.ranks is job_of_two
            heard_of_failure(job_of_two)

    monkeypatch.setattr("ltxkern.pipeline.parallel.ranks._BEAT_S", 30.0)
    monkeypatch.setattr(Ranks, "__exit__", leave)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as raised:
        work()
    expected = SystemExit(2) if by_watch else KeyboardInterrupt()
    assert (raised.type, raised.value.args) == (type(expected), expected.args)
    # Rank 1 has said it.
    assert capsys.readouterr().err == ""
