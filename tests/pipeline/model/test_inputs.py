"""What a forward takes: timesteps rounded once, and shapes that do not fit."""

import dataclasses

import pytest
import torch

from ltxkern.pipeline.model.inputs import device_tensors
from ltxkern.pipeline.model.transformer import LTX2Transformer, predict_velocity, predict_velocity_batched, predict_x0
from tests.pipeline.model.demo_inputs import inputs, with_mask


def test_levels_are_checked(model: LTX2Transformer) -> None:
    pair = inputs()
    video, audio = pair["video"], pair["audio"]
    for item in (dataclasses.replace(video, levels=(1.0,)), dataclasses.replace(with_mask(video), levels=())):
        with pytest.raises(ValueError, match=r"video.levels: expected the distinct values of a mask, or None"):
            predict_velocity(model, item, audio)
    masked = [dataclasses.replace(with_mask(video), levels=levels) for levels in ((1.0, 0.0, 0.25), None)]
    with pytest.raises(ValueError, match=r"video.levels: expected the same in every branch"):
        predict_velocity_batched(model, [{"video": item, "audio": audio} for item in masked])


def test_timesteps_are_rounded_once() -> None:
    """An fp32 sigma takes the official fp32 order; a fp64 one (the substep) is rounded after the product."""
    item = inputs()["video"]
    fp32 = torch.tensor(0.9934906959533691).item()
    fp64 = (fp32 * 0.9860149025917053) ** 0.5
    for sigma in (fp32, fp64, 0.0011, 1.0, 0.0):
        tensors = device_tensors(dataclasses.replace(with_mask(item), sigma=sigma), 1000)
        single = torch.tensor(sigma).item() == sigma
        wide = torch.tensor(sigma, dtype=torch.float32 if single else torch.float64)
        mask = with_mask(item).mask
        assert mask is not None
        expected = (mask.to(wide.dtype) * wide * 1000).float().squeeze(-1)
        assert torch.equal(tensors.timestep, expected)
        assert torch.equal(tensors.sigma, (wide * 1000).float().reshape(1))


def test_wrong_arguments(model: LTX2Transformer) -> None:
    pair = inputs()
    video, audio = pair["video"], pair["audio"]
    replace = dataclasses.replace
    with pytest.raises(ValueError, match="both None"):
        predict_velocity(model, None, None)
    with pytest.raises(ValueError, match=r"video.latent: expected \(B, T, 16\)"):
        predict_velocity(model, replace(video, latent=video.latent[..., :8]), audio)
    with pytest.raises(ValueError, match=r"audio.positions: expected \(1, 1, 5, 2\), got \(1, 1, 4, 2\)"):
        predict_velocity(model, video, replace(audio, positions=audio.positions[:, :, 1:]))
    with pytest.raises(ValueError, match=r"video.mask: expected \(1, 7, 1\), got \(1, 7\)"):
        predict_velocity(model, replace(video, mask=torch.ones(1, 7)), audio)
    with pytest.raises(ValueError, match=r"audio.context: expected \(1, L, D\)"):
        predict_velocity(model, video, replace(audio, context=audio.context[0]))
    with pytest.raises(ValueError, match=r"skip_video_self_attn_blocks: expected block indices 0 to 1, got \[28\]"):
        predict_velocity(model, video, audio, skip_video_self_attn_blocks=[28])
    with pytest.raises(ValueError, match="audio: expected in every branch or in none"):
        predict_velocity_batched(model, [pair, {"video": video}])
    with pytest.raises(ValueError, match=r"video.mask: expected in every branch or in none"):
        predict_velocity_batched(model, [pair, {"video": with_mask(video), "audio": audio}])
    with pytest.raises(ValueError, match=r"video.latent: expected one shape"):
        predict_velocity_batched(model, [pair, inputs(batch=2)])
    with pytest.raises(TypeError, match="skip_self_attn"):
        predict_x0(model, video, audio, skip_self_attn=[1])


def test_a_part_holds_what_belongs_to_its_tokens() -> None:
    item = inputs(batch=2)["video"]
    own = slice(2, 5)
    for given, per_token in (
        (item, ()),
        (with_mask(item), ("timestep",)),
        (dataclasses.replace(with_mask(item), levels=(1.0, 0.0, 0.25)), ("rows",)),
    ):
        whole = device_tensors(given, 1000)
        part = whole.part(own)
        assert part.coordinates is None
        for field in dataclasses.fields(whole)[:-1]:
            value, expected = getattr(part, field.name), getattr(whole, field.name)
            if field.name == "positions":
                expected = expected[:, :, own]
            elif field.name in ("tokens", *per_token):
                expected = expected[:, own]
            same = (
                value is expected
                if field.name == "contexts"
                else value is expected is None or torch.equal(value, expected)
            )
            assert same, field.name
