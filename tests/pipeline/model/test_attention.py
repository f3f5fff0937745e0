"""Attention of the block: no mask anywhere, values in its place where it is left out."""

from typing import Any

import pytest
import torch

import ltxkern
from ltxkern.pipeline.model.attention import attend
from ltxkern.pipeline.model.transformer import LTX2Transformer, predict_velocity
from tests.pipeline.model.demo_inputs import close, differ, inputs


def test_no_attention_has_a_mask(model: LTX2Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    predict_velocity(model, **inputs())  # the kernel's check at its first use is no call of the model
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    predict_velocity(model, **inputs())
    assert calls == [None] * 6 * len(model.transformer_blocks)


@torch.no_grad()
def test_values_stand_in_where_the_attention_is_left_out(model: LTX2Transformer) -> None:
    attention = model.transformer_blocks[0].attn1
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    whole, none = attend(attention, x), attend(attention, x, keep=(False,))
    some = attend(attention, x, keep=(True, False))
    values = attention.to_v(x).unflatten(2, (attention.heads, -1))
    gated = ltxkern.reference.head_gate(values, attention.to_gate_logits(x)).flatten(2)
    close([none, some[0], some[1]], [attention.to_out[0](gated), whole[0], none[1]])
    assert differ(whole[0], none[0])
