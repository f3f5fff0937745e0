"""`ltxkern resume` as a user types it, after Ctrl-C and after SIGKILL; and what is kept without being asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ltxkern.cli import main
from ltxkern.commands.progress import Shown
from ltxkern.pipeline.run.progress import ProgressEvent
from ltxkern.pipeline.work.folder import read_manifest
from tests.commands.typed import run
from tests.processes import python


def stop_at(stage: str, step: int) -> Callable[..., None]:
    """Progress that is interrupted, as by Ctrl-C."""

    def tell(_: Any, event: ProgressEvent) -> None:
        if (event.stage, event.done) == (stage, step):
            raise KeyboardInterrupt

    return tell


def test_ctrl_c_points_to_resume_which_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output, work = tmp_path / "whole.safetensors", tmp_path / "out.safetensors", tmp_path / "my work"
    options = ("--work-dir", str(work), "-o", str(output))
    begun = tmp_path / "begun"
    begun.mkdir()
    monkeypatch.chdir(begun)  # resume goes back to where the run was started, and the test writes there
    assert run("--no-work-dir", "-o", str(whole)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Shown, "__call__", stop_at("stage 2", 1))
        assert run(*options) == 130
    said = capsys.readouterr().err
    assert f"ltxkern: interrupted; what is done is kept: ltxkern resume '{work}'\n" in said
    assert not output.exists()
    assert run("--seed", "11", *options) == 2
    said = capsys.readouterr().err
    assert "differs in seed (10 there, 11 here): name another folder" in said
    assert "what is done is kept" not in said
    assert run("--no-work-dir", *options) == 2
    assert "leave one of them out" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["resume", "my work", "--quiet"]) == 0
    assert output.read_bytes() == whole.read_bytes()
    # Later stages anew: the same seed gives the same bits, another one others, and what reaches further back is refused.
    again = ("resume", str(work), "--quiet", "-o", "again.safetensors", "--from", "stage2")
    assert main([*again]) == 0
    assert Path("again.safetensors").read_bytes() == whole.read_bytes()
    assert main([*again, "--set", "seed=11"]) == 0
    other, first = load_file("again.safetensors"), load_file(whole)
    assert not other["video"].equal(first["video"])
    assert other["audio"].equal(first["audio"])  # that of stage 1
    capsys.readouterr()
    for change, words in (
        ("steps=3", "differs in steps (2 there, 3 here)"),
        ("colour=red", "set: unrecognized arguments: --colour=red"),
        ("seed", "set must be NAME=VALUE, got 'seed'"),
    ):
        assert main([*again, "--set", change]) == 2
        assert words in capsys.readouterr().err
    assert main(["resume", str(tmp_path)]) == 2
    assert "holds no run: name a work folder" in capsys.readouterr().err


def test_the_same_on_two_threads() -> None:
    """There more matrix products round by where an operand begins: what is read again must lie as what was computed."""
    name = test_ctrl_c_points_to_resume_which_goes_on.__name__
    # Threads that wait without spinning: they share the cores with other tests.
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{name}", **threads)


def test_what_is_kept_without_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTXKERN_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "out.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Shown, "__call__", stop_at("stage 1", 2))
        assert run("-o", str(output)) == 130
    (folder,) = (tmp_path / "cache" / "work").iterdir()
    assert list(folder.glob("steps-stage1-*"))
    told: list[tuple[str, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(Shown, "__call__", lambda _, event: told.append((event.stage, event.done)))
        assert run("-o", str(output)) == 0  # the same command goes on
        assert ("stage 1", 1) not in told
        assert ("stage 1", 3) in told
        assert run("-o", str(output)) == 0  # and starts anew once it is done
        assert ("stage 1", 1) in told
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.finished


def test_killed_runs_come_out_whole() -> None:
    done = python("-m", "tools.kill_runs", "--small", "--at", "stage 1:2", "--at", "stage 2:2", "--at", "writing:3")
    assert done.stdout.splitlines()[-1] == "3 killed in 3 of 7 stages, 0 not whole", done.stdout
