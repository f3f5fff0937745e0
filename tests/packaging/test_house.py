"""The house stays easy to find one's way in: small folders, short files, a test by every module, ops written in few places."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltxkern import dispatch, schema
from tests.processes import ROOT

MOST_FILES, MOST_LINES = 16, 400
# In two parts, so that this file is none of those that name it.
SMALL_OP = "dual" + "_add"
SOURCES = {".py", ".cuh", ".cu", ".cpp", ".h"}


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCES and "third_party" not in path.parts:
                yield path


def test_no_folder_of_the_package_is_crowded() -> None:
    found = list(sources("ltxkern"))
    counts = {folder: sum(path.parent == folder for path in found) for folder in {path.parent for path in found}}
    assert len(counts) > 10
    assert {str(folder): count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_no_file_is_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in sources("ltxkern", "csrc", "bench", "tests", "tools", ".ci", "examples", "integrations")
    }
    assert len(lengths) > 300
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_every_module_of_the_pipeline_has_its_test() -> None:
    rooms = [path for path in sources("ltxkern/pipeline") if path.parent.name != "pipeline" and path.stem != "__init__"]
    assert len(rooms) > 40
    expected = [ROOT / "tests" / "pipeline" / path.parent.name / f"test_{path.stem}.py" for path in rooms]
    assert [str(path.relative_to(ROOT)) for path in expected if not path.is_file()] == []


def elements(node: ast.AST) -> list[str]:
    """What a list in Python holds: parameters, arguments of a call, a tuple, the keys of a dict, the fields of a class."""
    match node:
        case ast.arguments():
            return [one.arg for one in (*node.posonlyargs, *node.args, *node.kwonlyargs)]
        case ast.Call():
            return [*map(ast.unparse, node.args), *(one.arg or ast.unparse(one.value) for one in node.keywords)]
        case ast.Tuple() | ast.List():
            return [ast.unparse(one) for one in node.elts]
        case ast.Dict():
            return [ast.unparse(key or value) for key, value in zip(node.keys, node.values, strict=True)]
        case ast.ClassDef():
            return [ast.unparse(field.target) for field in node.body if isinstance(field, ast.AnnAssign)]
    return []


def lists_of(path: Path) -> list[list[str]]:
    """Those of a source; of one in C++ the fields of its structs, which is how arguments come to a kernel."""
    text = path.read_text()
    if path.suffix == ".py":
        return [elements(node) for node in ast.walk(ast.parse(text))]
    structs = re.findall(r"\bstruct \w+[^{;()]*{([^{}()]*)}", re.sub(r"//.*", "", text))
    return [re.split("[;,]", fields) for fields in structs]


@pytest.mark.parametrize(("op", "most"), [(SMALL_OP, 7), ("group_norm_silu", 13)])
def test_the_arguments_of_an_op_are_written_in_few_places(op: str, most: int) -> None:
    """An argument list has elements that each name one of the op's arguments, and so many of them as the op has tensors."""
    kinds = schema.kinds(dispatch._registry[op].arguments)
    least = sum("Tensor" in kind for kind in kinds.values())
    found: list[tuple[str, list[str]]] = []
    for path in sources("ltxkern", "csrc"):
        # What other stacks call with is theirs to name.
        ours = path.parent.name != "integrations"
        if ours and (op in path.read_text() or path.stem.startswith(op)):
            for listed in lists_of(path):
                named = [{word.removesuffix("_ptr").lower() for word in re.findall(r"\w+", one)} for one in listed]
                alone = [words & kinds.keys() for words in named if len(words & kinds.keys()) == 1]
                if len(set().union(*alone)) >= least:
                    found.append((str(path.relative_to(ROOT)), listed))
    assert len({path for path, _ in found}) >= 4, found
    assert len(found) <= most, "\n".join(map(str, found))


def test_an_op_is_named_in_few_files() -> None:
    command = ["git", "grep", "-l", SMALL_OP, "--", ":!docs", ":!bench/results"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("FILES THAT NAME AN OP NOT COUNTED: needs git")
    if done.returncode:
        pytest.skip(f"FILES THAT NAME AN OP NOT COUNTED: {done.stderr.strip() or 'no checkout'}")
    assert len(done.stdout.split()) <= 16, done.stdout
