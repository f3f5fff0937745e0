"""Quoted figures stand in results files; the pages come from results files alone."""

import json

import pytest
import quoted
import report_docs
from plots import write_plots
from report import read_folder, write_json
from tiny import record, results

from tests.processes import ROOT


@pytest.fixture
def folder(tmp_path):
    rows = record("torch eager", 123.456), record("ltxkern cpu", 40.0, ratios={"torch eager": 3.0864}, launches=2)
    (tmp_path / "results").mkdir()
    write_json(results(*rows), tmp_path / "results" / "m.json")
    return tmp_path


ROW = "m.json#group_norm_silu.tiny.bf16/ltxkern cpu"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"It takes 40.0 us <!-- result: {ROW}/median_us --> here.", None),
        (f"It takes 0.040 ms <!-- result: {ROW}/median_ms --> here.", None),
        (f"It is **3.1x** faster <!-- result: {ROW}/ratio:torch eager -->", None),
        (f"It is 3.0x faster <!-- result: {ROW}/ratio:torch eager -->", "quotes 3.0"),
        (f"It takes 41 us <!-- result: {ROW}/median_us -->", "quotes 41"),
        (f"It makes 2 launches <!-- result: {ROW}/launches -->", None),
        (f"It takes 40 us <!-- result: {ROW}/median_parsecs -->", "median_parsecs"),
        ("It takes 40 us <!-- result: other.json#a.b.c/d/median_us -->", "no results file other.json"),
        ("It takes 40 us <!-- result: m.json#a.b.c/d/median_us -->", "has no row a.b.c"),
        ("It takes 40 us.", "'40 us' names no results file"),
        ("It is 3x faster.", "names no results file"),
        ("A speed-up of 3.1x over eager.", "'3.1x' names no results file"),
        ("It is 3 times faster.", "names no results file"),
        ("Frames of 512x768x25 at 0x1f.", None),
        ("It reaches 4.1 TB/s.", "names no results file"),
        ("The floor is 40 us <!-- not measured: bytes over a nominal rate -->", None),
        ("A frame lasts 41.7 seconds of 24 fps and 3 passes.", None),
        ("Empty <!-- result: m.json#a.b.c/d/median_us -->", "without a figure"),
    ],
)
def test_quoted_figures(folder, line, words):
    page = folder / "page.md"
    page.write_text(f"# Title\n\n{line}\n")
    faults = [str(fault) for fault in quoted.faults_in(page, folder / "results")]
    if words is None:
        assert faults == []
    else:
        assert len(faults) >= 1
        assert any(words in fault for fault in faults), faults
        assert ":3: " in faults[0]


@pytest.mark.parametrize("path", quoted.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_figure_of_the_project_stands_in_a_results_file(path):
    assert [str(fault) for fault in quoted.faults_in(path)] == []


def test_pages_are_made_from_results_files(folder):
    docs = folder / "docs"
    docs.mkdir()
    (docs / "ladder-group-norm.md").write_text("top\n<!-- ladder: begin -->\nold\n<!-- ladder: end -->\nbottom\n")
    assert report_docs.main(["--results", str(folder / "results"), "--docs", str(docs)]) == 0
    page = (docs / "performance.md").read_text()
    for words in ("Test CPU, abc123", "`bench/results/m.json`", "python bench/run_all.py", "40 us", "3.09x", "123 us"):
        assert words in page
    ladder = (docs / "ladder-group-norm.md").read_text()
    assert "old" not in ladder
    assert "bottom" in ladder
    assert "| 2.50x     | 3.09x" in ladder
    plots = sorted(path.name for path in (docs / "plots").iterdir())
    assert plots == ["m-percent-of-roof.svg", "m-roofline.svg", "m-speed-up.svg"]
    before = {path: path.read_bytes() for path in docs.rglob("*") if path.is_file()}
    (docs / "plots" / "removed-machine-roofline.svg").write_text("of a results file that is no longer there")
    report_docs.main(["--results", str(folder / "results"), "--docs", str(docs)])
    assert {path: path.read_bytes() for path in docs.rglob("*") if path.is_file()} == before


def test_results_without_a_provider_of_the_plots_have_none(tmp_path):
    """Attention kernels, tiles and blocks have tables alone; what is counted in FLOP lies under no copy roof."""
    others = results(record("cudnn", 40.0), record("torch eager", 50.0))
    assert write_plots("attention", others, tmp_path / "plots") == []
    product = results(record("ltxkern cuda", 40.0, flops=10**9), record("torch eager", 50.0, flops=10**9))
    names = [f"merge-{kind}.svg" for kind in ("percent-of-roof", "speed-up")]
    assert write_plots("merge", product, tmp_path / "plots") == [f"plots/{name}" for name in names]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == names


def test_no_results_is_said(tmp_path):
    (tmp_path / "results").mkdir()
    report_docs.main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")])
    assert "No results file" in (tmp_path / "docs" / "performance.md").read_text()


def test_committed_page_is_what_the_committed_results_give(tmp_path):
    if not (ROOT / "docs" / "performance.md").exists():
        pytest.skip("docs/performance.md is not generated yet")
    report_docs.main(["--docs", str(tmp_path)])
    assert (tmp_path / "performance.md").read_text() == (ROOT / "docs" / "performance.md").read_text()


def test_committed_results_are_readable():
    folder = ROOT / "bench" / "results"
    for path in (folder / name for name in read_folder(folder)):
        data = json.loads(path.read_text())
        assert data["machine"]["revision"]
        assert data["machine"]["command"]
        assert data["records"], path
