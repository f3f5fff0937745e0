"""Values of a request: what is refused, in which words, and what is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ltxkern.pipeline.run import checks

REFUSED: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("require_side", ("height", 1080, 64), ValueError, "height 1080 is not a multiple of 64: use 1088 or 1024"),
    ("require_side", ("width", 20, 64), ValueError, "width 20 is not a positive multiple of 64: use 64"),
    ("require_side", ("width", 64.0, 64), TypeError, "width must be a whole number, got 64.0"),
    ("require_positive", ("frame_rate", True), TypeError, "frame_rate must be a number, got True"),
    ("require_positive", ("frame_rate", float("nan")), ValueError, "frame_rate must be a positive number, got nan"),
    ("require_schedule", ("stage1_sigmas", [0.5, 0.5]), ValueError, "stage1_sigmas must be at least two strictly falling"),
    ("require_schedule", ("stage1_sigmas", [1.5, 0.0]), ValueError, "stage1_sigmas must be at least two strictly falling"),
    ("require_texts", ([], [""]), ValueError, "prompt must hold at least one text"),
    ("require_texts", (["a", "b"], [""]), ValueError, "negative_prompt must be one text, or one per prompt: 2 prompts, 1 given"),
    ("require_strength", ("lora x", -1.0), ValueError, "lora x: the strength must be a finite number of at least 0, got -1.0"),
    ("find_device", ("tpu9",), ValueError, "device must be one of cpu"),
    ("find_device", ("cuda:99",), ValueError, "device 'cuda:99' is not there: use one of cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "error", "sentence"), REFUSED)
def test_what_is_refused(name: str, given: tuple[Any, ...], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as raised:
        getattr(checks, name)(*given)
    assert str(raised.value).startswith(sentence)


def test_what_is_taken() -> None:
    checks.require_side("height", 1088, 64)
    checks.require_schedule("stage1_sigmas", [1.0, 0.5, 0.0])
    checks.require_strength("lora x", -1.5, signed=True)
    assert checks.find_device("cpu") == torch.device("cpu")
