"""The store: used for the machine and the build it was written for, and never trusted where it is not whole."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

import ltxkern
from ltxkern.trust import proofs
from ltxkern.trust.proofs import Origin, Proof, Verdict

ORIGIN = Origin("NVIDIA H200", "9.0", "580.1", "2.11", "3.6", "abc")
WRONG, QUICK = (Verdict(False, level, 3, "off by one") for level in ("full", "quick"))
PROOF = Proof(
    {"head_gate": {"cuda": WRONG, "triton": Verdict(True, "quick", 7)}}, {"head_gate": ("triton", "cuda")}, "now"
)


def test_what_is_written_is_read(fresh: Path) -> None:
    assert proofs.read(ORIGIN) is None
    assert proofs.write(ORIGIN, PROOF) is None
    assert proofs.read(ORIGIN) == PROOF
    assert [path.suffix for path in (fresh / "proofs").iterdir()] == [".json"]


@pytest.mark.parametrize("changed", Origin._fields)
def test_another_machine_or_build_has_no_proof(changed: str, fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    proofs.write(ORIGIN, PROOF)
    other = ORIGIN._replace(**{changed: "other"})
    assert proofs.read(other) is None
    assert not caplog.records
    # And one that was carried there is named and ignored.
    other.path.write_text(ORIGIN.path.read_text())
    assert proofs.read(other) is None
    assert f"{other.path} is ignored: it was written for another card, driver, torch or build" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: text.replace('"passed": false', '"passed": "no"'),
        lambda text: text.replace('"level": "full"', '"level": "some"'),
        lambda text: text.replace('"checks": 3', '"other": 3'),
        lambda text: text.replace('"cuda"', '"gpu"'),
        lambda text: text.replace('"order": {', '"order": {"x": 3, '),
    ],
)
def test_a_damaged_proof_is_named_and_ignored(
    damage: Callable[[str], str], fresh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proofs.write(ORIGIN, PROOF)
    text = ORIGIN.path.read_text()
    assert damage(text) != text
    ORIGIN.path.write_text(damage(text))
    assert proofs.read(ORIGIN) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(ORIGIN.path) in caplog.text
    assert proofs.write(ORIGIN, PROOF) is None
    assert proofs.read(ORIGIN) == PROOF


def test_a_store_that_cannot_be_used_is_said(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    (fresh / "proofs").write_text("a file in the folder's place")
    assert proofs.read(ORIGIN) is None
    assert "cannot be read and is ignored" in caplog.text
    assert "cannot be stored in" in (proofs.write(ORIGIN, PROOF) or "")
    assert ltxkern.capabilities()["head_gate"]["torch"] is None


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        (WRONG, Verdict(True, "quick", 9), WRONG),
        (WRONG, Verdict(True, "full", 9), Verdict(True, "full", 9)),
        (WRONG, Verdict(True, "partial", 9), WRONG),
        (WRONG, Verdict(False, "quick", 1, "crash"), WRONG),
        (QUICK, Verdict(True, "partial", 9), QUICK),
        (Verdict(True, "full", 9), Verdict(False, "quick", 1, "crash"), Verdict(False, "quick", 1, "crash")),
        (Verdict(True, "full", 90), Verdict(True, "quick", 9), Verdict(True, "full", 90)),
    ],
)
def test_a_full_run_outlives_a_quick_one(old: Verdict, new: Verdict, kept: Verdict, fresh: Path) -> None:
    for verdict in (old, new):
        proofs.write(ORIGIN, Proof({"head_gate": {"cuda": verdict}}))
    stored = proofs.read(ORIGIN)
    assert stored is not None
    assert stored.verdicts["head_gate"]["cuda"] == kept
