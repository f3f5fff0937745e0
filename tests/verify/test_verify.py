"""verify finds what is planted, dispatch refuses it afterwards, and others still serve; what is right is proven."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import ltxkern
from ltxkern import dispatch
from ltxkern.cli import main
from ltxkern.commands import verify as command
from ltxkern.compiled import extension
from ltxkern.trust import proofs
from ltxkern.trust.permitted import BACKENDS
from ltxkern.verify import checks, report, timing
from ltxkern.verify.cases import BY_NAME, F32, Size
from ltxkern.verify.interruption import interruptible
from ltxkern.verify.report import Report, verify
from ltxkern.verify.supervise import Found, Limits, check_tier
from tests.csrc.shim_build import shim
from tests.verify.conftest import fresh_dispatch
from tests.verify.planted import FAULTS, RIGHT

OPS = [RIGHT, "head_gate"]
TIERS = ["cuda", "triton", "cpu", "nvrtc"]
# A worker that answers checks at once, but for those named, whose calls never end; ready after so many seconds.
ENDLESS = [
    sys.executable,
    "-S",
    "-c",
    """
import json, sys, time
say = lambda **facts: print(json.dumps(facts), flush=True)
job = json.loads(sys.stdin.readline())
time.sleep(float(sys.argv[2]) if sys.argv[2:] else 0)
say(ready=True)
for index in job["checks"]:
    say(begin=index)
    say(call=True)
    time.sleep(1e3 * (index in json.loads(sys.argv[1])))
    say(call=False)
    say(end=index, fault=None)
say(done=True)
""",
]


# Of an op in one dtype and rank 0.
SIZES = len((checks.WHOLE, checks.REST, checks.FILLED))


@pytest.fixture(scope="module")
def few_checks() -> Iterator[None]:
    """Those of rank 0 in fp32, in the place of the plan; workers take an index in the whole of it."""
    kept = [(i, c) for i, c in enumerate(checks.plan("quick")) if c.rank == 0 and c.dtype == F32]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "numbered", lambda level: kept)
        yield


@pytest.fixture(scope="module")
def found(few_checks: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Found], Path]:
    """What verify finds of the planted faults, and the cache that it is stored in."""
    shim()
    cache = tmp_path_factory.mktemp("cache")
    planted = [sys.executable, "-m", "tests.verify.planted"]
    ops = [RIGHT, *(fault.op for fault in FAULTS.values())]
    with fresh_dispatch(cache):
        made = verify("quick", tiers=["cpu"], ops=ops, timed=False, command=planted, seconds=300, check_seconds=10)
    return made.found["cpu"], cache


@pytest.fixture(autouse=True)
def cpu_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    """With or without a built extension there is a tier "cpu"."""
    reason_of = dispatch.unavailable
    for module in (dispatch, report):
        monkeypatch.setattr(module, "unavailable", lambda name: None if name == "cpu" else reason_of(name))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_refused(fault: str, found: tuple[dict[str, Found], Path]) -> None:
    (entries, cache), (op, _, words) = found, FAULTS[fault]
    assert entries[op].verdict == "wrong"
    assert words in entries[op].wrong
    case = BY_NAME[op]
    tensors = case.tensors()
    with fresh_dispatch(cache):
        with ltxkern.use_backend("torch"):
            expected = case.run(tensors)
        reason = ltxkern.capabilities()[op]["cpu"] or ""
        assert words in reason
        assert reason.startswith("`ltxkern verify` found it wrong on cpu")
        with ltxkern.use_backend("cpu"), pytest.raises(ltxkern.BackendError, match="found it wrong on cpu"):
            case.run(tensors)
        assert all(map(torch.equal, case.run(tensors), expected))
        assert ltxkern.served()[op] == {"torch"}


def test_what_is_right_beside_it_is_proven_and_serves(found: tuple[dict[str, Found], Path]) -> None:
    entries, cache = found
    assert entries[RIGHT].verdict == "proven"
    with fresh_dispatch(cache):
        assert ltxkern.capabilities()[RIGHT]["cpu"] is None


def test_the_command(fresh: Path, few_checks: None, capsys: pytest.CaptureFixture[str]) -> None:
    if extension.unavailable("cpu"):
        pytest.skip("no CPU kernels in this build")
    file = fresh / "found.json"
    arguments = ["verify", "--tiers", "cpu", "--ops", ",".join(OPS), "--output-json", str(file)]
    assert main(arguments) == 0
    found = json.loads(file.read_text())
    assert {op: row["cpu"]["verdict"] for op, row in found["found"].items()} == dict.fromkeys(OPS, "proven")
    assert {(row["op"], row["tier"]) for row in found["times"]} == {(op, t) for op in OPS for t in ("cpu", "torch")}
    assert all(row["percent_of_roof"] > 0 for row in found["times"])
    assert f"proven {SIZES}/{SIZES}" in capsys.readouterr().out
    assert all(verdict.passed for op in OPS for verdict in proofs.verdicts("cpu", op, "cpu").values() if verdict)
    assert proofs.order("cpu", OPS[0]) == ("cpu",)
    assert ltxkern.capabilities()[OPS[0]]["cpu"] is None


@pytest.fixture
def one_hangs() -> tuple[list[tuple[int, checks.Check]], list[str]]:
    """Checks of three ops, and a worker that never ends those of one of them."""
    planned = [
        (i, c) for i, c in enumerate(checks.plan("quick")) if c.rank == 0 and c.case.op in ("qk_norm_rope", *OPS)
    ]
    return planned, [*ENDLESS, str([i for i, c in planned if c.case.op == "qk_norm_rope"])]


@pytest.mark.parametrize("tier", TIERS)
def test_a_call_without_an_end_is_found_in_each_share(
    tier: str, one_hangs: tuple[list[tuple[int, checks.Check]], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shares of a quick run of all four tiers, a fifth as long."""
    monkeypatch.setattr(report, "CALL_SECONDS", {name: least / 5 for name, least in report.CALL_SECONDS.items()})
    left, longest = report.SECONDS["quick"] / 5, report.CHECK_SECONDS["quick"] / 5
    for place, other in enumerate(TIERS[: TIERS.index(tier) + 1]):
        share = report.share(Limits(time.monotonic() + left, longest, longest), other, TIERS[place:])
        left -= share.left()
    planned, worker = one_hangs
    found = check_tier(tier, "cpu", "quick", planned, share, lambda found: None, worker)
    assert found["qk_norm_rope"].wrong == f"{planned[0][1]}: no end after {share.call:.3g} s"


