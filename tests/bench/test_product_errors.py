"""Errors of fp32 products: measured by the command, and in the document as they were."""

import json
from pathlib import Path

import product_errors
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")


def test_errors_of_products_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(product_errors, "RESULTS", tmp_path / "errors.json")
    monkeypatch.setattr(product_errors, "PRODUCTS", ((3, 1024, 32),))
    monkeypatch.setattr(product_errors, "FORWARDS", (("small", 1),))
    monkeypatch.setattr(product_errors.products, "onednn_quicker", lambda: False)
    assert product_errors.main() == 1
    assert "nothing to compare" in capsys.readouterr().err
    monkeypatch.setattr(product_errors.products, "onednn_quicker", lambda: True)
    assert product_errors.main() == 0
    made = json.loads((tmp_path / "errors.json").read_text())
    (one,), (forward,) = made["products"], made["forwards"]
    assert all(1e-9 < one[name][kind] < 1e-5 for name in ("oneDNN", "torch") for kind in ("rms", "largest"))
    assert all(1e-9 < apart < 1e-5 for name in ("oneDNN", "torch", "diffusers") for apart in forward[name])


def test_the_document_has_the_errors_that_were_measured():
    made, said = json.loads(product_errors.RESULTS.read_text()), (ROOT / "docs" / "run.md").read_text()
    (one_row, *rows), forwards = made["products"], made["forwards"]
    alone = [f"{one_row[name]['rms']:.1e}" for name in ("oneDNN", "torch")]
    assert f"| the same of one row | {alone[0]} | {alone[1]} | |" in said
    least, most = (
        [f"{bound(one[name]['rms'] for one in rows):.1e}" for name in ("oneDNN", "torch")] for bound in (min, max)
    )
    assert least[0] == most[0]
    assert f"16,384 | {least[0]} | {least[1]} to {most[1]} | |" in said
    worst = max(one["oneDNN"]["largest"] / one["torch"]["largest"] for one in rows)
    assert f"up to {worst:.1f} times MKL's" in said
    for forward in forwards:
        for part in range(2):
            assert " | ".join(f"{forward[name][part]:.1e}" for name in ("oneDNN", "torch", "diffusers")) in said
