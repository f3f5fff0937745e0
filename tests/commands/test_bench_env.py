"""`ltxkern bench-env`: the machine as JSON, the same facts as `ltxkern.environment`."""

import json

import pytest
import torch

from ltxkern.cli import main
from ltxkern.environment import environment


def test_bench_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-env"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["packages"]["torch"] == torch.__version__
    assert printed == json.loads(json.dumps(environment()))
