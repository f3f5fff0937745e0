"""What the pages say is what is there: backends, variables, public names, paths."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ltxkern
from tests.docs.documents import ROOT, documents

NAME = "[A-Z][A-Z0-9_]+"
READ = (
    r"\bLTXKERN_[A-Z][A-Z0-9_]*",
    rf'(?:environ|environment)(?:\.get\(|\[)"({NAME})"',
    rf'getenv\("({NAME})"',
    rf'"({NAME})" (?:not )?in os\.environ',
    # A launcher's, read in a loop over their names.
    r'"(RANK|WORLD_SIZE|LOCAL_RANK)"',
    # torch's, which a docstring names.
    r"\b(MASTER_(?:ADDR|PORT))\b",
)
SOURCES = (
    "ltxkern/**/*.py",
    "bench/*.py",
    "csrc/**/*.*",
    ".ci/*.py",
    "setup.py",
    "CMakeLists.txt",
    "Makefile",
    "tests/golden.py",
)


def sources() -> Iterator[Path]:
    for pattern in SOURCES:
        for path in ROOT.glob(pattern):
            if path.is_file() and path.suffix != ".so" and path.name != "README.md":
                yield path


def test_every_environment_variable_is_on_the_page() -> None:
    read = {name for path in sources() for pattern in READ for name in re.findall(pattern, path.read_text())}
    assert {"LTXKERN_BACKEND", "LTXKERN_CPU_ISA", "RANK", "MAX_JOBS", "TRITON_INTERPRET"} <= read
    page = (ROOT / "docs/environment.md").read_text()
    assert set(re.findall(r"`([A-Z][A-Z0-9_]{2,})`", page)) - {"AUTO", "OFF"} == read


@pytest.mark.parametrize("script", ["tables", "stacks", "demo"])
def test_tables_are_what_the_ops_declare_and_what_was_counted(script: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LTXKERN_", "TRITON_"))}
    command = [sys.executable, str(ROOT / f"docs/{script}.py"), "--check"]
    done = subprocess.run(command, env={**kept, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"a page is out of date: python docs/{script}.py\n{done.stderr}"


@pytest.mark.parametrize("page", ["ops", "dispatch", "pipeline", "reference"])
def test_every_public_name_is_in_the_api_reference(page: str) -> None:
    from ltxkern import pipeline

    text = (ROOT / f"docs/api/{page}.md").read_text()
    shown = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    names = {name.rpartition(".")[2] for name in shown}
    dispatch = {"Backend", "BackendError", "backends", "capabilities", "served", "use_backend"}
    if page == "ops":
        assert names == set(ltxkern.__all__) - dispatch - {"reference"}
    elif page == "dispatch":
        assert names == dispatch | {"Op"}
    elif page == "reference":
        assert set(re.findall(r"heading: (\w+)", text)) == set(dir(ltxkern.reference)) & set(ltxkern.capabilities())
    else:
        assert names == set(pipeline.__all__) - set(ltxkern.__all__)


PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|cuh|cu|cpp|h))`")
ROOTS = (
    "",
    "ltxkern",
    "ltxkern/pipeline",
    "ltxkern/pipeline/memory",
    "csrc",
    "csrc/include/ltxkern",
    "docs",
    "tests/pipeline",
)
# Made by a command.
MADE = ("build/", "dist/", "results/")


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_that_a_document_names_exist(path: Path) -> None:
    named = {name for name in PATH.findall(path.read_text()) if not name.startswith(MADE)}
    absent = [name for name in sorted(named) if not any((ROOT / root / name).exists() for root in ROOTS)]
    assert [name for name in absent if "scaled_add" not in name] == []


def test_docstrings_reach_the_site_in_sections() -> None:
    page = runpy.run_path(str(ROOT / "docs/sections.py"))
    given = "Sum.\n\nArgs:\n    x, y: shape\n        and dtype.\nReturns:\n    (N,)."
    expected = (
        "Sum.\n\nArgs:\n" + "".join(f"    {n}: shape\n        and dtype.\n" for n in "xy") + "\nReturns:\n    (N,)."
    )
    assert page["apart"](page["spaced"](given)) == expected
