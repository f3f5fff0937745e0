"""A kernel's first call within a CUDA graph capture: refused in words, before anything is compiled or launched."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ltxkern import triton as tier
from ltxkern.ops.gated_residual import HeadGateArguments

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from triton import runtime
from triton.runtime.jit import JITFunction

from tests.triton.aot_compile import NamedTarget

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is compiled and launched, by a compiler and a device that do neither."""
    seen: list[str] = []

    def compiled(self: Any, key: Any, signature: Any, device: Any, *_: Any) -> Any:
        seen.append(f"compiled {self.__name__}")
        made = SimpleNamespace(
            run=lambda *_: seen.append(f"launched {self.__name__}"),
            launch_metadata=lambda *_: None,
            function=None,
            packed_metadata=None,
        )
        self.device_caches[device][0][key] = made
        return made

    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(runtime.driver, "_active", NamedTarget(90))
    return seen


def test_a_first_call_within_a_capture_is_refused(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is compiled is captured; another dtype is another kernel."""
    from ltxkern.triton import gated_residual

    capturing, launch = True, tier.load("gated_residual", "launch_head_gate")
    for kernel in vars(gated_residual).values():
        if isinstance(kernel, JITFunction):
            monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def call(dtype: torch.dtype) -> None:
        out, x, logits = (
            torch.empty(shape, dtype=dtype, device="meta") for shape in ((64, 4, 32), (64, 4, 32), (64, 4))
        )
        launch(out, HeadGateArguments(x, logits))

    words = "is not compiled yet for such a call, and a CUDA graph capture is no time .*: make the same call once before the"
    with pytest.raises(RuntimeError, match=words):
        call(torch.bfloat16)
    assert not launched
    capturing = False
    call(torch.bfloat16)
    capturing = True
    call(torch.bfloat16)
    with pytest.raises(RuntimeError, match=rf"^ltxkern\.triton\.gated_residual\.\S+ {words}"):
        call(torch.float32)
    assert [each.split(" ")[0] for each in launched] == ["compiled", "launched", "launched"]


def test_a_triton_without_the_guarded_name_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(JITFunction, tier.COMPILE)
    tier._warn_of_captures.cache_clear()
    for entry in ("launch_head_gate", "launch"):
        tier.load("gated_residual", entry)
    tier._warn_of_captures.cache_clear()
    (message,) = caplog.messages
    assert "has no JITFunction._do_compile, so that a Triton kernel's first call within a CUDA graph capture" in message
    assert message.endswith("make every call once before it")
