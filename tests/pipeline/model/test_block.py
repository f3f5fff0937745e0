"""One block: modulations by row index, compiled alone."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode

from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.memory.streams import side_by_side
from ltxkern.pipeline.model import transformer
from ltxkern.pipeline.model.fusions import use_side_by_side
from ltxkern.pipeline.model.inputs import ModalityInput
from ltxkern.pipeline.model.transformer import LTX2Transformer, predict_velocity, predict_velocity_batched
from tests.pipeline.memory.stream_races import RaceClock
from tests.pipeline.model.demo_inputs import FLAGS, VIDEO_TOKENS, close, inputs, of_diffusers, with_mask


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


@pytest.mark.parametrize("most", [1, 4])
def test_blocks_that_are_elsewhere_make_their_own_modulations(
    model: LTX2Transformer, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """As where weights visit the device block by block, or every token has a timestep: the same bits, a norm more a block."""
    pair = inputs(batch=2)
    pair["video"] = dataclasses.replace(with_mask(pair["video"]), levels=(1.0, 0.0, 0.25))
    branches = [pair | flags for flags in FLAGS]
    expected = predict_velocity_batched(model, branches, most=most)
    asked: list[int] = []
    monkeypatch.setattr(transformer, "sums_at_once", lambda blocks, stream: bool(asked.append(len(blocks))))
    for outputs, plain in zip(predict_velocity_batched(model, branches, most=most), expected, strict=True):
        assert all(map(torch.equal, outputs, plain))
    assert set(asked) == {len(model.transformer_blocks)}


class Deaf(RaceClock):
    """Does not hear that the video's stream should wait."""

    def wait(self, event: Any) -> None:
        if self.stream == "side":
            super().wait(event)


@pytest.mark.parametrize("most", [1, 4])
def test_sound_runs_beside_video_with_the_same_bits_and_no_race(model: LTX2Transformer, most: int) -> None:
    pair = inputs()
    pair["video"] = dataclasses.replace(with_mask(pair["video"]), levels=(1.0, 0.0, 0.25))
    branches = [pair | flags for flags in FLAGS]
    expected = predict_velocity_batched(model, branches, most=most)
    for clock in (RaceClock(), Deaf()):
        with clock, use_side_by_side(functools.partial(side_by_side, clock)):
            found = predict_velocity_batched(model, branches, most=most)
        assert bool(clock.races) == isinstance(clock, Deaf), clock.races[:3]
        assert clock.time["side"]["side"] > 20 * len(model.transformer_blocks) * -(-len(FLAGS) // most)
        assert all(map(torch.equal, (x for one in found for x in one), (x for one in expected for x in one)))


@torch.no_grad()
def test_a_block_in_bf16_is_as_close_to_fp64_as_that_of_diffusers() -> None:
    """Within 1.1 times; the block at production width is 0.90 (video) and 0.97 (sound) of diffusers' error."""
    config = build_demo(dtype=torch.bfloat16).transformer.config
    width = {"attention_head_dim": 64, "cross_attention_dim": 256, "audio_attention_head_dim": 32, "num_layers": 1}
    config = {k: v for k, v in config.items() if not k.startswith("_")} | width | {"audio_cross_attention_dim": 128}
    model = LTX2Transformer(**config).eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.normal_(0, 0.06, generator=torch.Generator().manual_seed(index))
    model.bfloat16()
    stock = LTX2VideoTransformer3DModel(**config)
    stock.load_state_dict(model.state_dict())
    draws = torch.Generator().manual_seed(0)

    def item(axes: int, tokens: int, channels: int, text: int) -> ModalityInput:
        latent, context = (
            torch.randn(1, *shape, generator=draws).bfloat16() for shape in ((tokens, channels), (24, text))
        )
        places = torch.rand(1, axes, tokens, 2, generator=draws) * 10
        return ModalityInput(latent, 0.5, None, places, context)

    pair = {"video": item(3, 64, config["in_channels"], 256), "audio": item(1, 24, config["audio_in_channels"], 128)}
    outputs: list[Any] = []
    model.transformer_blocks[0].register_forward_hook(lambda _, given, out: outputs.append([r.x for r in out[0]]))
    stock.transformer_blocks[0].register_forward_hook(lambda _, given, out: outputs.append(out))
    predict_velocity(model, **pair)
    for dtype in (torch.bfloat16, torch.float64):
        wide = {
            name: dataclasses.replace(i, latent=i.latent.to(dtype), context=i.context.to(dtype))
            for name, i in pair.items()
        }
        of_diffusers(stock.to(dtype), wide)
    ours, theirs, exact = outputs
    for mine, their, true in zip(ours, theirs, exact, strict=True):
        assert (mine - true).norm() <= 1.1 * (their - true).norm()
