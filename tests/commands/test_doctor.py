"""`ltxkern doctor`: without rich, every op and version. `ltxkern bench-env`: the same facts as `ltxkern.environment`."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from ltxkern.cli import main
from ltxkern.environment import environment
from ltxkern.trust import backends, permitted


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # A bare installation has no rich.
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "group_norm_silu" in text
    assert "torch" in text
    assert f"what no proof covers is {'probed' if backends.probing() else 'not probed'}" in text


@pytest.mark.parametrize(
    ("variable", "asked"),
    [("LTXKERN_SELFCHECK", backends.probing), ("LTXKERN_BACKEND", permitted.environment_choice)],
)
def test_a_variable_with_an_unknown_value_is_named(
    variable: str, asked: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "on")
    asked.cache_clear()
    assert main(["doctor"]) == 2
    assert f"ltxkern: error: {variable}" in capsys.readouterr().err


def test_bench_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-env"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["packages"]["torch"] == torch.__version__
    assert printed == json.loads(json.dumps(environment()))
