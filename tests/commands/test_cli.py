"""The command itself: an interruption leaves no half file, and importing the package stays light."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ltxkern import cli
from tests.commands.typed import SMALL
from tests.processes import python


def test_ctrl_c_leaves_no_half_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ltxkern", "generate", *SMALL, "--steps", "400", "-o", str(tmp_path / "out.mp4")]
    command.remove("--quiet")
    # A shell that runs the tests in the background hands down an ignored interrupt.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    seen = ""
    deadline = time.monotonic() + 240
    while "stage 1" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_import_is_light() -> None:
    script = (
        "import sys, ltxkern; assert not {'ltxkern._C', 'diffusers', 'transformers', 'triton', 'cupy'} & set(sys.modules); "
        "import ltxkern.pipeline; assert not {'diffusers', 'transformers'} & set(sys.modules)"
    )
    # torch itself may import triton where it is installed; a torch-only import tells which modules are torch's own.
    if python("-c", "import sys, torch; print('triton' in sys.modules)").stdout.strip() == "True":
        script = script.replace("'triton', ", "")
    python("-c", script)


def test_ctrl_c_before_there_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["doctor"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "ltxkern: interrupted; no half-written file was left\n"
