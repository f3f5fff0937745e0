"""Safe by default: no code from files, no shell, nothing written but where the user said, and what each rule would catch."""

from __future__ import annotations

import ast
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands.typed import run
from tests.processes import ROOT

PACKAGE = sorted((ROOT / "ltxkern").rglob("*.py"))
# Of the code of a class that is imported already, in a language without builtins.
KNOWN = {("eval", "ltxkern/patching/flow.py")}


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, str]]]:
    """Every call: the name it is made by, and its keyword arguments as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg or "**": ast.unparse(word.value) for word in node.keywords}


def imported(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def unsafe(source: str) -> Iterator[str]:
    """What a source does that lets a file or a name run code."""
    tree = ast.parse(source)
    yield from sorted(imported(tree) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
    for name, words in calls(tree):
        last = name.rpartition(".")[2]
        if name in ("eval", "exec") or name in ("torch.load", "os.system", "os.popen", "np.load", "numpy.load"):
            yield name
        if name.startswith(("os.spawn", "os.exec")) or last in ("getoutput", "getstatusoutput"):
            yield name
        if words.get("shell", "False") != "False":
            yield "shell"
        if words.get("trust_remote_code", "False") != "False" or words.get("allow_pickle", "False") != "False":
            yield "trust_remote_code or allow_pickle"
        if last == "from_pretrained" and name.startswith("Auto") and words.get("trust_remote_code") != "False":
            yield f"{name} asks whether to trust code of the folder"
        if name in ("yaml.load", "yaml.load_all") and "_yaml_loader" not in words.get("Loader", ""):
            yield name
        if (name.startswith("yaml.") and "unsafe" in name) or name == "yaml.full_load":
            yield name


def test_no_source_lets_a_file_run_code() -> None:
    assert len(PACKAGE) > 150
    found = {(what, str(path.relative_to(ROOT))) for path in PACKAGE for what in unsafe(path.read_text())}
    assert found == KNOWN


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.Popen(text, shell=wanted)",
        "AutoModel.from_pretrained(a, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(a)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
    ],
)
def test_the_rules_catch_what_they_are_there_for(source: str) -> None:
    assert list(unsafe(source))


watching: list[Callable[[str, Any], None]] = []


@functools.cache
def add_hook() -> None:
    """For as long as the process lives, as hooks do; it listens only while somebody watches."""
    sys.addaudithook(lambda event, arguments: [watch(event, arguments) for watch in watching] and None)


def written(event: str, arguments: Any) -> list[Any]:
    """Paths that an event of Python's makes, changes or removes."""
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        mode, flags = arguments[1] or "", arguments[2] or 0
        writes = any(letter in mode for letter in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return [arguments[0]] if writes else []
    if event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
        return [arguments[0]]
    return list(arguments[:2]) if event in ("os.rename", "os.link", "os.symlink") else []


def test_a_run_writes_nowhere_but_where_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what Python is asked to write, and by what lies about afterwards at the places where programs like to write."""
    places = {name: tmp_path / name for name in ("output", "work", "cache", "home", "temporary", "current")}
    for place in places.values():
        place.mkdir()
    monkeypatch.chdir(places["current"])
    monkeypatch.setenv("HOME", str(places["home"]))
    monkeypatch.setenv("LTXKERN_CACHE", str(places["cache"]))
    monkeypatch.setattr(tempfile, "tempdir", str(places["temporary"]))
    allowed = tuple(str(places[name]) for name in ("output", "work", "cache"))
    seen: list[str] = []

    def watch(event: str, arguments: Any) -> None:
        # A file without a name is opened as its folder.
        paths = [os.path.realpath(os.fsdecode(path)) for path in written(event, arguments) if path]
        seen.extend(path for path in paths if not path.startswith("/dev/") and "__pycache__" not in path)

    add_hook()
    watching.append(watch)
    try:
        output = ("-o", f"{places['output']}/out.mp4")
        assert run(*output, "--work-dir", str(places["work"])) == 0
        assert run(*output) == 0
        (places["current"] / "stray").write_text("seen")
    finally:
        watching.clear()
    outside = {path for path in seen if not path.startswith(allowed)}
    assert len(seen) > 10
    assert outside == {str(places["current"] / "stray")}
    assert [path.name for path in places["output"].iterdir()] == ["out.mp4"]
    assert not [path for name in ("home", "temporary") for path in places[name].rglob("*")]
