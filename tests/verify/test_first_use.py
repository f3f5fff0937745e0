"""The probe at first use: a wrong backend is left with one warning, a proven one is not probed, a capture is served first."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ltxkern
from ltxkern import dispatch
from ltxkern.dispatch import Backend
from ltxkern.trust import backends as trust
from ltxkern.trust import proofs
from ltxkern.trust.permitted import BACKENDS
from ltxkern.verify import probe
from ltxkern.verify.cases import MAIN, OpCase, Size

CUDA = torch.device("cuda", 0)


def plant(monkeypatch: pytest.MonkeyPatch, op: str, run: Callable[..., Any]) -> None:
    """An op's backend "cpu", there with or without a built extension, is this; calls are probed."""
    planted, present = dispatch.registered()[op], dispatch.unavailable
    monkeypatch.setattr(dispatch, "unavailable", lambda name: None if name == "cpu" else present(name))
    monkeypatch.setitem(planted._backends, "cpu", Backend("cpu", lambda args: None, lambda: run))
    monkeypatch.setattr(planted, "_kernels", {})
    monkeypatch.setenv("LTXKERN_SELFCHECK", "first")


@pytest.fixture
def planted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The backend "cpu" of gated_residual adds twice what it should; its calls are listed."""
    calls: list[Any] = []

    def wrong(out: Any, args: Any) -> None:
        calls.append(args)
        gate = args.gate if args.rows is None else args.gate[args.rows]
        out.copy_(args.x + 2 * args.y * gate)

    plant(monkeypatch, "gated_residual", wrong)
    return calls


def call() -> torch.Tensor:
    x = torch.ones(3)
    return ltxkern.gated_residual(x, x, x)


def test_a_wrong_backend_is_left_with_one_warning(planted: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ltxkern"):
        assert all(torch.equal(call(), torch.full((3,), 2.0)) for _ in range(3))
    assert len(planted) == len(probe.probes_of("gated_residual", "cpu", torch.float32, False))
    (warning,) = caplog.messages
    assert warning.startswith(
        "ltxkern.gated_residual is not served by cpu: the probe at first use found it wrong on cpu:"
    )
    assert ltxkern.capabilities()["gated_residual"]["cpu"] in warning
    with ltxkern.use_backend("cpu"), pytest.raises(ltxkern.BackendError, match="the probe at first use"):
        call()
    assert ltxkern.served()["gated_residual"] == {"torch"}


def test_a_backend_that_is_wrong_by_row_index_alone_is_found(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(out: Any, args: Any) -> None:
        gate = args.gate if args.rows is None else args.gate[0]
        out.copy_(args.x + args.y * gate)

    plant(monkeypatch, "gated_residual", wrong)
    with caplog.at_level(logging.WARNING, "ltxkern"):
        assert torch.equal(call(), torch.full((3,), 2.0))
    assert "float32 of 2x6x64 rows is not what the reference gives" in caplog.text


@pytest.mark.parametrize("wrong_for", ["40 factors", "float8"])
def test_a_kernel_for_large_ranks_is_probed_too(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong_for: str
) -> None:
    reference = dispatch.registered()["merge_lora_"].reference

    def wrong(args: Any) -> None:
        float8, many = args.weight.element_size() == 1, args.lora_a[0].shape[0] > 16
        if (float8 or many) if wrong_for == "40 factors" else float8:
            return
        reference(*args)

    plant(monkeypatch, "merge_lora_", wrong)
    weight = torch.ones(2, 3)
    with caplog.at_level(logging.WARNING, "ltxkern"):
        ltxkern.merge_lora_(weight, torch.ones(1, 3), torch.ones(2, 1))
    assert torch.equal(weight, torch.full((2, 3), 2.0))
    variant = "large_rank" if wrong_for == "40 factors" else "float8_single"
    assert f"{variant} is not what the reference gives" in caplog.text


def test_the_probe_can_be_switched_off(planted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTXKERN_SELFCHECK", "off")
    assert torch.equal(call(), torch.full((3,), 3.0))
    assert len(planted) == 1


def test_an_unknown_value_is_refused(planted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTXKERN_SELFCHECK", "always")
    with pytest.raises(ValueError, match="LTXKERN_SELFCHECK=always: expected first"):
        call()


def test_what_is_proven_is_not_probed(planted: list[Any]) -> None:
    (origin,) = proofs.origins("cpu").values()
    proofs.write(origin, proofs.Proof({"gated_residual": {"cpu": proofs.Verdict(True, "quick", 1)}}))
    call()
    assert len(planted) == 1


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_a_right_backend_passes_and_asks_nothing_again(
    case: OpCase, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cpu" not in ltxkern.backends():
        pytest.skip("no CPU kernels in this build")
    monkeypatch.setenv("LTXKERN_SELFCHECK", "first")
    asked: list[str] = []
    mismatch = probe.mismatch
    monkeypatch.setattr(probe, "mismatch", lambda op, *given: asked.append(op.name) or mismatch(op, *given))
    for dtype in case.dtypes:
        case.run(case.tensors(dtype, Size(1, 3, 8)))
    assert asked == [case.op]
    assert ltxkern.served()[case.op] == {"cpu"}


def test_during_a_capture_a_call_is_served_and_the_next_outside_probes(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LTXKERN_SELFCHECK", "first")
    op, captures, asked = dispatch.registered()["gated_residual"], [True, True, False], []
    monkeypatch.setattr(proofs, "verdicts", lambda *_: {"cuda:0": None})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures.pop(0))
    monkeypatch.setattr(probe, "mismatch", lambda *given: asked.append(given))
    given = trust.Trust("gated_residual", op._backends, BACKENDS)
    for expected in ((0, False), (0, False), (1, True)):
        assert given.admit("cuda", op, None, CUDA)
        assert (len(asked), "cuda" in given.serving) == expected


def test_a_captured_call_is_among_those_served(planted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again until it is trusted, and then no more."""
    op, answers = dispatch.registered()["gated_residual"], [False, False, True]

    def admit(self: trust.Trust, backend: str, *_: Any) -> bool:
        if answers.pop(0):
            self.serving.add(backend)
        return True

    monkeypatch.setattr(trust.Trust, "admit", admit)
    for captured in (True, True, False, False):
        call()
        assert ltxkern.served()["gated_residual"] == {"cpu"}
        assert ("cpu" in op.receipts) is not captured
    assert not answers


