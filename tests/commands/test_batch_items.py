"""Batches: reading items, resuming, per-item errors, the command in one process, and Ray workers on a CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ltxkern.cli import main
from ltxkern.commands.batch_items import MANIFEST, Item, Manifest, Outcome, attempt, digest, pending, read_items
from ltxkern.commands.batch_ray import Placement, run_with_ray

SMALL = [
    "--height",
    "64",
    "--width",
    "128",
    "--num-frames",
    "9",
    "--steps",
    "2",
    "--device",
    "cpu",
    "--format",
    "latents",
]


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_items_are_lines(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a"}, "", {"prompt": "b", "name": "kite.2", "num-frames": 9})
    first, second = read_items(path)
    assert (first.name, first.line, first.options, first.error) == ("00001", 1, {"prompt": "a"}, None)
    assert (second.name, second.line, second.options) == ("kite.2", 3, {"prompt": "b", "num_frames": 9})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{prompt}", "line 2 is not JSON"),
        ("[1]", "line 2 must be an object"),
        ({"prompt": "b", "name": "../up"}, "line 2: name must be letters, digits, dots and dashes"),
        ({"prompt": "b", "name": 7}, "line 2: name must be letters"),
        ({"prompt": "b", "name": "00001"}, "line 2: the name '00001' is taken"),
    ],
)
def test_a_bad_line_spoils_no_other(tmp_path: Path, line: Any, words: str) -> None:
    first, second = read_items(write(tmp_path, {"prompt": "a"}, line))
    assert first.error is None
    assert second.error is not None
    assert words in second.error


def test_files_without_items(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_items(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is empty"):
        read_items(write(tmp_path, "", " "))


def done(item: Item, folder: Path, content: str = "result") -> Outcome:
    output = folder / f"{item.name}.mp4"
    output.write_text(content)
    return Outcome(item.name, "done", digest(item, {}), output.name, len(content), 1.0)


def test_what_is_done_does_not_run_again(tmp_path: Path) -> None:
    items = [Item(name, 1, {"prompt": name}) for name in ("a", "b", "c", "d", "e")]
    manifest = Manifest(tmp_path)
    for item in items[:4]:
        manifest.add(done(item, tmp_path))
    manifest.add(Outcome("b", "failed", digest(items[1], {}), error="later"))
    (tmp_path / "c.mp4").write_text("trunc")
    (tmp_path / "d.mp4").unlink()
    assert [item.name for item in pending(items, Manifest(tmp_path), {})] == ["b", "c", "d", "e"]
    changed = [Item("a", 1, {"prompt": "other"})]
    assert list(pending(changed, Manifest(tmp_path), {})) == changed
    assert list(pending(items[:1], Manifest(tmp_path), {"steps": 3})) == items[:1]


def test_a_manifest_that_was_cut_off(tmp_path: Path) -> None:
    items = [Item(name, 1, {}) for name in ("a", "b", "c")]
    for item in items[:2]:
        Manifest(tmp_path).add(done(item, tmp_path))
    path = tmp_path / MANIFEST
    path.write_bytes(path.read_bytes()[:-20])
    manifest = Manifest(tmp_path)
    assert [item.name for item in pending(items, manifest, {})] == ["b", "c"]
    manifest.add(done(items[2], tmp_path))
    assert [item.name for item in pending(items, Manifest(tmp_path), {})] == ["b"]


def test_errors_of_an_item_are_its_outcome(tmp_path: Path) -> None:
    def fails(item: Item) -> Path:
        raise ValueError("no such picture")

    item = Item("a", 1, {})
    outcome = attempt(item, "d", fails, (ValueError,))
    assert (outcome.status, outcome.error) == ("failed", "ValueError: no such picture")
    with pytest.raises(ValueError, match="no such picture"):
        attempt(item, "d", fails, (OSError,))
    spoilt = attempt(Item("a", 1, {}, "line 1 is not JSON"), "d", fails, ())
    assert (spoilt.status, spoilt.error) == ("failed", "line 1 is not JSON")


def test_the_command_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bad option, one bad size, two good items; run again with one repaired, only that one runs."""
    lines: list[Any] = [
        {"prompt": "a kite", "name": "kite"},
        {"prompt": "rain", "seed": 3, "name": "rain"},
        {"prompt": "snow", "height": 65, "name": "snow"},
        {"prompt": "fog", "colour": "grey", "name": "fog"},
    ]
    folder = tmp_path / "out"
    command = ["batch", str(write(tmp_path, *lines)), "-o", str(folder), *SMALL]
    assert main(command) == 2
    said = capsys.readouterr()
    assert f"2 of 4 done (0 before), in {folder}" in said.out
    assert "snow failed: ValueError: height 65 is not a multiple of 64: use 64 or 128" in said.err
    assert "fog failed: ValueError: unknown option 'colour'" in said.err
    stamps = {name: (folder / f"{name}.safetensors").stat().st_mtime_ns for name in ("kite", "rain")}
    lines[2]["height"] = 64
    write(tmp_path, *lines[:3])
    assert main(command) == 0
    assert "3 of 3 done (2 before)" in capsys.readouterr().out
    assert stamps == {name: (folder / f"{name}.safetensors").stat().st_mtime_ns for name in stamps}
    assert (folder / "snow.safetensors").is_file()


