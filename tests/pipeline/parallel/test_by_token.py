"""Sequence parallel: forwards and whole runs on 2 to 4 ranks against one process, traffic, ranks out of step, a killed rank."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ltxkern.pipeline.parallel.by_branch import CFGParallel
from ltxkern.pipeline.parallel.by_token import SequenceParallel, even_parts
from ltxkern.pipeline.sampling.guidance import HQ_GUIDANCE, MultiModalPolicy, SingleBranchPolicy
from tests.pipeline.parallel.jobs import start
from tests.pipeline.parallel.token_ranks import CASES, DEGREES, difference

FORWARDS, BLOCKS, WIDTH, AUDIO_WIDTH, CHANNELS = 7, 2, 64, 32, 16  # of the demo's stage 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every case on every degree, and the runs in which a rank fails."""
    folder = tmp_path_factory.mktemp("sequence")
    return folder, start("tests.pipeline.parallel.token_ranks", folder)


def of_rank(runs: tuple[Path, dict[str, Any]], degree: int, rank: int) -> dict[str, Any]:
    folder, results = runs
    assert results["exit_codes"]["1"] == [0], results["stderr"]
    assert results["exit_codes"][str(degree)] == [0] * degree, results["stderr"]
    found: dict[str, Any] = json.loads((folder / f"{degree}-{rank}.json").read_text())
    return found


def test_parts_differ_by_one_at_most() -> None:
    assert even_parts(23, 4) == [6, 6, 6, 5]
    assert even_parts(4, 3) == [2, 1, 1]
    assert even_parts(8, 2) == [4, 4]


@pytest.mark.parametrize("degree", DEGREES)
def test_a_shared_forward_is_the_undivided_one(runs: tuple[Path, dict[str, Any]], degree: int) -> None:
    """Velocities in fp32; 23 tokens and 4 heads on ranks that divide neither; one branch, and two in one batch."""
    for rank in range(degree):
        found = of_rank(runs, degree, rank)["forwards"]
        assert len(found) == 6
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_one_processs_within_rounding(runs: tuple[Path, dict[str, Any]], degree: int, case: str) -> None:
    """fp32 latents of both stages, at the tolerance of a whole run; every rank ends with them."""
    for rank in range(degree):
        assert of_rank(runs, degree, rank)[case]["error"] < 5e-5


@pytest.mark.parametrize("degree", DEGREES)
def test_a_run_in_bf16_is_as_close_to_fp32_as_one_processs(runs: tuple[Path, dict[str, Any]], degree: int) -> None:
    folder, _ = runs
    alone = difference(load_file(folder / "bf16.safetensors"), load_file(folder / "t2v.safetensors"))
    assert alone > 0
    for rank in range(degree):
        assert of_rank(runs, degree, rank)["bf16"]["error"] <= 1.5 * alone


@pytest.mark.parametrize("degree", [2, 4])
def test_bytes_are_those_of_the_shapes(runs: tuple[Path, dict[str, Any]], degree: int) -> None:
    """The formula of docs/parallel.md, where ranks divide tokens and heads."""
    latents = load_file(runs[0] / "t2v.safetensors")
    tokens, sound = latents["video"][0, 0].numel(), latents["audio"].shape[2]
    own = tokens // degree
    exchanged = (4 * WIDTH + 2 * AUDIO_WIDTH) * own * (degree - 1) // degree
    gathered = sound * AUDIO_WIDTH // degree
    forward = BLOCKS * (exchanged + gathered) + own * CHANNELS
    received = BLOCKS * (exchanged + gathered * (degree - 1)) + own * CHANNELS * (degree - 1)
    agreement = 24
    for rank in range(degree):
        evaluations, collectives, sent, got = of_rank(runs, degree, rank)["t2v"]["traffic"]
        assert (evaluations, collectives) == (FORWARDS, FORWARDS * (4 * BLOCKS + 2))
        assert sent == FORWARDS * (4 * forward + agreement)
        assert got == FORWARDS * (4 * received + agreement * (degree - 1))


def test_ranks_out_of_step_are_told(runs: tuple[Path, dict[str, Any]]) -> None:
    expected = [
        f"rank 1 is out of step with rank 0 in a stage shared by tokens: other {name}"
        for name in ("latents", "sigma", "context")
    ]
    for rank in range(2):
        assert of_rank(runs, 2, rank)["out of step"] == expected


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("killed", -9, "rank 1 is gone: it was killed, or its machine does not answer"),
        ("raises", 2, "the device caught fire"),
    ],
)
def test_a_rank_that_fails_in_stage_2_ends_the_job(
    runs: tuple[Path, dict[str, Any]], how: str, code: int, words: str
) -> None:
    """With one line; a rank that hangs is killed in the end and has another status."""
    results = runs[1]
    assert results["exit_codes"][how] == [2, code]
    assert [line for line in results[how]["said"].splitlines() if line] == [f"ltxkern: error: {words}"]


def test_every_rank_takes_part_in_a_shared_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CFGParallel, "rank", property(lambda self: 1))
    policies = [MultiModalPolicy.build(HQ_GUIDANCE, {}, {}), SingleBranchPolicy.build()]
    assert CFGParallel().stages(policies) == 1
    assert CFGParallel(sequence=SequenceParallel()).stages(policies) == 2


@pytest.mark.parametrize("name", ["heads", "tokens"])
def test_more_ranks_than_there_is_to_share(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(SequenceParallel, "size", property(lambda self: 5))
    SequenceParallel().require(**{name: 5})
    with pytest.raises(ValueError, match=f"5 ranks needs at least as many {name}, got 4: use at most 4 ranks"):
        SequenceParallel().require(**{name: 4})


def test_latents_without_video_are_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audio alone: the transformer runs as it is, and nothing is exchanged."""
    sequence = SequenceParallel()
    asked: list[tuple[Any, ...]] = []

    def transformer(*given: Any) -> tuple[None, torch.Tensor]:
        asked.append(given)
        return None, torch.ones(1)

    audio: Any = object()
    assert sequence.run(transformer, None, audio, ("all",))[1] is not None
    assert asked == [(None, audio, ("all",))]
    assert sequence.traffic.collectives == 0
