"""`ltxkern plan`: the table, what does not fit, free memory that is no number."""

from __future__ import annotations

import pytest

from ltxkern.cli import main
from tests.commands.typed import MODEL


def test_plan_prints_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *MODEL, "--height", "64", "--width", "128", "--num-frames", "9"]) == 0
    assert "stage 2" in capsys.readouterr().out
    free = ["--device-free-gib", "0.2", "--host-free-gib", "0.2"]
    assert main(["plan", *MODEL, "--height", "1088", "--width", "1920", *free]) == 2
    assert "ltxkern: error: " in capsys.readouterr().err


@pytest.mark.parametrize("free", ["-1", "nan", "inf", "much"])
def test_free_memory_must_be_a_number(free: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["plan", f"--device-free-gib={free}"])
    assert error.value.code == 2
    assert f"expected a number of GiB of at least 0, got '{free}'" in capsys.readouterr().err