def test_an_item_equals_the_same_generate(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    path = write(tmp_path, {"prompt": "a kite", "seed": 7, "name": "kite"}, {"prompt": "rain", "name": "rain"})
    assert main(["batch", str(path), "-o", str(folder), *SMALL, "--quiet"]) == 0
    alone = tmp_path / "alone.safetensors"
    small = SMALL[: SMALL.index("--format")]
    assert main(["generate", "--prompt", "rain", *small, "-o", str(alone), "--quiet"]) == 0
    assert (folder / "rain.safetensors").read_bytes() == alone.read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "gif"], "format must be one of mp4, latents, frames, got 'gif'"),
        (["--workers", "2"], "workers must be at least 1 and needs --ray, got 2"),
        (["--cfg-parallel-size", "2"], "cfg-parallel-size is 2 and 1 rank started"),
    ],
)
def test_options_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    path = write(tmp_path, {"prompt": "a"})
    assert main(["batch", str(path), "-o", str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err


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
    root = str(Path(__file__).parents[2])
    ray.init(
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}},
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
    assert main(["batch", str(path), "-o", str(tmp_path / "out"), *SMALL, *several]) == 2
    assert f"{workers} workers of {size} ranks need {needed} CPUs and the Ray cluster has 2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_cfg_group_of_ray_actors(tmp_path: Path) -> None:
    """Two ranks share out the branches of each item; the bits are those of one process, and a bad item stops no other."""
    lines = [{"prompt": "rain", "name": "rain"}, {"prompt": "snow", "height": 65}, {"prompt": "fog", "name": "fog"}]
    path = write(tmp_path, *lines)
    folder = tmp_path / "ray"
    group = ["--ray", "--workers", "1", "--cfg-parallel-size", "2", "--quiet"]
    assert main(["batch", str(path), "-o", str(folder), *SMALL, *group]) == 2
    manifest = Manifest(folder)
    assert {name: outcome.status for name, outcome in manifest.outcomes.items()} == {
        "rain": "done",
        "00002": "failed",
        "fog": "done",
    }
    alone = tmp_path / "alone"
    assert main(["batch", str(path), "-o", str(alone), *SMALL, "--quiet"]) == 2
    for name in ("rain", "fog"):
        assert (folder / f"{name}.safetensors").read_bytes() == (alone / f"{name}.safetensors").read_bytes()


@pytest.mark.slow
def test_a_batch_under_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three ranks share out every item, one item is refused on all of them, one rank speaks; run again alone, nothing runs."""
    path = write(tmp_path, {"prompt": "rain", "name": "rain"}, {"prompt": "snow", "height": 65}, {"prompt": "fog"})
    folder, alone = tmp_path / "ranks", tmp_path / "alone"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(root)}
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "ltxkern"]

    def batch(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
        line = [*command, "batch", str(path), "-o", str(folder), *SMALL]
        return subprocess.run(line, cwd=root, env=environment, capture_output=True, text=True, timeout=200)

    first = batch(folder, *several)
    assert first.returncode != 0
    assert first.stdout.splitlines() == [f"2 of 3 done (0 before), in {folder}"]
    assert first.stderr.count("00002 failed: ValueError: height 65 is not a multiple of 64") == 1
    assert "cfg parallel on 3 ranks: 10 evaluations exchanged in 12 collectives" in first.stderr
    assert main(["batch", str(path), "-o", str(folder), *SMALL]) == 2
    assert f"2 of 3 done (2 before), in {folder}" in capsys.readouterr().out
    assert batch(alone, sys.executable, "-m", "ltxkern").returncode == 2
    for name in ("rain", "00003"):
        assert (folder / f"{name}.safetensors").read_bytes() == (alone / f"{name}.safetensors").read_bytes()
