"""CFG parallel: placement, exact results on 1 to 5 ranks, traffic, failures, and the command line under torchrun."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ltxkern.pipeline.parallel.by_branch import CFGParallel, branch_costs, dispatch_branches, run_cfg_parallel
from ltxkern.pipeline.sampling.guidance import (
    HQ_GUIDANCE,
    TWO_STAGE_GUIDANCE,
    CFGBranch,
    GuidanceRequest,
    GuidedDenoiser,
    MultiModalPolicy,
    SingleBranchPolicy,
    run_branches,
)
from tests.pipeline.parallel.branch_failures import EVALUATIONS, SCENARIOS
from tests.pipeline.parallel.branch_ranks import DEGREES
from tests.pipeline.parallel.jobs import start

CASES = ("t2v", "i2v", "stg", "pair", "batch", "bf16")
BRANCHES = {"t2v": 3, "i2v": 3, "stg": 4, "pair": 2, "batch": 3, "bf16": 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every case on every degree."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, start("tests.pipeline.parallel.branch_ranks", folder)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every failure."""
    return start("tests.pipeline.parallel.branch_failures", tmp_path_factory.mktemp("failures"))


@pytest.mark.parametrize(
    ("n", "ranks", "expected"),
    [
        (3, 1, [(0, 1, 2)]),
        (3, 2, [(0, 2), (1,)]),
        (3, 3, [(0,), (1,), (2,)]),
        (3, 5, [(0,), (1,), (2,), (), ()]),
        (4, 3, [(0, 3), (1,), (2,)]),
        (7, 3, [(0, 3, 6), (1, 4), (2, 5)]),
        (1, 2, [(0,), ()]),
    ],
)
def test_equal_branches_go_round(n: int, ranks: int, expected: list[tuple[int, ...]]) -> None:
    assert dispatch_branches(n, ranks) == expected


