"""Python blocks of the documents run; commands in them name targets, files and options that exist."""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.docs.documents import ALL, ROOT, Block

# Those of docs/stacks find models that test_stacks.py gives them.
PYTHON = [b for b in ALL if b.language == "python" and not b.is_file and b.path.parent.name != "stacks"]
# The tutorial's are not only looked at: test_adding_an_op.py runs them.
SHELL = [b for b in ALL if b.language in ("", "sh", "indented") and b.path.parent.name != "adding_an_op"]
OTHERS = {"cp", "curl", "rm", "pip", "ruff", "mypy", "ncu", "python -c"}


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        try:
            exec(compile("\n" * block.line + block.text, str(block.path), "exec"), {"__name__": "__main__"})
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block as words, without comments, settings of variables, and what only starts another command."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            part = re.sub(r"^\w+=\S*\$\(.*?\)", "", part.strip())
            words = [word for word in shlex.split(part, comments=True) if word != "..."]
            while words and (re.fullmatch(r"\w+=.*", words[0]) or words[0] == "time"):
                words = words[1:]
            if words[:1] in (["compute-sanitizer"], ["ncu"], ["torchrun"]):
                start = next(i for i, word in enumerate(words) if word in ("python", "-m"))
                words = [*(["python"] if words[start] == "-m" else []), *words[start:]]
            if words:
                yield words


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def help_text(command: str) -> str:
    """What `ltxkern COMMAND --help` prints."""
    from ltxkern.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main([command, "--help"])
    return printed.getvalue()


def fault(words: list[str]) -> str | None:
    """What of a command does not exist, or None."""
    name, rest = words[0], words[1:]
    options = {word.partition("=")[0] for word in rest if word.startswith("--")}
    if name == "make":
        absent = [word for word in rest if "=" not in word and word not in targets()]
        return f"no target {absent[0]}" if absent else None
    if [name, *rest[:1]] == ["python", "-m"]:
        module = rest[1]
        if module in ("ltxkern", "pytest"):
            return fault([module, *rest[2:]])
        return None if (ROOT / (module.replace(".", "/") + ".py")).is_file() else f"no module {module}"
    if name == "ltxkern":
        shown = help_text(rest[0])
        absent = [option for option in options if option not in shown]
        return f"{rest[0]} has no {absent[0]}" if absent else None
    if name == "pytest":
        paths = [word for word in rest if "/" in word and not word.startswith("-")]
        absent = [path for path in paths if not (ROOT / path).exists()]
        return f"no {absent[0]}" if absent else None
    if name == "python" and rest[0].endswith(".py"):
        script = ROOT / rest[0]
        if not script.is_file():
            return f"no {rest[0]}"
        known = "".join(path.read_text() for path in script.parent.glob("*.py"))
        absent = [option for option in options if f'"{option}"' not in known and script.name != "setup.py"]
        return f"{rest[0]} has no {absent[0]}" if absent else None
    return None if name in OTHERS else f"unknown command {name}"


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_exist(block: Block) -> None:
    assert [f"{' '.join(words)}: {reason}" for words in commands(block) if (reason := fault(words))] == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("make tets", "no target tets"),
        ("ltxkern generate --modle demo", "generate has no --modle"),
        ("python bench/run_every.py", "no bench/run_every.py"),
        ("python bench/run_all.py --caess small", "bench/run_all.py has no --caess"),
        ("python -m pytest -x tests/ops/test_nothing.py", "no tests/ops/test_nothing.py"),
        ("A=1 time python -m tests.nothing", "no module tests.nothing"),
        ("cmak .", "unknown command cmak"),
        ("OMP_NUM_THREADS=1 python -m pytest tests/ops -k row_index  # one op", None),
    ],
)
def test_faults_are_seen(line: str, reason: str | None) -> None:
    (words,) = commands(Block(ROOT / "README.md", 1, "sh", line))
    assert fault(words) == reason
