"""tools/diffusers_tests.py: which models it patches, and what it says of two runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import UNet2DModel

from tools import diffusers_tests
from tools.diffusers_tests import ROOT, Outcomes, Plugin, Row, compare, every_model_patched, table

TINY: dict[str, Any] = {
    **{"block_out_channels": (4,), "norm_num_groups": 2, "layers_per_block": 1, "add_attention": False},
    **{"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
}


def test_models_are_patched_when_built_and_when_loaded(tmp_path: Path) -> None:
    build, load = UNet2DModel.__init__, UNet2DModel.from_pretrained
    with every_model_patched() as made:
        UNet2DModel(**TINY).save_pretrained(tmp_path)
        assert [(name, bool(report.rows)) for name, report in made] == [("UNet2DModel", True)]
        UNet2DModel.from_pretrained(tmp_path)
    assert sum(bool(report.rows) for _, report in made) == 2
    assert (UNet2DModel.__init__, UNet2DModel.from_pretrained) == (build, load)


class OfOneModel:
    model_class = UNet2DModel


def test_a_run_is_noted(tmp_path: Path) -> None:
    plugin = Plugin(tmp_path / "outcomes", patched=True)
    items = [SimpleNamespace(nodeid="a::test", cls=OfOneModel), SimpleNamespace(nodeid="b", cls=None)]
    plugin.pytest_collection_finish(SimpleNamespace(items=items))  # type: ignore[arg-type]
    UNet2DModel(**TINY)
    for test, outcome in (("a::test", "passed"), ("a::test", "failed"), ("a::test", "passed"), ("b", "skipped")):
        plugin.pytest_runtest_logreport(SimpleNamespace(nodeid=test, outcome=outcome))  # type: ignore[arg-type]
    plugin.pytest_sessionfinish()
    noted = Outcomes(**json.loads((tmp_path / "outcomes").read_text()))
    assert noted.tests == {"a::test": "failed", "b": "skipped"}
    assert noted.models == {"a::test": "UNet2DModel", "b": ""}
    assert (noted.patched, noted.calls) == ({"UNet2DModel": 1}, {"UNet2DModel": 0})
    assert noted.sites["UNet2DModel"] > 5


def test_what_ends_otherwise_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    models = {"a": "One", "b": "One", "c": "Two"}
    plain = Outcomes({"a": "passed", "b": "skipped", "c": "passed"}, models)
    patched = Outcomes({"a": "passed", "b": "skipped", "c": "failed"}, models, {"One": 2}, {"One": 6}, {"One": 9})
    rows = [Row("One", 2, 1, 1, 1, 2, 6, 9), Row("Two", 1, 0, 1, 0, 0, 0, 0)]
    assert compare(plain, patched) == (rows, ["c"])
    assert table(rows).splitlines()[-1] == "| Two | 1 | 0 | 1 | 0 | 0 | 0 | 0 |"
    output = tmp_path / "result.json"
    for second, status in ((patched, 1), (plain, 0)):
        ends = {False: plain, True: second}
        monkeypatch.setattr(diffusers_tests, "run", lambda *_, patched, ends=ends: ends[patched])
        assert diffusers_tests.main([str(tmp_path), "some_test", "--output-json", str(output)]) == status
    assert "1 tests end otherwise when patched:\n  c\n" in capsys.readouterr().out
    assert json.loads(output.read_text())["differing"] == []
    with pytest.raises(SystemExit):
        diffusers_tests.main([str(tmp_path)])


def test_the_committed_run_is_on_the_page() -> None:
    data = json.loads((ROOT / "bench/results/counted/diffusers-tests.json").read_text())
    rows = [Row(**row) for row in data["rows"]]
    assert data["differing"] == []
    assert all(row.passed == row.passed_patched and row.calls for row in rows)
    page = (ROOT / "docs/patched.md").read_text()
    assert page.split("<!-- diffusers tests: begin -->\n")[1].startswith(table(rows) + "\n")
