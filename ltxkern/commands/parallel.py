"""Running one command on several ranks that torchrun started: options, the job around the work, and who speaks."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltxkern.commands import progress
from ltxkern.commands.options import expected_errors

if TYPE_CHECKING:
    from ltxkern.pipeline.parallel.by_branch import CFGParallel
    from ltxkern.pipeline.parallel.ranks import Ranks, Started

OWN_AFFAIR = ("run", "parser", "command", *progress.OPTIONS, "verbose", "config", "output")
STAGE2_PARALLEL = ("none", "ulysses")

logger = logging.getLogger(__name__)


def add_parallel_options(parser: argparse.ArgumentParser) -> None:
    """How several ranks work together."""
    group = parser.add_argument_group("several GPUs (start with torchrun --nproc-per-node N -m ltxkern ...)")
    group.add_argument(
        "--cfg-parallel-size",
        type=int,
        metavar="N",
        help="ranks that share out the guidance branches of stage 1 (default: all of them, at most one per branch)",
    )
    group.add_argument(
        "--stage2-parallel",
        default="none",
        metavar="HOW",
        help="none (default): rank 0 runs stage 2; ulysses: all ranks share its tokens, equal up to rounding",
    )


@dataclass
class Job:
    """One command on one or several ranks; `ranks` is None on one."""

    ranks: Ranks | None
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this rank prints and writes."""
        return self.ranks is None or self.ranks.rank == 0

    def share(self, pipeline: Any, request: Any, wanted: int | None, stage2: str = "none") -> CFGParallel | None:
        """Let the ranks of the job share out the pipeline's guidance branches, and with "ulysses" the tokens of stage 2.

        Returns:
            The ranks' side of it; None where this rank has no part: one rank, or more ranks than branches.
        """
        if self.ranks is None:
            return None
        import torch.distributed as dist

        from ltxkern.pipeline.parallel.by_branch import CFGParallel
        from ltxkern.pipeline.parallel.by_token import SequenceParallel

        by_tokens = stage2 == "ulysses"
        if wanted is not None:
            degree = wanted
        else:
            degree = self.size if by_tokens else min(self.size, request.stages(pipeline.geometry)[0].branches)
        group = None if degree == self.size else dist.new_group(range(degree))
        if self.ranks.rank >= degree:
            return None
        parallel = CFGParallel(group, self.ranks)
        if by_tokens:
            parallel.sequence = SequenceParallel(group, self.ranks)
        pipeline.share_branches(parallel)
        return parallel

    def finish(self) -> None:
        """Everybody leaves together, once the lead has written its results."""
        if self.ranks is not None:
            self.ranks.finish()


@contextlib.contextmanager
def job(arguments: argparse.Namespace) -> Iterator[Job]:
    """Join the ranks of the job, if there are several, and leave together: one message, the same exit status everywhere.

    Raises:
        ValueError: options that contradict each other or the number of ranks.
        SystemExit: status 2, on every rank, where one of several failed.
    """
    from ltxkern.pipeline.parallel.ranks import EXIT_FAILED, RankError, Ranks, Started

    started = Started.from_environment()
    if started.size == 1:
        check_options(arguments, started)
        yield Job(None)
        return
    if started.rank != 0:
        logging.getLogger("ltxkern").setLevel(logging.ERROR)
    ranks: Ranks | None = None
    spoken: tuple[type[BaseException], ...] = (RankError, *expected_errors())
    try:
        ranks = Ranks.meet(started, backend=_claim_device(arguments, started))
        try:
            with ranks:
                ranks.compare(_facts(arguments))
                check_options(arguments, started)
                yield Job(ranks, started.size)
        except KeyboardInterrupt as interrupt:
            ranks.require_person(interrupt)
            raise
        _close(ranks)
    except spoken as error:
        logger.info("rank %d left", started.rank, exc_info=True)
        if ranks is None or ranks.reports:
            print(f"ltxkern: error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from error


def report_traffic(shared: CFGParallel | None) -> None:
    """Print what the ranks exchanged; nothing where a rank was alone."""
    if shared is None:
        return
    print(f"cfg parallel on {shared.size} ranks: {shared.traffic}", file=sys.stderr)
    if shared.sequence is not None:
        print(f"stage 2 on {shared.size} ranks: {shared.sequence.traffic}", file=sys.stderr)


def check_options(arguments: argparse.Namespace, started: Started) -> None:
    """Refuse parallel options that contradict each other, the model options or the number of ranks.

    Raises:
        ValueError: one sentence.
    """
    wanted, ranks = arguments.cfg_parallel_size, started.size
    if arguments.stage2_parallel not in STAGE2_PARALLEL:
        raise ValueError(
            f"stage2-parallel must be one of {', '.join(STAGE2_PARALLEL)}, got {arguments.stage2_parallel!r}"
        )
    if arguments.stage2_parallel == "ulysses" and ranks == 1:
        raise ValueError("stage2-parallel ulysses needs several ranks: start them with torchrun, or use none")
    from ltxkern.pipeline.run.presets import find_preset

    if arguments.stage2_parallel == "ulysses" and find_preset(arguments.pipeline).stages == 1:
        raise ValueError(
            f"stage2-parallel ulysses needs a stage 2, and pipeline {arguments.pipeline} has none: use none"
        )
    if wanted is not None and wanted < 1:
        raise ValueError(f"cfg-parallel-size must be at least 1, got {wanted}: use 1")
    if wanted is not None and wanted != ranks:
        how = f"torchrun --nproc-per-node {wanted} -m ltxkern ... --cfg-parallel-size {wanted}"
        raise ValueError(
            f"cfg-parallel-size is {wanted} and {ranks} rank{'s' * (ranks > 1)} started: start {wanted} with {how}"
        )
    if ranks > 1 and arguments.max_batch_size > 1:
        raise ValueError(
            f"max-batch-size {arguments.max_batch_size} takes guidance branches into one forward, "
            f"{ranks} ranks share them out: use max-batch-size 1"
        )
    if ranks > 1 and arguments.device and arguments.device not in ("cpu", "cuda"):
        raise ValueError(f"device {arguments.device} would put {ranks} ranks on one device: use cuda or cpu")


def _claim_device(arguments: argparse.Namespace, started: Started) -> str:
    """Give the rank its own GPU; the process-group backend that goes with the device."""
    import torch

    if arguments.device == "cpu" or (arguments.device is None and not torch.cuda.is_available()):
        return "gloo"
    count = torch.cuda.device_count()
    if started.local_rank >= count:
        raise ValueError(
            f"{started.size} ranks started and this machine has {count} CUDA devices: start one rank per device"
        )
    torch.cuda.set_device(started.local_rank)
    return "nccl"


def _facts(arguments: argparse.Namespace) -> dict[str, object]:
    """What must be the same on every rank for the ranks to compute the same."""
    import torch

    import ltxkern

    facts: dict[str, object] = {name: value for name, value in vars(arguments).items() if name not in OWN_AFFAIR}
    for text in arguments.image:
        file = next((path for path in _prefixes(text) if path.is_file()), None)
        facts[f"content of {text}"] = "no file" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    facts |= {"version of ltxkern": ltxkern.__version__, "version of torch": torch.__version__}
    return facts | {"number of threads": torch.get_num_threads()}


def _prefixes(text: str) -> Iterator[Path]:
    """The paths that "PATH[:FRAME[:STRENGTH]]" may mean."""
    parts = text.split(":")
    for count in range(len(parts), 0, -1):
        yield Path(os.path.expanduser(":".join(parts[:count])))


def _close(ranks: Ranks) -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
    logger.info("rank %d done", ranks.rank)
