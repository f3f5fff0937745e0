"""verify finds what is planted, dispatch refuses it afterwards, and others still serve; what is right is proven."""

import json
import sys
from pathlib import Path

import pytest
import torch

import ltxkern
from ltxkern import proofs
from ltxkern.cli import main
from ltxkern.commands import verify as command
from ltxkern.verify import checks, report, supervise, timing
from ltxkern.verify.cases import F32, Size
from ltxkern.verify.report import Report, verify
from ltxkern.verify.supervise import Found
from tests.csrc.shim_build import shim
from tests.verify.planted import FAULTS

WORDS = {
    "wrong result": "error against fp64",
    "out of bounds": "written outside of output 0",
    "endless": "no end after 4 s",
    "crash": "the process ended by SIGABRT",
}
OPS = ["rms_norm_modulate", "channelwise_normalize"]


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of rank 0 of two ops, in fp32; workers take an index in the whole plan, so the others stay in it."""
    whole = checks.plan("quick")
    kept = [i for i, c in enumerate(whole) if c.rank == 0 and c.dtype == F32 and c.case.op in OPS]
    monkeypatch.setattr(report, "enumerate", lambda _: [(i, whole[i]) for i in kept], raising=False)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_refused(fault: str, fresh: Path, few_checks: None) -> None:
    shim()
    planted = [sys.executable, "-m", "tests.verify.planted", fault]
    found = verify("quick", tiers=["cpu"], ops=OPS, command=planted, seconds=100, check_seconds=4).found["cpu"]
    assert found["rms_norm_modulate"].verdict == "wrong"
    assert WORDS[fault] in found["rms_norm_modulate"].wrong
    assert found["channelwise_normalize"].verdict == "proven"

    reason = ltxkern.capabilities()["rms_norm_modulate"]["cpu"] or ""
    assert WORDS[fault] in reason
    assert "ltxkern verify" in reason
    x, row = torch.randn(3, 16), torch.zeros(16)
    with ltxkern.use_backend("cpu"), pytest.raises(ltxkern.BackendError, match="found it wrong on cpu"):
        ltxkern.rms_norm_modulate(x, row, row)
    torch.testing.assert_close(ltxkern.rms_norm_modulate(x, row, row), torch.nn.functional.rms_norm(x, (16,), eps=1e-6))
    assert ltxkern.served()["rms_norm_modulate"] == {"torch"}
    ltxkern.channelwise_normalize(x)
    assert ltxkern.served()["channelwise_normalize"] == {next(iter(ltxkern.backends()))}


def test_the_command(fresh: Path, few_checks: None, capsys: pytest.CaptureFixture[str]) -> None:
    if "cpu" not in ltxkern.backends():
        pytest.skip("no CPU kernels in this build")
    file = fresh / "found.json"
    arguments = ["verify", "--tiers", "cpu", "--ops", ",".join(OPS), "--output-json", str(file)]
    assert main(arguments) == 0
    found = json.loads(file.read_text())
    assert {op: row["cpu"]["verdict"] for op, row in found["found"].items()} == dict.fromkeys(OPS, "proven")
    assert {(row["op"], row["tier"]) for row in found["times"]} == {(op, t) for op in OPS for t in ("cpu", "torch")}
    assert all(row["percent_of_roof"] > 0 for row in found["times"])
    assert "proven 2/2" in capsys.readouterr().out
    assert all(verdict.passed for op in OPS for verdict in proofs.verdicts("cpu", op, "cpu").values() if verdict)
    assert proofs.order("cpu", OPS[0]) == ("cpu",)
    assert ltxkern.capabilities()[OPS[0]]["cpu"] is None


@pytest.mark.parametrize(("option", "value"), [("--ops", "rms"), ("--tiers", "torch")])
def test_unknown_names_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", option, value]) == 2
    assert f"{option}: unknown {value}; known are" in capsys.readouterr().err


def test_what_was_found_survives_an_interruption(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, report: Report, **options: object) -> None:
        report.found["cpu"] = {"dual_add": Found(4, 4), "head_gate": Found(4, 2, essential_left=2)}
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "verify", interrupted)
    file = fresh / "found.json"
    assert main(["verify", "--output-json", str(file)]) == command.INTERRUPTED
    assert "interrupted" in capsys.readouterr().out
    assert not json.loads(file.read_text())["finished"]
    (stored,) = proofs.stored("cpu").values()
    assert stored is not None
    assert {op: set(row) for op, row in stored.verdicts.items()} == {"dual_add": {"cpu"}}


def test_a_worker_that_cannot_start_is_said(few_checks: None, fresh: Path) -> None:
    limits = supervise.Limits(report.time.monotonic() + 60, 4)
    planned = [(i, c) for i, c in enumerate(checks.plan("quick")) if c.case.op == "dual_add"]
    broken = [sys.executable, "-c", "raise SystemExit(3)"]
    found = supervise.check_tier("cpu", "cpu", "quick", planned, limits, lambda found: None, broken)
    assert found["dual_add"].wrong == "the worker does not start: the process ended by status 3"


def test_every_op_has_its_place_and_its_production_size() -> None:
    assert set(checks.IMPORTANCE) == set(ltxkern.capabilities())
    for device in ("cpu", "cuda"):
        assert [case.op for case, _, _ in timing.sizes(device)] == list(checks.IMPORTANCE)
    assert {c.values for c in checks.plan("quick")} == set(checks.VALUES)
    essential = {c.case.op for c in checks.plan("quick") if c.rank == 0}
    assert essential == set(checks.IMPORTANCE)
    assert len(checks.plan("full")) > len(checks.plan("quick"))


@pytest.mark.parametrize(
    "case", [c.case for c in checks.plan("quick") if c.rank == 0 and c.size == checks.REST], ids=str
)
def test_references_in_fp64_are_in_fp64(case: checks.OpCase) -> None:
    given = checks.handed(lambda: case.run(case.tensors(case.dtypes[0], Size(2, 3, 4))))
    composed, exact = checks.references(case.op, given)
    assert [value.dtype for value in exact] == [torch.float64] * len(composed)


@pytest.mark.parametrize(
    ("seconds", "order"),
    [
        ({"cuda": 1.0, "triton": 0.99, "cpu": 9.0, "torch": 0.1}, ("cuda", "triton", "cpu")),
        ({"cuda": 1.0, "triton": 0.5}, ("triton", "cuda")),
        ({"triton": 1.0, "nvrtc": 0.9, "cuda": 0.5}, ("cuda", "nvrtc", "triton")),
        ({"torch": 1.0}, None),
    ],
)
def test_a_tier_is_preferred_only_where_it_is_clearly_quicker(
    seconds: dict[str, float], order: tuple[str, ...] | None
) -> None:
    rows = [timing.Timed("dual_add", "", tier, taken, 1, 1.0, 1.0) for tier, taken in seconds.items()]
    assert timing.preferred(rows, ltxkern.dispatch.BACKENDS).get("dual_add") == order
