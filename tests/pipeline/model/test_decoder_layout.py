"""The layout of the video decoder: by card or by name, checked once, dropped with a warning, and no other pictures."""

import logging
from collections.abc import Iterator

import pytest
import torch

from ltxkern.commands import verify
from ltxkern.patch import patch
from ltxkern.pipeline.model import decoder_layout
from ltxkern.pipeline.model.decode import decode_video
from ltxkern.pipeline.model.decoder_layout import LAYOUTS, VARIABLE, choose, describe, fault, lay_out, order
from tests.pipeline.model.tiny_vae import tiny_video_vae

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """Every layout at its first use, before a test and after it."""
    for known in (choose, fault):
        known.cache_clear()
    yield
    for known in (choose, fault):
        known.cache_clear()


def test_the_order_is_known_for_every_card(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, dtype, first in (
        ((9, 0), torch.bfloat16, "channels-last"),
        ((8, 0), torch.float16, "channels-last"),
        ((9, 0), torch.float32, "contiguous"),
        ((7, 5), torch.float16, "contiguous"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert order(CARD, dtype)[0] == first
        assert order(CARD, dtype)[-1] == "contiguous"
    assert order(CPU, torch.bfloat16) == ("contiguous",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layouts_are_right_and_a_wrong_one_is_dropped(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert fault(name, CPU, dtype) is None
    monkeypatch.setattr(decoder_layout, "order", lambda *_: ("channels-last", "contiguous"))
    with caplog.at_level(logging.INFO, logger=decoder_layout.__name__):
        assert choose(CPU, dtype) == "channels-last"
    assert "lie channels-last on cpu" in caplog.text
    assert describe(CPU, dtype) == "video decoder on cpu: channels-last, checked against fp64"
    real = torch.nn.functional.conv3d

    def wrong(x: torch.Tensor, weight: torch.Tensor, **settings: object) -> torch.Tensor:
        spoilt = not x.is_contiguous()
        return real(x, weight, **settings) * (1.1 if spoilt else 1.0)

    choose.cache_clear()
    fault.cache_clear()
    monkeypatch.setattr(decoder_layout, "conv3d", wrong)
    assert choose(CPU, dtype) == "contiguous"
    assert "do not lie channels-last on cpu: it is" in caplog.text
    assert "not channels-last (it is" in describe(CPU, dtype)


@pytest.mark.parametrize("name", ["auto", *LAYOUTS])
def test_a_named_layout_gives_the_same_pictures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latent = tiny_video_vae(), torch.randn(1, 8, 3, 2, 3)
    patch(vae)
    (plain,) = decode_video(vae, latent)
    monkeypatch.setenv(VARIABLE, name)
    (pictures,) = decode_video(vae, latent)
    torch.testing.assert_close(pictures, plain, rtol=0, atol=2e-5)
    weight = vae.decoder.conv_in.conv.weight
    assert weight.is_contiguous(memory_format=LAYOUTS["channels-last" if name == "channels-last" else "contiguous"])
    assert lay_out(vae.decoder) == ("contiguous" if name == "auto" else name)


def test_a_wrong_name_is_answered_with_the_legal_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "nhwc")
    with pytest.raises(ValueError, match=f"{VARIABLE} must be one of auto, contiguous, channels-last, got 'nhwc'"):
        decode_video(tiny_video_vae(), torch.zeros(1, 8, 1, 1, 1))


def test_verify_says_how_the_decoder_lies_on_each_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify._decoder_layouts() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(decoder_layout, "describe", lambda device: f"{device}: right")
    assert verify._decoder_layouts() == ["cuda:0: right", "cuda:1: right"]
