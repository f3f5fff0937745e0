"""Latent shapes, packing, positions and the state of a stage."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltxkern.ops.res2s import post_process
from ltxkern.pipeline.sampling.latents import (
    AudioLatentShape,
    LatentState,
    VideoLatentShape,
    audio_positions,
    keyframe_coordinates,
    patchify,
    timesteps_from_mask,
    to_denoised,
    to_velocity,
    unpatchify,
    video_positions,
)


def test_reference_shapes() -> None:
    video = VideoLatentShape.from_pixels(121, 1088, 1920)
    assert video.dims() == (1, 128, 16, 34, 60)
    assert video.tokens == 32640
    assert VideoLatentShape.from_pixels(121, 544, 960).tokens == 8160
    assert AudioLatentShape.from_pixels(121, 24.0).dims() == (1, 8, 126, 16)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((120, 64, 64), "num_frames 120 is not 8k\\+1: use 113 or 121"),
        ((0, 64, 64), "num_frames 0 is not 8k\\+1: use 1"),
        ((-7, 64, 64), "num_frames -7 is not 8k\\+1: use 1"),
        ((9, 1080, 64), "height 1080 is not a multiple of 32: use 1088 or 1056"),
        ((9, 64, 31), "width 31 is not a multiple of 32: use 32"),
        ((9, 64, 0), "width 0 is not a multiple of 32: use 32"),
    ],
)
def test_illegal_sizes_name_the_nearest_legal_value(args: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VideoLatentShape.from_pixels(*args)


def test_audio_shape_needs_a_frame_rate() -> None:
    for fps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="fps"):
            AudioLatentShape.from_pixels(9, fps)


sizes = st.integers(1, 5)


@settings(deadline=None, max_examples=30)
@given(sizes, sizes, sizes, sizes, sizes)
def test_packing_is_a_round_trip(batch: int, channels: int, frames: int, height: int, width: int) -> None:
    video = torch.randn(batch, channels, frames, height, width)
    tokens = patchify(video)
    f, h, w = frames - 1, height // 2, width - 1
    assert torch.equal(tokens[:, (f * height + h) * width + w], video[:, :, f, h, w])
    assert torch.equal(unpatchify(tokens, VideoLatentShape(frames, height, width, channels, batch)), video)
    audio = video[:, :, :, :, 0]
    tokens = patchify(audio)
    assert torch.equal(tokens[:, f, (channels - 1) * height + h], audio[:, channels - 1, f, h])
    assert torch.equal(unpatchify(tokens, AudioLatentShape(frames, channels, height, batch)), audio)


def test_packing_takes_non_contiguous_latents() -> None:
    latent = torch.randn(1, 3, 4, 5, 2).transpose(2, 4)
    assert torch.equal(patchify(latent), patchify(latent.contiguous()))


def test_packing_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="latent must be"):
        patchify(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="tokens must be"):
        unpatchify(torch.zeros(1, 7, 4), VideoLatentShape(1, 2, 3, 4))
    with pytest.raises(ValueError, match="tokens must be"):
        unpatchify(torch.zeros(1, 6, 5), VideoLatentShape(1, 2, 3, 4))


def test_positions_follow_the_formula() -> None:
    shape = VideoLatentShape(3, 2, 5, 4, batch=2)
    positions = video_positions(shape, 24.0)
    assert positions.shape == (2, 3, 30, 2)
    assert positions.dtype == torch.float32
    for f in range(3):
        for y in range(2):
            for x in range(5):
                token = positions[1, :, (f * 2 + y) * 5 + x]
                time = torch.tensor([max(8 * f - 7, 0), 8 * f + 1], dtype=torch.float32) / 24.0
                assert torch.equal(token[0], time)
                assert token[1:].tolist() == [[32 * y, 32 * y + 32], [32 * x, 32 * x + 32]]


def test_audio_positions_follow_the_formula() -> None:
    positions = audio_positions(AudioLatentShape(4, batch=2))
    assert positions.shape == (2, 1, 4, 2)
    expected = torch.tensor([[0.0, 0.01], [0.01, 0.05], [0.05, 0.09], [0.09, 0.13]])
    torch.testing.assert_close(positions[1, 0], expected, rtol=1e-6, atol=0)


def test_keyframe_coordinates_stand_at_one_frame() -> None:
    positions = keyframe_coordinates(VideoLatentShape(3, 2, 2, 4), 7, 25.0).positions(1)
    assert positions.shape == (1, 3, 4, 2)
    assert torch.equal(positions[0, 0], torch.tensor([7.0, 8.0]).div(25.0).expand(4, 2))
    assert positions[0, 1, 3].tolist() == [32, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pure_noise_is_the_draw_itself(dtype: torch.dtype) -> None:
    shape = VideoLatentShape(2, 3, 5, 7)
    state = LatentState.create(shape, dtype=dtype).noise(generator=torch.Generator().manual_seed(3))
    drawn = torch.randn(1, 30, 7, dtype=dtype, generator=torch.Generator().manual_seed(3))
    assert state.latent.dtype == dtype
    assert torch.equal(state.latent, drawn)


def test_noise_keeps_masked_tokens_clean() -> None:
    shape = AudioLatentShape(5, 2, 3)
    latent = torch.randn(shape.dims())
    state = LatentState.create(shape, latent=latent, dtype=torch.float32)
    state.mask[:, :2] = 0
    state.mask[:, 2] = 0.25
    noise = torch.randn(1, 5, 6)
    noised = state.noise(0.5, noise=noise).latent
    assert torch.equal(noised[:, :2], patchify(latent)[:, :2])
    mixed = 0.5 * patchify(latent) + 0.5 * noise
    torch.testing.assert_close(noised[:, 3:], mixed[:, 3:])
    torch.testing.assert_close(noised[:, 2], 0.75 * patchify(latent)[:, 2] + 0.25 * mixed[:, 2])


def test_noise_leaves_the_state_as_it_was() -> None:
    state = LatentState.create(AudioLatentShape(3, 2, 2), dtype=torch.float32)
    state.noise(generator=torch.Generator().manual_seed(0))
    assert not state.latent.any()
    with pytest.raises(ValueError, match="noise must have shape"):
        state.noise(noise=torch.zeros(1, 3, 5))


def test_create_takes_only_latents_of_its_shape() -> None:
    with pytest.raises(ValueError, match="latent must have shape"):
        LatentState.create(AudioLatentShape(3, 2, 2), latent=torch.zeros(1, 2, 2, 3))
    latent = torch.randn(1, 2, 3, 2)
    state = LatentState.create(AudioLatentShape(3, 2, 2), latent=latent)
    assert state.latent.dtype == torch.bfloat16
    assert torch.equal(state.unpack(), latent.bfloat16())
    assert state.clean.data_ptr() != state.latent.data_ptr()


def test_clear_conditioning_drops_appended_tokens() -> None:
    shape = VideoLatentShape(1, 2, 2, 3)
    state = LatentState.create(shape, dtype=torch.float32)
    extra = torch.ones(1, 4, 3)
    longer = state.append(extra, extra, torch.zeros(1, 4, 1), keyframe_coordinates(shape, 3, 24.0))
    assert longer.latent.shape == (1, 8, 3)
    assert longer.positions.shape == (1, 3, 8, 2)
    cleared = longer.clear_conditioning()
    assert torch.equal(cleared.latent, state.latent)
    assert torch.equal(cleared.positions, state.positions)
    assert bool((cleared.mask == 1).all())
    assert torch.equal(longer.unpack(), state.unpack())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_post_process(dtype: torch.dtype) -> None:
    x0, clean = torch.randn(2, 5, 3, dtype=dtype), torch.randn(2, 5, 3, dtype=torch.bfloat16)
    mask = torch.ones(2, 5, 1)
    assert torch.equal(post_process(x0, mask, clean), x0)
    assert torch.equal(post_process(x0, None, None), x0)
    assert torch.equal(post_process(x0, mask * 0, clean), clean.to(dtype))
    assert post_process(x0, mask * 0.5, clean).dtype == dtype


def test_velocity_and_denoised_undo_each_other() -> None:
    latent, x0 = torch.randn(1, 5, 3), torch.randn(1, 5, 3)
    torch.testing.assert_close(to_denoised(latent, to_velocity(latent, x0, 0.7), 0.7), x0)
    steps = timesteps_from_mask(torch.tensor([0.0, 1, 1, 1, 0.5]).view(1, 5, 1), 0.7)
    assert torch.equal(to_denoised(latent, x0, steps)[:, 0], latent[:, 0])
    with pytest.raises(ValueError, match="sigma must not be 0"):
        to_velocity(latent, x0, 0.0)
