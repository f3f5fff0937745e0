"""`ltxkern doctor`: without rich, every op and version. `ltxkern bench-env`: the same facts as `ltxkern.environment`."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from ltxkern.cli import main
from ltxkern.environment import environment


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # A bare installation has no rich.
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "group_norm_silu" in text
    assert "torch" in text


def test_bench_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-env"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["packages"]["torch"] == torch.__version__
    assert printed == json.loads(json.dumps(environment()))
