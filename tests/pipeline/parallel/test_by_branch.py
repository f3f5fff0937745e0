"""CFG parallel: placement, exact results on 1 to 5 ranks, traffic, failures, and the command line under torchrun."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ltxkern.commands import parallel
from ltxkern.pipeline.parallel.by_branch import CFGParallel, branch_costs, dispatch_branches, run_cfg_parallel
from ltxkern.pipeline.parallel.ranks import Launch, RankError, Ranks
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

ROOT = Path(__file__).parents[3]
CASES = ("t2v", "i2v", "stg", "pair", "batch", "bf16")
BRANCHES = {"t2v": 3, "i2v": 3, "stg": 4, "pair": 2, "batch": 3, "bf16": 3}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}


def launch(module: str, folder: Path) -> dict[str, Any]:
    """Results that a program of ranks left in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results | {"stderr": done.stderr}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every case on every degree."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, launch("tests.pipeline.parallel.branch_ranks", folder)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every failure."""
    return launch("tests.pipeline.parallel.branch_failures", tmp_path_factory.mktemp("failures"))


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


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A process group of one rank."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_one_rank_takes_the_plain_runner() -> None:
    """Degree 1 costs nothing: the very runner of a single process, and no collective."""
    share = CFGParallel()
    denoiser = run_cfg_parallel(MultiModalPolicy.build(HQ_GUIDANCE, {}, {}), forward, parallel=share)
    assert type(denoiser) is GuidedDenoiser
    assert denoiser._runner is run_branches
    denoiser({"video": torch.ones(1, 2, 2)}, 0.5, step=0, substep=False)
    assert (share.traffic.collectives, share.traffic.received) == (0, 0)


class Sharing:
    """Records what it is asked to share."""

    factory: Any = None

    def share_branches(self, given: CFGParallel) -> None:
        self.factory = given


def test_one_process_opens_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    pipeline = Sharing()
    with parallel.job(arguments()) as job:
        assert job.share(pipeline, None, 1) is None
        assert job.leads
        job.finish()
    assert not dist.is_initialized()
    assert pipeline.factory is None


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


def arguments(**changes: Any) -> argparse.Namespace:
    options = {"cfg_parallel_size": None, "stage2_parallel": "none", "max_batch_size": 1, "device": None, "image": []}
    options["pipeline"] = "hq"
    return argparse.Namespace(**{**options, **changes})


@pytest.mark.parametrize(
    ("size", "changes", "words"),
    [
        (
            1,
            {"cfg_parallel_size": 3},
            "cfg-parallel-size is 3 and 1 rank started: start 3 with torchrun --nproc-per-node 3",
        ),
        (4, {"cfg_parallel_size": 2}, "cfg-parallel-size is 2 and 4 ranks started"),
        (1, {"cfg_parallel_size": 0}, "cfg-parallel-size must be at least 1, got 0: use 1"),
        (2, {"max_batch_size": 3}, "use max-batch-size 1"),
        (2, {"device": "cuda:1"}, "would put 2 ranks on one device: use cuda or cpu"),
        (1, {"stage2_parallel": "ring"}, "stage2-parallel must be one of none, ulysses, got 'ring'"),
        (1, {"stage2_parallel": "ulysses"}, "stage2-parallel ulysses needs several ranks: start them with torchrun"),
        (
            2,
            {"stage2_parallel": "ulysses", "pipeline": "one-stage"},
            "needs a stage 2, and pipeline one-stage has none",
        ),
    ],
)
def test_contradictions_are_refused(size: int, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parallel.check_options(arguments(**changes), Launch(0, 0, size))


def test_options_that_fit() -> None:
    parallel.check_options(arguments(cfg_parallel_size=5, device="cuda"), Launch(0, 0, 5))
    parallel.check_options(arguments(max_batch_size=4, device="cuda:1"), Launch())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(0, 0, 1)),
        ({"LOCAL_RANK": "0"}, Launch(0, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launch(3, 1, 8)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Launch(3, 3, 8)),
    ],
)
def test_the_launchers_environment(environment: dict[str, str], expected: Launch) -> None:
    assert Launch.from_environment(environment) == expected


def test_environments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="RANK and WORLD_SIZE must both be set"):
        Launch.from_environment({"RANK": "0"})
    with pytest.raises(ValueError, match="RANK must be a whole number, got 'x'"):
        Launch.from_environment({"RANK": "x", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="RANK must be between 0 and WORLD_SIZE - 1, got 2 of 2"):
        Launch.from_environment({"RANK": "2", "WORLD_SIZE": "2"})


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


def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    """Four ranks, three branches: by default one rank has no part; the file equals one process's."""
    command = [
        "-m",
        "ltxkern",
        "generate",
        "--height",
        "64",
        "--width",
        "128",
        "--num-frames",
        "9",
        "--steps",
        "2",
        "--prompt",
        "kite",
        "--device",
        "cpu",
        "-o",
    ]
    single = [sys.executable, *command, str(tmp_path / "one.safetensors")]
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    several += [*command, str(tmp_path / "four.safetensors")]
    for line in (single, several):
        done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "four.safetensors")]
    assert "cfg parallel on 3 ranks: 5 evaluations exchanged in 6 collectives" in done.stderr
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "four.safetensors").read_bytes()
