"""Attention of the block: no mask anywhere, values in its place where it is left out."""

from typing import Any

import pytest
import torch

from ltxkern.pipeline.model.transformer import (
    LTX2Transformer,
    predict_velocity,
)
from tests.pipeline.model.demo_inputs import inputs


def test_no_attention_has_a_mask(model: LTX2Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    predict_velocity(model, **inputs())
    assert calls == [None] * 6 * len(model.transformer_blocks)
