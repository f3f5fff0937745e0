"""The scripts behind docs/parallel.md run: on one rank, on two, and the exchange whose bytes the document quotes."""

import re

import pytest

from tests.processes import ROOT, python

SMALL = ["--height", "64", "--width", "128", "--num-frames", "9", "--device", "cpu"]


def printed(script: str, *options: str, ranks: int = 1) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return python(*launcher, ROOT / "bench" / script, *options, seconds=200).stdout


def test_one_rank_is_compared_with_none() -> None:
    said = printed("ranks_measured.py", *SMALL, "--rounds", "1")
    assert re.search(r"\| stage 1 undivided \| \d+\.\d+ ms \| 1\.000 \|\n\| stage 1 by branches \| ", said)
    assert "0 evaluations exchanged in 0 collectives" in said


def test_scaling_is_simulated() -> None:
    said = printed("cfg_scaling.py", *SMALL, "--repeats", "1")
    assert len(re.findall(r"^\| [1-4] \| ", said, flags=re.MULTILINE)) == 8


@pytest.mark.slow
def test_two_ranks_exchange_what_the_document_says() -> None:
    """The published shapes: bytes of a forward and of the seven forwards of stage 2."""
    said = printed("ranks_measured.py", "--exchange", "--device", "cpu", ranks=2)
    row = next(line for line in (ROOT / "docs" / "parallel.md").read_text().splitlines() if line.startswith("| 2 | 12"))
    forward, stage = row.split("|")[5:7]
    assert f"{forward.strip()} received per forward and rank | {stage.strip()} in stage 2" in said
