"""`ltxkern doctor`: without rich, every op and version."""

from __future__ import annotations

import sys

import pytest

from ltxkern.cli import main


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # A bare installation has no rich.
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "group_norm_silu" in text
    assert "torch" in text