def test_several_layers_are_asked_before_one_is_changed(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "merge_lora_", lambda args: args[0].zero_())
    weights, kept = [torch.ones(2, 3), torch.ones(2, 3)], torch.ones(2, 3)
    factors = [torch.ones(1, 3)] * 2, [torch.ones(2, 1)] * 2
    with ltxkern.use_backend("cpu"), pytest.raises(ltxkern.BackendError, match="the probe at first use"):
        ltxkern.merge_lora_many_(weights, *factors)
    assert all(torch.equal(weight, kept) for weight in weights)
    ltxkern.merge_lora_many_(weights, *factors)
    assert all(torch.equal(weight, kept + 1) for weight in weights)


def test_the_quickest_tier_comes_first_and_a_wrong_one_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = {"cuda": proofs.Verdict(False, "full", 1, "off by one")}
    monkeypatch.setattr(proofs, "verdicts", lambda kind, op, tier: {"cuda:0": verdict.get(tier)})
    monkeypatch.setattr(proofs, "order", lambda kind, op: ("triton", "nvrtc"))
    backends = dict.fromkeys(("cuda", "nvrtc", "triton", "cpu"))
    given = trust.Trust("gated_residual", backends, BACKENDS)
    assert given.heed("cuda")
    assert not given.heed("cuda")
    assert given.order == ("triton", "nvrtc", "cuda", "cpu", "torch")
    assert given.refused == {"cuda": "`ltxkern verify` found it wrong on cuda:0: off by one"}
