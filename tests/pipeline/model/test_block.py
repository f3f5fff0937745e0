"""One block: modulations by row index, compiled alone."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.model.transformer import LTX2Transformer, predict_velocity, predict_velocity_batched
from tests.pipeline.model.demo_inputs import FLAGS, VIDEO_TOKENS, close, inputs, with_mask


class Modulations(TorchDispatchMode):
    """Tables of modulation rows in a forward: how often they are written out token by token, and read by a row index instead."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.gathered, self.indexed = shape, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith(("aten.index", "aten.embedding", "aten.gather")) and result.shape[-3:] == self.shape:
            self.gathered += 1
        if name.startswith("ltxkern.") and any(value.dtype == torch.int64 for value in args if torch.is_tensor(value)):
            self.indexed += 1
        return result


@pytest.mark.parametrize("levels", [(1.0, 0.0, 0.25), None])
def test_no_modulation_is_written_out_token_by_token(model: LTX2Transformer, levels: tuple[float, ...] | None) -> None:
    """With known levels the blocks hand the row index on; only the output layer, which is no RMS norm, looks its rows up."""
    pair = inputs()
    pair["video"] = dataclasses.replace(with_mask(pair["video"]), levels=levels)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    with Modulations((1, VIDEO_TOKENS, width)) as seen:
        predict_velocity(model, **pair)
    # Each residual with the norms behind it: text, between the modalities, feed-forward, next block.
    assert seen.indexed == (1 + 4 * len(model.transformer_blocks) if levels else 0)
    assert seen.gathered == (1 if levels else 0)


def test_blocks_compile_alone_and_mixed_batches_too() -> None:
    transformer = build_demo().transformer
    assert transformer is not None
    branches = [inputs(seed) | flags for seed, flags in enumerate(FLAGS)]
    expected = predict_velocity_batched(transformer, branches)
    torch.compiler.reset()
    for block in transformer.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for outputs, plain in zip(predict_velocity_batched(transformer, branches), expected, strict=True):
        close(outputs, plain)