def test_what_comes_behind_it_has_time_left(one_hangs: tuple[list[tuple[int, checks.Check]], list[str]]) -> None:
    planned, worker = one_hangs
    share = Limits(time.monotonic() + 4.0, 9.0, 9.0).share(1.0, 0.1)
    found = check_tier("cpu", "cpu", "quick", planned, share, lambda found: None, worker)
    assert found["qk_norm_rope"].wrong == f"{planned[0][1]}: no end after 1 s"
    assert {op: (found[op].verdict, found[op].complete) for op in OPS} == dict.fromkeys(OPS, ("proven", True))


def test_a_slow_start_is_not_taken_from_the_share(
    one_hangs: tuple[list[tuple[int, checks.Check]], list[str]],
) -> None:
    """Of both workers, the second after the call without an end."""
    planned, worker = one_hangs
    share = Limits(time.monotonic() + 6.0, 9.0, 9.0).share(0.1, 0.1)
    found = check_tier("cpu", "cpu", "quick", planned, share, lambda found: None, [*worker, "0.8"])
    assert found["qk_norm_rope"].wrong == f"{planned[0][1]}: no end after {share.call:.3g} s"
    assert {op: (found[op].verdict, found[op].complete) for op in OPS} == dict.fromkeys(OPS, ("proven", True))


def test_a_start_without_an_end_leaves_time_to_others(
    one_hangs: tuple[list[tuple[int, checks.Check]], list[str]],
) -> None:
    (planned, worker), whole = one_hangs, Limits(time.monotonic() + 1.0, 9.0, 9.0)
    found = check_tier("cpu", "cpu", "quick", planned, whole.share(0.1, 0.1), lambda found: None, [*worker, "9"])
    assert 0.2 < whole.left() < 0.6
    assert {entry.verdict for entry in found.values()} == {"not reached"}


