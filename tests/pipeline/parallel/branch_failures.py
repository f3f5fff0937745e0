"""Jobs of three ranks in which one fails, all at once; each rank runs the command line's own job around a toy forward.

`python -m tests.pipeline.parallel.branch_failures FOLDER` writes results.json: exit codes and what each rank said, by
scenario. What has not ended after two minutes is killed, which its exit codes say.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ltxkern.pipeline.parallel.ranks  # noqa: F401 (imported before the forks, not in each of them)
from ltxkern.commands import parallel
from ltxkern.pipeline.parallel.by_branch import CFGParallel, run_cfg_parallel
from ltxkern.pipeline.sampling.guidance import HQ_GUIDANCE, CFGBranch, MultiModalPolicy
from tests.pipeline.parallel.branch_ranks import launcher

RANKS = 3
EVALUATIONS = 6
# Far beyond what a failure takes to end every rank, so that a busy machine does not decide.
LIMIT_S = 120.0
OPTIONS = {
    "cfg_parallel_size": None,
    "stage2_parallel": "none",
    "max_batch_size": 1,
    "device": "cpu",
    "image": [],
    "seed": 10,
}

Act = Callable[[int, int], None]


def nothing(rank: int, evaluation: int) -> None:
    """Every rank does its work."""


def raises_at(when: int) -> Act:
    """Rank 1 raises inside its forward."""

    def act(rank: int, evaluation: int) -> None:
        if (rank, evaluation) == (1, when):
            raise FloatingPointError("the device caught fire")

    return act


def killed(rank: int, evaluation: int) -> None:
    """Rank 2 is killed inside its forward; the others wait in the collective."""
    if (rank, evaluation) == (2, 3):
        os.kill(os.getpid(), signal.SIGKILL)


def run(
    rank: int,
    *,
    act: Act = nothing,
    options: Mapping[str, Any] | None = None,
    context: float = 1.0,
    start: float = 0.0,
    after: Callable[[int], None] | None = None,
) -> None:
    """One rank of a job: the evaluations of a stage, then the wait for rank 0."""
    arguments = argparse.Namespace(**{**OPTIONS, **(options or {})})
    with parallel.job(arguments) as job:
        assert job.ranks is not None
        job.ranks.compare({"a second comparison": "alike"})
        contexts = {"video_context": torch.full((1, 2, 4), context)}
        policy = MultiModalPolicy.build(HQ_GUIDANCE, contexts, {"video_context": torch.zeros(1, 2, 4)})
        evaluation = 0

        def forward(latents: dict[str, Tensor], sigma: float, branch: CFGBranch) -> dict[str, Tensor]:
            act(rank, evaluation)
            return {name: latent * sigma for name, latent in latents.items()}

        denoiser = run_cfg_parallel(policy, forward, parallel=CFGParallel(ranks=job.ranks))
        latents = {"video": torch.linspace(start, 1.0, 24).view(1, 6, 4), "audio": torch.ones(1, 3, 4)}
        for evaluation in range(1, EVALUATIONS + 1):
            latents = denoiser(latents, 1.0 / evaluation, step=evaluation, substep=False)
        if after is not None:
            after(rank)
        job.finish()


def lead_killed(rank: int) -> None:
    """Rank 0 is killed in stage 2; the others wait for it."""
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def lead_raises(rank: int) -> None:
    """Rank 0 fails in stage 2 or while it writes."""
    if rank == 0:
        raise OSError("the disk is full")


def waiting_killed(rank: int) -> None:
    """Rank 1 is killed while it waits for rank 0, which goes on to finish its work."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        time.sleep(1.0)


def late(rank: int) -> None:
    """Rank 1 comes to the end long after rank 0, and lives."""
    if rank == 1:
        time.sleep(13.0)


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    "good": lambda rank: {},
    "late": lambda rank: {"after": late},
    "raises": lambda rank: {"act": raises_at(3)},
    "raises at once": lambda rank: {"act": raises_at(1)},
    "killed": lambda rank: {"act": killed},
    "lead killed": lambda rank: {"after": lead_killed},
    "waiting killed": lambda rank: {"after": waiting_killed},
    "lead raises": lambda rank: {"after": lead_raises},
    "other seed": lambda rank: {"options": {"seed": 11 if rank == 2 else 10}},
    "refused": lambda rank: {"options": {"max_batch_size": 2}},
    "other prompt": lambda rank: {"context": 2.0 if rank == 1 else 1.0},
    "other latents": lambda rank: {"start": 0.5 if rank == 1 else 0.0},
}


def launched(folder: Path, port: int, name: str, rank: int, size: int) -> None:
    """Makes this process one rank of a job, its stderr in a file."""
    with (folder / f"{name} {rank}.txt").open("wb") as file:
        os.dup2(file.fileno(), 2)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    # The store belongs to the launcher, as with torchrun; each scenario stands for one of its jobs.
    os.environ |= place | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": name}
    torch.set_num_threads(1)


def child(folder: Path, port: int, name: str, rank: int) -> None:
    """One rank of a scenario."""
    launched(folder, port, name, rank, RANKS)
    run(rank, **SCENARIOS[name](rank))


def main(folder: Path) -> None:
    """All scenarios side by side."""
    context = multiprocessing.get_context("fork")
    results: dict[str, dict[str, Any]] = {}
    with launcher() as port:
        started = time.monotonic()
        jobs = {
            name: [context.Process(target=child, args=(folder, port, name, rank)) for rank in range(RANKS)]
            for name in SCENARIOS
        }
        for processes in jobs.values():
            for process in processes:
                process.start()
        for process in (process for processes in jobs.values() for process in processes):
            process.join(max(0.0, started + LIMIT_S - time.monotonic()))
        for name, processes in jobs.items():
            for process in processes:
                process.kill()
                process.join()
            results[name] = {
                "exit_codes": [process.exitcode for process in processes],
                "said": [(folder / f"{name} {rank}.txt").read_text() for rank in range(RANKS)],
            }
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
