"""Training of the demo's parts: what was stopped and went on ends as what ran through, and every part takes its steps."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from threading import Timer

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tools.demo_model import training
from tools.demo_model.muon import Muon, orthogonalise
from tools.demo_model.training import Part, checkpoint, load_modules, progress_of


class Line(Part):
    """Fits a small network to a line; stops itself where a test asks for it."""

    name = "line"
    steps = 60
    evaluate_steps = 50
    warmup = 5
    stop_at: int | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.layer = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        self.modules = {"layer": self.layer}
        self.optimiser = Muon(self.parameters().items(), 0.02, vector_lr=0.01)

    def losses(self, draws: Random, step: int) -> dict[str, Tensor]:
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.randn(8, 4) * draws.uniform(0.5, 1)
        return {"error": (self.layer(x) - 2 * x).square().mean()}

    def evaluate(self) -> dict[str, float]:
        return {"test": 1.0}


class StoppedLine(Line):
    stop_at = 23


class OneDies(Line):
    """Of two workers one dies, and the other waits."""

    def __init__(self, folder: Path) -> None:
        if dist.get_rank():
            os._exit(3)
        time.sleep(600)


def one_dies(numbers: list[int]) -> None:
    if numbers == [1]:
        os._exit(3)
    time.sleep(600)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in before.items():
        signal.signal(number, handler)


def run(part: type[Part], folder: Path, name: str) -> dict[str, Tensor]:
    training._work(part, folder, part.steps, 0, 1, str(folder / f"rendezvous-{name}"))
    return torch.load(checkpoint(folder, "line"))["modules"]["layer"]


def test_a_stopped_training_ends_as_one_that_ran_through(tmp_path: Path) -> None:
    (tmp_path / "through").mkdir()
    (tmp_path / "stopped").mkdir()
    through = run(Line, tmp_path / "through", "a")
    run(StoppedLine, tmp_path / "stopped", "b")
    assert progress_of(tmp_path / "stopped", "line") == 24
    again = run(Line, tmp_path / "stopped", "c")
    assert progress_of(tmp_path / "stopped", "line") == 60
    assert all(torch.equal(through[name], again[name]) for name in through)
    lines = [json.loads(line) for line in (tmp_path / "through" / "line.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 60]
    assert [line["test"] for line in lines] == [1.0, 1.0]
    assert lines[1]["error"] < lines[0]["error"]


def test_two_workers_stop_together_and_go_on(tmp_path: Path) -> None:
    ends = []
    for name, parts in (("through", (Line,)), ("stopped", (StoppedLine, Line))):
        for part in parts:
            training.train(part, tmp_path / name, Line.steps, workers=2)
            assert progress_of(tmp_path / name, "line") == (24 if part is StoppedLine else 60)
        ends.append(torch.load(checkpoint(tmp_path / name, "line"))["modules"]["layer"])
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


def test_the_rate_rises_stays_and_falls() -> None:
    part = Line.__new__(Line)
    rates = [part.rate(step) for step in range(part.steps)]
    assert rates[0] == 0.2
    assert rates[20] == 1
    assert rates[-1] < 0.06
    assert rates == sorted(rates[:20]) + sorted(rates[20:], reverse=True)


def test_weights_of_a_part_are_read_by_the_next(tmp_path: Path) -> None:
    through = run(Line, tmp_path, "a")
    other = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    load_modules(tmp_path, "line", {"layer": other})
    assert all(torch.equal(through[name], tensor) for name, tensor in other.state_dict().items())


@pytest.fixture
def _at_most_60_seconds() -> Iterator[None]:
    """Workers that hang are killed, so that the test fails."""
    timer = Timer(60, lambda: [process.kill() for process in mp.active_children()])
    began = time.monotonic()
    timer.start()
    yield
    timer.cancel()
    assert time.monotonic() - began < 60
    assert mp.active_children() == []


@pytest.mark.usefixtures("_at_most_60_seconds")
@pytest.mark.parametrize("moment", [0.1, 1.2])
def test_a_training_that_is_stopped_while_it_starts_leaves_no_process(moment: float, tmp_path: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    Timer(moment, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit, match="the same command goes on"):
        training.train(Line, tmp_path, 10**9, workers=2)
    assert progress_of(tmp_path, "line") > 0


@pytest.mark.usefixtures("_at_most_60_seconds")
def test_the_other_workers_are_ended_where_one_dies(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        training.train(OneDies, tmp_path, 60, workers=2)
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        training.shared_out(one_dies, (), [0, 1], workers=2)


@pytest.mark.parametrize("shape", [(8, 8), (4, 90), (90, 4), (3, 16, 40)])
def test_orthogonal_matrices(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.6
    assert values.max() < 1.4


def test_tables_follow_adam() -> None:
    layer = nn.Linear(3, 3)
    names = {"weight": 2, "bias": 1}
    optimiser = Muon(layer.named_parameters(), 0.1, vector_lr=0.2, tables=("weight",))
    assert [len(group["params"]) for group in optimiser.param_groups] == [0, len(names)]
