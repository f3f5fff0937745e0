"""The tutorial of a new op, followed word for word in a copy of the repository: its files, then its commands."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.documents import ROOT, blocks

FOLDER = ROOT / "examples" / "adding_an_op"
# Nothing that a checkout of the repository has not.
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "__pycache__", "*.so", "*.mp4", ".*_cache", ".hypothesis", "*.egg-info"
)
# Of the three backends that need no GPU: 22 tests each, and 2 that ask none.
TESTS = 22
PASSED = {"tests/ops/test_scaled_add.py": 2 * TESTS + 2, "tests/csrc/test_ops_on_shim.py": 60, "triton": 3 * TESTS + 2}


@pytest.fixture(scope="module")
def tutorial() -> dict[str, object]:
    return runpy.run_path(str(FOLDER / "apply.py"))


@pytest.fixture(scope="module")
def copy(tutorial: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the steps applied; of the kernels only the new one, which builds quickly."""
    folder = tmp_path_factory.mktemp("checkout") / "ltxkern"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    written = tutorial["apply"](folder)
    assert len(written) == len(re.findall(r'^```\w+ title="', (FOLDER / "README.md").read_text(), re.MULTILINE)) >= 9
    for kernel in (*folder.glob("csrc/cpu/*.cpp"), *folder.glob("csrc/cuda/*.cu")):
        if kernel.stem != "scaled_add":
            kernel.unlink()
    return folder


def run(line: str, folder: Path) -> str:
    """Output of one command of the page, which must succeed."""
    words = shlex.split(line)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("LTXKERN_", "PYTEST_", "TRITON_"))
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**kept, "PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout[-6000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_tutorial_works_word_for_word(copy: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("TUTORIAL NOT FOLLOWED: it needs a C++ compiler")
    (shell,) = [block for block in blocks(FOLDER / "README.md") if block.language == "sh"]
    counts = {}
    for line in shell.text.replace(" && ", "\n").splitlines():
        output = run(line, copy)
        if "pytest" in line:
            name = next(name for name in reversed(PASSED) if name in line.lower())
            counts[name] = int(re.search(r"(\d+) passed", output)[1])
            assert "skipped" not in output.splitlines()[-1], output[-2000:]
    assert counts.keys() == PASSED.keys()
    assert all(counts[name] >= least for name, least in PASSED.items()), counts


def test_a_step_that_no_longer_fits_is_refused(tutorial: dict[str, object], tmp_path: Path) -> None:
    changed = tutorial["changed"]
    assert changed("a\nb\n", " a\n+c\n") == "a\nc\nb\n"
    assert changed("a\nb\n", "-a\n b\n") == "b\n"
    for text in ("b\n", "a\na\n"):
        with pytest.raises(ValueError, match="must stand there once"):
            changed(text, " a\n+c\n")
    (tmp_path / "ltxkern/ops").mkdir(parents=True)
    (tmp_path / "ltxkern/ops/scaled_add.py").touch()
    with pytest.raises(FileExistsError, match="fresh checkout"):
        tutorial["apply"](tmp_path)
