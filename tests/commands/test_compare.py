"""`ltxkern compare` on two files of one generator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ltxkern.cli import main
from tests.commands.typed import refused, run


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a.mp4", "1"), ("b.mp4", "2")):
        assert run("-o", str(tmp_path / name), "--seed", seed) == 0
    capsys.readouterr()
    report = tmp_path / "report.json"
    assert main(["compare", str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"), "--json", str(report)]) == 0
    assert "PSNR" in capsys.readouterr().out
    assert len(json.loads(report.read_text())["frames"]) == 9
    assert "none.mp4" in refused(capsys, str(tmp_path / "none.mp4"), str(tmp_path / "b.mp4"), command="compare")
