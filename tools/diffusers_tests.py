"""diffusers' own tests of its models, as they are and with every model patched: `python -m tools.diffusers_tests CHECKOUT`.

CHECKOUT is a source tree of diffusers whose `tests/` fit the version that is installed. pytest runs there twice, with this file as
its plugin: plain, and with every model patched when it has been built or loaded. The tests that pass must be the same ones.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

import ltxkern

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/models/autoencoders",
    "tests/models/transformers/test_models_transformer_ltx2.py",
    "tests/models/unets/test_models_unet_2d.py",
    "tests/models/unets/test_models_unet_2d_condition.py",
)
VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "peft", "pytest")


@dataclass
class Outcomes:
    """What one run of the tests gave.

    Attributes:
        tests: "passed", "failed" or "skipped" by test.
        models: the class that a test is about, by test.
        patched: models that were patched, by class.
        sites: sites in them, by class.
        calls: calls that fused ops served in them, by class.
    """

    tests: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    patched: dict[str, int] = field(default_factory=dict)
    sites: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def every_model_patched() -> Iterator[list[tuple[str, Any]]]:
    """Within it each model of diffusers is patched once it is built, or loaded; the class and report of each are noted."""
    from diffusers.models.modeling_utils import ModelMixin

    made: list[tuple[str, Any]] = []
    building = 0

    def patch(model: Any) -> None:
        if not any(weight.is_meta for weight in model.parameters()):
            made.append((type(model).__name__, ltxkern.patch(model)))

    def patching(build: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(build)
        def built(model: Any, *args: Any, **settings: Any) -> None:
            nonlocal building
            building += 1
            try:
                build(model, *args, **settings)
            finally:
                building -= 1
            if not building:
                patch(model)

        return built

    load = ModelMixin.__dict__["from_pretrained"]

    @functools.wraps(load.__func__)
    def loading(kind: Any, *args: Any, **settings: Any) -> Any:
        loaded = load.__func__(kind, *args, **settings)
        patch(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ModelMixin, "from_pretrained", classmethod(loading))
        for kind in {kind for kind in _below(ModelMixin) if "__init__" in vars(kind)}:
            monkeypatch.setattr(kind, "__init__", patching(kind.__init__))
        yield made


def _below(kind: Any) -> Iterator[Any]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


class Plugin:
    """Of pytest: notes what became of each test, and of which model it is."""

    def __init__(self, path: Path, patched: bool) -> None:
        self.path, self.patched = path, patched
        self.outcomes = Outcomes()
        self.made: list[tuple[str, Any]] = []
        self.ending = contextlib.ExitStack()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Every model that the tests speak of is imported now."""
        for item in session.items:
            kind = getattr(item, "cls", None)
            model = getattr(kind() if kind else None, "model_class", None)
            self.outcomes.models[item.nodeid] = model.__name__ if model else ""
        if self.patched:
            self.made = self.ending.enter_context(every_model_patched())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has passed where none of its parts did anything else."""
        known = self.outcomes.tests.get(report.nodeid, "passed")
        self.outcomes.tests[report.nodeid] = report.outcome if known == "passed" else known

    def pytest_sessionfinish(self) -> None:
        """Write it down."""
        self.ending.close()
        for name, report in self.made:
            for counts, more in (
                (self.outcomes.patched, bool(report.rows)),
                (self.outcomes.sites, len(report.rows)),
                (self.outcomes.calls, sum(row.calls for row in report.rows)),
            ):
                counts[name] = counts.get(name, 0) + int(more)
        self.path.write_text(json.dumps(asdict(self.outcomes)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the plugin."""
    parser.addoption("--outcomes", help="file for what became of the tests")
    parser.addoption("--patched", action="store_true", help="patch every model")


def pytest_configure(config: pytest.Config) -> None:
    """Start the plugin."""
    config.pluginmanager.register(Plugin(Path(config.getoption("outcomes")), config.getoption("patched")))


@dataclass(frozen=True)
class Row:
    """The tests of one class of models, and what was patched in them."""

    model: str
    tests: int
    skipped: int
    passed: int
    passed_patched: int
    models: int
    sites: int
    calls: int


def compare(plain: Outcomes, patched: Outcomes) -> tuple[list[Row], list[str]]:
    """A row for each class, and the tests that do not end alike."""
    tests = sorted(plain.tests.keys() | patched.tests.keys())
    differing = [test for test in tests if plain.tests.get(test) != patched.tests.get(test)]
    rows = []
    for model in sorted({name for outcomes in (plain, patched) for name in outcomes.models.values()}):
        own = [test for test in tests if model in (plain.models.get(test), patched.models.get(test))]

        def count(outcomes: Outcomes, what: str, own: Sequence[str] = tuple(own)) -> int:
            return sum(outcomes.tests.get(test) == what for test in own)

        made = (counts.get(model, 0) for counts in (patched.patched, patched.sites, patched.calls))
        ends = (count(plain, "skipped"), count(plain, "passed"), count(patched, "passed"))
        rows.append(Row(model, len(own), *ends, *made))
    return rows, differing


def run(checkout: Path, arguments: Sequence[str], *, patched: bool) -> Outcomes:
    """One run in a process of its own; without network."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes.json"
        plugin = ("-p", "tools.diffusers_tests", "--outcomes", str(path), *(["--patched"] if patched else []))
        quiet = ("-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore")
        search = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
        environment = {**os.environ, "PYTHONPATH": search, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", *plugin, *quiet, *arguments]
        done = subprocess.run(command, cwd=checkout, env=environment, check=False)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest in {checkout} ended with {done.returncode}")
        return Outcomes(**json.loads(path.read_text()))


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    heads = ("model", "tests", "skipped", "passed", "passed, patched", "models patched", "sites", "calls")
    lines = [heads, ("---",) + ("---:",) * (len(heads) - 1), *(tuple(map(str, asdict(row).values())) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m tools.diffusers_tests CHECKOUT --output-json FILE`."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("checkout", type=Path, help="source tree of diffusers")
    options.add_argument("tests", nargs="*", help="tests in it (default: those of every model that is served)")
    options.add_argument("--source", default="", help="what the tests are, for the file of results")
    options.add_argument("--output-json", type=Path, help="file for the results")
    parsed = options.parse_args(arguments)
    chosen = parsed.tests or [test for test in TESTS if (parsed.checkout / test).exists()]
    if not chosen:
        options.error(f"checkout: expected a source tree with {TESTS[0]}, got {parsed.checkout}")
    plain, patched = (run(parsed.checkout, chosen, patched=patched) for patched in (False, True))
    rows, differing = compare(plain, patched)
    failed = sorted(test for test, outcome in plain.tests.items() if outcome == "failed" and test not in differing)
    print(table(rows))
    for title, names in (("end otherwise when patched", differing), ("fail without the patch as well", failed)):
        print(f"\n{len(names)} tests {title}{':' if names else ''}", *names, sep="\n  ")
    if parsed.output_json:
        installed = {part.metadata["Name"].lower() for part in importlib.metadata.distributions()}
        versions = {name: importlib.metadata.version(name) for name in VERSIONS if name in installed}
        versions = {"ltxkern": ltxkern.__version__, "python": platform.python_version(), **versions}
        made = {"source": parsed.source, "versions": versions}
        result = {**made, "rows": [asdict(row) for row in rows], "differing": differing, "failing_plain": failed}
        parsed.output_json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