def test_what_was_not_reached_is_no_success(few_checks: None, fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--tiers", "cpu", "--ops", ",".join(OPS), "--budget", "0.01"]) == 1
    said = capsys.readouterr().out
    assert f"cpu: {2 * SIZES} of {2 * SIZES} checks left out for want of time" in said
    assert said.count(f"not reached 0/{SIZES}") == said.count("not reached") == 2


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--ops", "rms", "--ops: unknown rms; known are"),
        ("--ops", "", "--ops names nothing: leave it out for all, or name some of"),
        ("--tiers", "torch", "--tiers: unknown torch; known are"),
        ("--tiers", " ,", "--tiers names nothing"),
        ("--output-json", "/nowhere/a.json", "--output-json: output '/nowhere/a.json': the folder '/nowhere' does not exist: make"),
        ("--output-json", "/proc/a.json", "the folder '/proc' is not writable (No such file or directory): name another"),
        ("--output-json", "/", "--output-json: output '/' is a folder: name a file in it"),
        *(
            ("--budget", value, f"argument --budget: expected a number of seconds above 0, got '{value}'")
            for value in ("0", "-5", "nan", "inf", "much")
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_before_the_run(
    option: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "verify", None)
    try:
        status: object = main(["verify", option, value])
    except SystemExit as usage:
        status = usage.code
    assert status == 2
    assert words in capsys.readouterr().err


def test_where_nothing_can_be_checked_it_says_so(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "unavailable", lambda name: "no such device")
    assert main(["verify", "--tiers", "cuda,nvrtc", "--ops", "head_gate"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith(" -")] == ["head_gate"]
    assert lines[-2].startswith("nothing was checked: cuda, nvrtc cannot run here; ")
    assert lines[-1].startswith("nothing was stored")


@pytest.mark.parametrize(
    ("lost", "status", "words", "last"),
    [
        ("found", 1, "--output-json: {}/found/a.json cannot be written (", "stored in "),
        ("proofs", 0, "cannot be stored in {}/proofs (File exists): set LTXKERN_CACHE", "nothing was stored"),
    ],
)
def test_a_file_that_cannot_be_written_costs_nothing_else(
    lost: str,
    status: int,
    words: str,
    last: str,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loses(*args: object, report: Report, on_change: Callable[[Report], None], **options: object) -> None:
        """A folder, on the way, in whose place a file lies then."""
        report.found["cpu"] = {"head_gate": Found(4, 4)}
        for report.seconds in (2.0, 4.0):
            on_change(report)
            if (fresh / lost).is_dir():
                shutil.rmtree(fresh / lost)
                (fresh / lost).touch()
        report.store()
        report.finished = True

    for name in ("found", "proofs"):
        (fresh / name).mkdir()
    monkeypatch.setattr(report, "verify", loses)
    file = fresh / "found" / "a.json"
    assert main(["verify", "--ops", "head_gate", "--output-json", str(file)]) == status
    said = capsys.readouterr().out
    assert "proven 4/4" in said
    assert words.format(fresh) in said
    assert said.splitlines()[-1].startswith(last)
    assert file.exists() is (lost == "proofs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_was_found_survives_an_interruption(
    number: signal.Signals, fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, report: Report, **options: object) -> None:
        entries = Found(4, 4), Found(4, 3), Found(4, 3, 1), Found(4, 2, essential_left=2), Found(4, 1, wrong="a")
        report.found["cpu"] = dict(zip(checks.IMPORTANCE, entries, strict=False))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(report, "verify", interrupted)
    file = fresh / "found.json"
    assert main(["verify", "--output-json", str(file)]) == command.INTERRUPTED
    assert "interrupted" in capsys.readouterr().out
    assert not json.loads(file.read_text())["finished"]
    (stored,) = proofs.stored("cpu").values()
    assert stored is not None
    first, second, third, fourth, fifth = checks.IMPORTANCE[:5]
    levels = {op: (row["cpu"].passed, row["cpu"].level) for op, row in stored.verdicts.items()}
    expected = {first: (True, "quick"), second: (True, "partial"), third: (True, "quick"), fifth: (False, "quick")}
    assert levels == expected, f"{fourth} was not reached"


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_worker_that_cannot_start_says_nothing_of_an_op(few_checks: None, fresh: Path) -> None:
    made = verify("quick", tiers=["cpu"], ops=OPS, command=[sys.executable, "-c", "raise SystemExit(3)"])
    assert made.stopped == {"cpu": "its process does not start: the process ended by status 3"}
    assert (made.wrong(), made.stored) == ([], [])


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
    "name",
    [
        "channelwise_normalize float64 2x61x300",
        "normalize_noise float64 1x1000x1024",
        "channelwise_normalize-pairs float64 3x5x13 offset",
    ],
)
def test_what_is_exact_in_fp64_is_not_called_wrong(name: str) -> None:
    """Where torch's own fp64 is 1e-13 and more off."""
    (check,) = (check for check in checks.plan("full") if str(check) == name)
    tensors = checks.VALUES[check.values](check.case.tensors(check.dtype, check.size))
    (x,) = tensors.values()
    (composed,), (exact,) = checks.references(check.case.op, checks.handed(lambda: check.case.run(tensors)))
    wide = x.numpy().astype(np.longdouble)
    axes = (-2, -1)
    ours = torch.from_numpy(
        ((wide - wide.mean(axes, keepdims=True)) / wide.std(axes, ddof=1, keepdims=True)).astype(np.float64)
    )
    assert checks.distance(ours, composed, exact, check.dtype) is None
    assert float((ours - exact).abs().max()) < 2e-15


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
    rows = [timing.Timed("gated_residual", "", tier, taken, 1, 1.0, 1.0) for tier, taken in seconds.items()]
    assert timing.preferred(rows, BACKENDS).get("gated_residual") == order
