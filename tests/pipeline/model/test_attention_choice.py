"""The choice of an attention kernel: by name or by the card, refused with a reason, checked once, dropped with a warning."""

import dataclasses
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ltxkern.pipeline.model import attention_choice
from ltxkern.pipeline.model.attention_choice import (
    NAMES,
    ORDERS,
    AttentionChoice,
    fault,
    order,
    softmax_attention,
    use_attention,
)
from ltxkern.pipeline.model.attention_kernels import KERNELS, torch_attention
from ltxkern.pipeline.model.transformer import LTX2Transformer, predict_velocity
from tests.pipeline.model.demo_inputs import inputs
from tests.processes import ROOT

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
GIVEN = tuple(torch.randn(1, n, 2, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 6, 6))


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """Every kernel at its first use, before a test and after it."""
    fault.cache_clear()
    yield
    fault.cache_clear()


def replace(monkeypatch: pytest.MonkeyPatch, name: str, run: Any) -> None:
    monkeypatch.setattr(
        attention_choice, "KERNELS", {**KERNELS, name: dataclasses.replace(KERNELS[name], run=run, in_shares=None)}
    )


def wrong(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch_attention(query, key, value) * 1.01


def failing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise RuntimeError("no plan for this\nand more")


def test_the_order_is_known_for_every_card(monkeypatch: pytest.MonkeyPatch) -> None:
    firsts = {(12, 0): "cudnn", (10, 0): "cudnn", (9, 0): "fa3", (8, 9): "flash", (8, 0): "flash", (7, 5): "efficient"}
    for capability, first in firsts.items():
        monkeypatch.setattr(attention_choice, "capability", lambda device, found=capability: found)
        names = order(CARD)
        assert names[0] == first
        assert names[-1] == "math"
        assert all(KERNELS[name].exact for name in names)
    assert order(CPU) == ("flash", "math")
    assert order(torch.device("meta")) == ("torch",)


def test_the_page_lists_kernels_and_orders() -> None:
    page = (ROOT / "docs/run.md").read_text().partition("## Which attention")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert [row[0].strip("`") for row in rows if row[0].startswith("`")] == [*NAMES]
    assert [tuple(row[1].split(", ")) for row in rows if row[0].startswith(("sm_", "below"))] == [
        names for _, names in ORDERS
    ]


def test_a_name_is_one_of_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    legal = "auto, cudnn, fa3, flash, efficient, math, torch, sage"
    with pytest.raises(ValueError, match=f"^attention must be one of {legal}, got 'fast'$"):
        AttentionChoice("fast")
    monkeypatch.setenv("LTXKERN_ATTENTION", "fast")
    with pytest.raises(ValueError, match=f"^LTXKERN_ATTENTION must be one of {legal}, got 'fast'$"):
        AttentionChoice()
    monkeypatch.setenv("LTXKERN_ATTENTION", "math")
    assert AttentionChoice().name == "math"
    assert AttentionChoice("auto").name == "auto"
    monkeypatch.setenv("LTXKERN_ATTENTION", "")
    assert AttentionChoice().name == "auto"


@pytest.mark.parametrize("name", sorted({*NAMES} - {"auto", "flash", "math", "torch"}))
def test_a_named_kernel_is_refused_early_and_never_replaced(name: str) -> None:
    choice = AttentionChoice(name)
    reason = f"^attention {name} cannot serve float32 on cpu: it runs on cuda, not on cpu; use one of auto, flash, math, torch$"
    with pytest.raises(ValueError, match=reason):
        choice.require(CPU, torch.float32, {"attention_head_dim": 128, "audio_attention_head_dim": 64})
    with pytest.raises(ValueError, match=reason):
        choice(*GIVEN)
    assert choice.served == set()


def test_every_head_width_of_the_model_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltxkern.pipeline.model.attention_kernels.capability", lambda device: (9, 0))
    choice = AttentionChoice("flash")
    assert choice.require(CARD, torch.bfloat16, {"attention_head_dim": 128, "audio_attention_head_dim": 64}) is choice
    with pytest.raises(
        ValueError, match=r"attention flash cannot serve bfloat16 on cuda:0: .*, not 20; use one of auto, math, torch$"
    ):
        choice.require(CARD, torch.bfloat16, {"attention_head_dim": 128, "audio_attention_head_dim": 20})


def test_the_default_has_the_bits_of_torch_and_says_who_serves(
    model: LTX2Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    choice = AttentionChoice("auto")
    with caplog.at_level(logging.INFO, logger=attention_choice.__name__):
        with use_attention(choice):
            ours = predict_velocity(model, **inputs())
        assert [record.getMessage() for record in caplog.records] == ["attention is computed by flash on cpu"]
    with use_attention("torch"):
        assert all(map(torch.equal, ours, predict_velocity(model, **inputs())))
    with use_attention("math"):
        other = predict_velocity(model, **inputs())
    assert not any(map(torch.equal, ours, other))
    assert choice.served == {"flash"}


@pytest.mark.parametrize(
    ("run", "reason"),
    [(wrong, "from fp64 on a tiny case, allowed"), (failing, "it failed on a tiny case: no plan for this$")],
)
def test_a_kernel_that_fails_its_check_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, run: Any, reason: str
) -> None:
    replace(monkeypatch, "flash", run)
    choice = AttentionChoice("auto")
    assert torch.equal(choice(*GIVEN), KERNELS["math"].run(*GIVEN))
    assert choice.served == {"math"}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.records[0].getMessage().startswith("attention by flash is dropped on cpu: it ")
    with pytest.raises(ValueError, match=f"^attention flash cannot serve on cpu: .*{reason}"):
        AttentionChoice("flash")(*GIVEN)


def test_an_approximation_has_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "flash", wrong)
    kernels = attention_choice.KERNELS
    assert "allowed" in str(fault("flash", CPU, torch.float32, 8))
    fault.cache_clear()
    monkeypatch.setitem(kernels, "flash", dataclasses.replace(kernels["flash"], exact=False))
    assert fault("flash", CPU, torch.float32, 8) is None