@pytest.mark.parametrize(
    ("costs", "ranks", "expected"),
    [
        ([1.0, 1.0, 0.4, 0.5], 3, [(0,), (1,), (2, 3)]),
        ([1.0, 1.0, 0.9], 2, [(0, 2), (1,)]),
        ([1.0, 5.0, 1.0, 1.0], 2, [(0, 2, 3), (1,)]),
        ([2.0, 3.0, 2.0], 3, [(0,), (1,), (2,)]),
    ],
)
def test_dear_branches_are_spread(costs: list[float], ranks: int, expected: list[tuple[int, ...]]) -> None:
    placed = dispatch_branches(len(costs), ranks, costs)
    assert sorted(placed[1:]) == sorted(expected[1:])
    assert placed[0] == expected[0]


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("ranks", range(1, 7))
def test_every_branch_is_placed_once(n: int, ranks: int) -> None:
    placed = dispatch_branches(n, ranks, [1.0 + (index * 7 % 5) for index in range(n)])
    assert len(placed) == ranks
    assert sorted(index for indices in placed for index in indices) == list(range(n))
    assert 0 in placed[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 1), "n must be at least 1, got 0"),
        ((1, 0), "ranks must be at least 1, got 0"),
        ((2, 1, [1.0]), "costs must be 2 positive numbers"),
        ((2, 1, [1.0, 0.0]), "costs must be 2 positive numbers"),
        ((1, 1, [float("inf")]), "costs must be 1 positive numbers"),
    ],
)
def test_placements_that_are_none(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dispatch_branches(*arguments)


def test_branches_that_leave_attention_out_cost_less() -> None:
    policy = MultiModalPolicy.build(TWO_STAGE_GUIDANCE, {}, {})
    cond, neg, perturbed, modality = branch_costs(policy.branches)
    assert cond == neg == 1.0
    assert modality < perturbed < 1.0


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("case", CASES)
def test_ranks_give_the_bits_of_one_process(runs: tuple[Path, dict[str, Any]], degree: int, case: str) -> None:
    folder, results = runs
    assert results["exit_codes"]["1"] == [0], results["stderr"]
    assert results["exit_codes"][str(degree)] == [0] * degree, results["stderr"]
    for rank in range(degree):
        found = json.loads((folder / f"{degree}-{rank}.json").read_text())[case]["equal"]
        expected = {"stage1_video", "stage1_audio"}
        if rank == 0:
            expected |= {"video", "audio", "upsampled_video", "stage2_audio"}
        assert set(found) >= expected
        assert all(found.values()), found


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("case", CASES)
def test_one_collective_an_evaluation(runs: tuple[Path, dict[str, Any]], degree: int, case: str) -> None:
    """Two steps and the clean end are five evaluations; one more all-gather of 2048 bytes agrees on the stage."""
    folder, _ = runs
    latents = load_file(folder / f"{case}.safetensors")
    extra = 4 * 16 if case == "i2v" else 0  # the keyframe's two tokens of 16 channels, fp32, are denoised along
    sizes = [latents[name].nbytes for name in ("stage1_video", "stage1_audio")]
    one = sum(-(-(size + more) // 256) * 256 for size, more in zip(sizes, (2 * extra, 0), strict=True))
    slot = 512 + -(-BRANCHES[case] // degree) * one
    for rank in range(degree):
        found = json.loads((folder / f"{degree}-{rank}.json").read_text())[case]
        assert (found["evaluations"], found["collectives"]) == (5, 6)
        assert found["received"] == (degree - 1) * (2048 + 5 * slot)


@pytest.mark.parametrize("scenario", ["good", "late"])
def test_a_job_without_failure_ends_well(failures: dict[str, Any], scenario: str) -> None:
    assert failures[scenario]["exit_codes"] == [0, 0, 0]
    assert failures[scenario]["said"] == ["", "", ""]


@pytest.mark.parametrize(
    ("scenario", "codes", "words"),
    [
        ("raises", [2, 2, 2], "rank 1 failed in branch neg: FloatingPointError: the device caught fire"),
        ("raises at once", [2, 2, 2], "rank 1 failed in branch neg: FloatingPointError: the device caught fire"),
        ("killed", [2, 2, -9], "rank 2 is gone: it was killed, or its machine does not answer"),
        ("lead killed", [-9, 2, 2], "rank 0 is gone: it was killed, or its machine does not answer"),
        ("waiting killed", [2, -9, 2], "rank 1 is gone: it was killed, or its machine does not answer"),
        ("lead raises", [2, 2, 2], "the disk is full"),
        (
            "other seed",
            [2, 2, 2],
            "rank 2 was started with other arguments than rank 0: seed is 11, on rank 0 it is 10",
        ),
        ("refused", [2, 2, 2], "max-batch-size 2 takes guidance branches into one forward"),
        ("other prompt", [2, 2, 2], "rank 1 has another video_context in branch cond than rank 0"),
        ("other latents", [2, 2, 2], "rank 1 is out of step with rank 0: its latents differ"),
    ],
)
def test_one_failure_ends_every_rank(failures: dict[str, Any], scenario: str, codes: list[int], words: str) -> None:
    """Each with a status that is not 0, and one message among them; one that hangs is killed and has another status."""
    found = failures[scenario]
    assert found["exit_codes"] == codes, found
    lines = [line for text in found["said"] for line in text.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("ltxkern: error: ")
    assert words in lines[0]


def test_every_scenario_is_checked(failures: dict[str, Any]) -> None:
    assert set(failures) == {*SCENARIOS, "stderr"}
    assert EVALUATIONS > 3


def forward(latents: dict[str, torch.Tensor], sigma: float, branch: CFGBranch) -> dict[str, torch.Tensor]:
    return {name: latent * sigma for name, latent in latents.items()}


@pytest.mark.usefixtures("alone")
def test_one_rank_takes_the_plain_runner() -> None:
    """Degree 1 costs nothing: the very runner of a single process, and no collective."""
    share = CFGParallel()
    denoiser = run_cfg_parallel(MultiModalPolicy.build(HQ_GUIDANCE, {}, {}), forward, parallel=share)
    assert type(denoiser) is GuidedDenoiser
    assert denoiser._runner is run_branches
    denoiser({"video": torch.ones(1, 2, 2)}, 0.5, step=0, substep=False)
    assert (share.traffic.collectives, share.traffic.received) == (0, 0)


@pytest.mark.usefixtures("alone")
def test_single_branch_stages_at_the_end_are_the_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    guided = MultiModalPolicy.build(HQ_GUIDANCE, {}, {})
    single = SingleBranchPolicy.build()
    void = MultiModalPolicy.build(GuidanceRequest(), {})
    share = CFGParallel()
    assert share.stages([guided, single]) == 2
    monkeypatch.setattr(CFGParallel, "rank", property(lambda self: 1))
    assert share.stages([guided, single]) == 1
    assert share.stages([single, guided, single]) == 2
    assert share.stages([void, single]) == 0
    assert type(share.denoiser(single, forward)) is GuidedDenoiser
