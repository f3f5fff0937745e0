"""Batches on Ray workers on a CPU: nothing is lost, what never fits is refused, groups share out branches."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ltxkern.cli import main
from ltxkern.commands.batching.items import Item, Manifest, Outcome
from ltxkern.commands.batching.ray import Placement, run_with_ray
from tests.commands.typed import BATCH, write
from tests.processes import ROOT


class Toy:
    """Makes a worker that needs no model: it fails, dies once, or dies always, as the item says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, placement: Placement) -> Callable[[Item], Outcome]:
        def work(item: Item) -> Outcome:
            mark = self.folder / f"{item.name}.mark"
            if item.options.get("dies") == "always" or (item.options.get("dies") == "once" and not mark.exists()):
                mark.touch()
                os._exit(1)
            if item.options.get("fails"):
                return Outcome(item.name, "failed", "", error="ValueError: bad picture")
            return Outcome(item.name, "done", "", seconds=placement.size)

        return work


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local Ray of two CPUs."""
    ray = pytest.importorskip(
        "ray", reason='RAY IS NOT INSTALLED, so nothing shows that batches spread: pip install "ltxkern[ray]"'
    )
    with pytest.MonkeyPatch.context() as patch:
        # Its workers would give way to every other test, and wait for minutes on a busy machine.
        patch.setenv("RAY_worker_niceness", "0")
        ray.init(
            num_cpus=2,
            num_gpus=0,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
        )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_ray_loses_nothing(tmp_path: Path) -> None:
    """Seven items on two workers: one fails, one kills its worker once, one always."""
    kinds: dict[str, dict[str, Any]] = {"c": {"fails": True}, "d": {"dies": "once"}, "e": {"dies": "always"}}
    items = [Item(name, 1, kinds.get(name, {})) for name in "abcdefg"]
    outcomes: list[Outcome] = []
    run_with_ray(
        items,
        Toy(tmp_path),
        outcomes.append,
        lambda item, reason: Outcome(item.name, "failed", "", error=reason),
        groups=2,
        gpus=0,
    )
    assert sorted(outcome.name for outcome in outcomes) == list("abcdefg")
    failed = {outcome.name: outcome.error for outcome in outcomes if outcome.status == "failed"}
    assert set(failed) == {"c", "e"}
    assert failed["c"] == "ValueError: bad picture"
    assert "its worker died 2 times" in failed["e"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("workers", "size", "needed"), [("2", "2", 4), ("1", "3", 3)])
def test_workers_that_never_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str, size: str, needed: int
) -> None:
    """Ray would leave them waiting, and the batch with them."""
    path = write(tmp_path, {"prompt": "a"}, {"prompt": "b"})
    several = ["--ray", "--workers", workers, "--cfg-parallel-size", size]
    assert main(["batch", str(path), "-o", str(tmp_path / "out"), *BATCH, *several]) == 2
    assert f"{workers} workers of {size} ranks need {needed} CPUs and the Ray cluster has 2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_cfg_group_of_ray_actors(tmp_path: Path) -> None:
    """Two ranks share out the branches of each item; the bits are those of one process, and a bad item stops no other."""
    lines = [{"prompt": "rain", "name": "rain"}, {"prompt": "snow", "height": 65}, {"prompt": "fog", "name": "fog"}]
    path = write(tmp_path, *lines)
    folder = tmp_path / "ray"
    group = ["--ray", "--workers", "1", "--cfg-parallel-size", "2", "--quiet"]
    assert main(["batch", str(path), "-o", str(folder), *BATCH, *group]) == 2
    manifest = Manifest(folder)
    assert {name: outcome.status for name, outcome in manifest.outcomes.items()} == {
        "rain": "done",
        "00002": "failed",
        "fog": "done",
    }
    alone = tmp_path / "alone"
    assert main(["batch", str(path), "-o", str(alone), *BATCH, "--quiet"]) == 2
    for name in ("rain", "fog"):
        assert (folder / f"{name}.safetensors").read_bytes() == (alone / f"{name}.safetensors").read_bytes()
