"""The command on several ranks: options that contradict each other, one process, and torchrun."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ltxkern.commands import parallel
from ltxkern.pipeline.parallel.by_branch import CFGParallel
from ltxkern.pipeline.parallel.ranks import Started
from tests.commands.typed import SMALL
from tests.pipeline.parallel.jobs import arguments
from tests.processes import python


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
        parallel.check_options(arguments(**changes), Started(0, 0, size))


def test_options_that_fit() -> None:
    parallel.check_options(arguments(cfg_parallel_size=5, device="cuda"), Started(0, 0, 5))
    parallel.check_options(arguments(max_batch_size=4, device="cuda:1"), Started())


def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    """Four ranks, three branches: by default one rank has no part; the file equals one process's."""
    command = ["-m", "ltxkern", "generate", *SMALL[:-1], "--device", "cpu", "-o"]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    python(*command, tmp_path / "one.safetensors", seconds=200)
    done = python(*several, *command, tmp_path / "four.safetensors", seconds=200)
    assert done.stdout.splitlines() == [str(tmp_path / "four.safetensors")]
    assert "cfg parallel on 3 ranks: 5 evaluations exchanged in 6 collectives" in done.stderr
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "four.safetensors").read_bytes()
