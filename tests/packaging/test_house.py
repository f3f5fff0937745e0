"""The house stays easy to find one's way in: small folders, short files, a test beside every module of the pipeline."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_FILES, MOST_LINES = 16, 400
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
        for path in sources("ltxkern", "csrc", "bench", "tests", "tools", ".ci", "examples")
    }
    assert len(lengths) > 300
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_every_module_of_the_pipeline_has_its_test() -> None:
    rooms = [path for path in sources("ltxkern/pipeline") if path.parent.name != "pipeline" and path.stem != "__init__"]
    assert len(rooms) > 40
    expected = [ROOT / "tests" / "pipeline" / path.parent.name / f"test_{path.stem}.py" for path in rooms]
    assert [str(path.relative_to(ROOT)) for path in expected if not path.is_file()] == []