@pytest.mark.parametrize("name", ["flash", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_are_checked_too(name: str, dtype: torch.dtype) -> None:
    assert fault(name, CPU, dtype, 64, shared=True) is None


def test_a_check_is_made_once_and_not_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checked = []

    def check(name: str, *case: Any, **shared: Any) -> str | None:
        checked.append((name, *shared))
        return "it is wrong" if shared and name == "cudnn" else None

    monkeypatch.setattr(attention_choice, "fault", check)
    monkeypatch.setattr(attention_choice, "_captures", lambda device: False)
    choice = AttentionChoice("auto")
    for _ in range(2):
        choice(*GIVEN)
    assert checked == [("flash",)]
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    query, key = (SimpleNamespace(device=CARD, dtype=torch.bfloat16, shape=(1, n, 32, 64)) for n in (126, 32640))
    shares: Any = choice._shares
    assert shares("fa3", query, key) == 4
    assert shares("flash", query, key) == 1  # by itself
    assert checked[1:] == [("fa3", "shared")]
    monkeypatch.setattr(attention_choice, "_captures", lambda device: True)
    assert shares("cudnn", query, key) == 4
    assert AttentionChoice("math").kernel(CPU, torch.float32, 8) == "math"
    assert len(checked) == 2
    monkeypatch.setattr(attention_choice, "_captures", lambda device: False)
    assert shares("cudnn", query, key) == 1
    assert "attention by cudnn takes long keys in one walk on cuda:0: it is wrong" in caplog.text


def test_a_choice_ends_with_its_block() -> None:
    with use_attention("math") as outer:
        with use_attention(AttentionChoice("torch")) as inner:
            softmax_attention(*GIVEN)
        softmax_attention(*GIVEN)
    softmax_attention(*GIVEN)
    assert (inner.served, outer.served) == ({"torch"}, {"math"})


def test_what_has_no_elements_or_no_data_is_left_to_torch() -> None:
    choice = AttentionChoice("flash")
    assert choice(GIVEN[0][:, :0], *GIVEN[1:]).shape == (1, 0, 2, 8)
    assert choice(*(x.to("meta") for x in GIVEN)).shape == (1, 4, 2, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="ATTENTION KERNELS NOT RUN: needs a CUDA device")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.exact])
def test_every_kernel_that_is_here_is_right_on_the_device(name: str, head_dim: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    reason = KERNELS[name].refuse(attention_choice.Case(device, torch.bfloat16, head_dim))
    if reason is not None:
        pytest.skip(f"ATTENTION BY {name} NOT RUN: {reason}")
    assert fault(name, device, torch.bfloat16, head_dim) is None
    if KERNELS[name].in_shares is not None:
        assert fault(name, device, torch.bfloat16, head_dim, shared=True) is None
