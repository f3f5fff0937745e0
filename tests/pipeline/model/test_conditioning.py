"""Image conditioning: parsing, reading pictures, validation, and what lands in the latent state."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Video
from PIL import Image, ImageCms

from ltxkern.pipeline.model.conditioning import (
    ImageCondition,
    apply_image_conditions,
    encode_conditions,
    encode_image,
    load_image,
    parse_image_condition,
    recompress,
    resize_to_cover,
    validate_image_conditions,
)
from ltxkern.pipeline.sampling.latents import AudioLatentShape, LatentState, VideoLatentShape, patchify
from tests.pipeline.model.tiny_vae import tiny_video_vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLLTX2Video:
    return tiny_video_vae()


def picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack((x * 255 // width, y * 255 // height, (x + y) % 256), axis=-1).astype(np.uint8)


def save(path: Path, image: np.ndarray, **kwargs: object) -> Path:
    Image.fromarray(image).save(path, **kwargs)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png", ImageCondition("a.png")),
        ("a.png:16", ImageCondition("a.png", 16)),
        ("a.png:16:0.8", ImageCondition("a.png", 16, 0.8)),
        ("a.png:0:1", ImageCondition("a.png", 0, 1.0)),
        ("a.png:0:-0.5", ImageCondition("a.png", 0, -0.5)),
        ("a.png:-1", ImageCondition("a.png", -1)),
        ("C:\\pictures\\a.png", ImageCondition("C:\\pictures\\a.png")),
        ("C:\\pictures\\a.png:8", ImageCondition("C:\\pictures\\a.png", 8)),
        ("with:colon.png:8:0.5", ImageCondition("with:colon.png", 8, 0.5)),
        ("take:3:b.png", ImageCondition("take:3:b.png")),
    ],
)
def test_parse(text: str, expected: ImageCondition) -> None:
    assert parse_image_condition(text) == expected


def test_parse_prefers_a_file_of_that_name(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", picture(4, 4)).rename(tmp_path / "a.png:8")
    assert parse_image_condition(str(path)) == ImageCondition(str(path))
    assert parse_image_condition(f"{path}:3").frame == 3


def test_parse_refuses_a_strength_without_frame() -> None:
    with pytest.raises(ValueError, match="PATH:FRAME:STRENGTH"):
        parse_image_condition("a.png:0.5")
    with pytest.raises(ValueError, match="no path"):
        parse_image_condition("")
    with pytest.raises(ValueError, match="no path"):
        parse_image_condition(":3")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frame": 9}, r"frame 9 is outside 0\.\.8"),
        ({"frame": -1}, "frame -1 is outside"),
        ({"strength": -0.1}, "strength -0.1 is outside 0..1"),
        ({"strength": 1.5}, "strength 1.5 is outside"),
        ({"strength": math.nan}, "strength nan is outside"),
        ({"crf": 52}, "crf 52 is outside"),
        ({"path": "/nowhere/x.png"}, "does not exist"),
        ({"path": "/"}, "is not a file"),
    ],
)
def test_validation(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    path = save(tmp_path / "a.png", picture(4, 4))
    validate_image_conditions([ImageCondition(path, 8, 0.0)], 9)
    with pytest.raises(ValueError, match=words) as caught:
        validate_image_conditions([ImageCondition(**{"path": path, **changes})], 9)
    assert "\n" not in str(caught.value)
    if "path" not in changes:
        with pytest.raises(ValueError, match=words):
            validate_image_conditions([ImageCondition("", **changes)], 9, check_files=False)


def test_validation_names_what_is_no_picture(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    with pytest.raises(ValueError, match="not a picture"):
        validate_image_conditions([ImageCondition(text)], 9)
    whole = save(tmp_path / "a.png", picture(64, 64)).read_bytes()
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.png' cannot be read"):
        validate_image_conditions([ImageCondition(cut)], 9)


def test_load_maps_to_minus_one_to_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", picture(64, 96))
    pixels = load_image(path, 64, 96, crf=0)
    assert pixels.shape == (1, 3, 1, 64, 96)
    expected = torch.from_numpy(picture(64, 96)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(pixels[0, :, 0], expected)
    assert torch.equal(load_image(path, 64, 96, crf=0, dtype=torch.bfloat16), pixels.bfloat16())


def test_load_turns_by_exif_and_drops_alpha(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    turned = save(tmp_path / "turned.png", picture(32, 64), exif=exif)
    upright = save(tmp_path / "upright.png", np.rot90(picture(32, 64), k=-1))
    assert torch.equal(load_image(turned, 64, 32, crf=0), load_image(upright, 64, 32, crf=0))
    alpha = np.concatenate((picture(32, 64), np.zeros((32, 64, 1), np.uint8)), axis=2)
    opaque = save(tmp_path / "opaque.png", picture(32, 64))
    transparent = save(tmp_path / "alpha.png", alpha)
    assert torch.equal(load_image(transparent, 32, 64, crf=0), load_image(opaque, 32, 64, crf=0))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "I;16", "RGBA"])
def test_load_takes_every_mode(tmp_path: Path, mode: str) -> None:
    grey = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(32, 0)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    pixels = load_image(path, 32, 64, crf=0)
    if mode != "1":
        torch.testing.assert_close(
            pixels[0, 1, 0], torch.from_numpy(grey).float() / 127.5 - 1, rtol=0, atol=2.1 / 127.5
        )


def test_load_converts_profiles_to_srgb(tmp_path: Path) -> None:
    plain = load_image(save(tmp_path / "plain.png", picture(32, 64)), 32, 64, crf=0)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = load_image(save(tmp_path / "srgb.png", picture(32, 64), icc_profile=srgb), 32, 64, crf=0)
    assert (same - plain).abs().max() <= 1.1 / 127.5
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    broken = save(tmp_path / "broken.png", picture(32, 64), icc_profile=lab)
    assert torch.equal(load_image(broken, 32, 64, crf=0), plain)


def test_a_linear_profile_brightens_mid_tones(tmp_path: Path) -> None:
    """An image that says its values are linear light must come out brighter, not with its numbers unchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag in (b"rTRC", b"gTRC", b"bTRC"):
        entry = profile.index(tag)
        offset = int.from_bytes(profile[entry + 4 : entry + 8], "big")
        profile[offset : offset + 12] = b"curv" + bytes(4) + bytes(4)  # an empty curve is the identity
        profile[entry + 8 : entry + 12] = (12).to_bytes(4, "big")
    grey = np.full((32, 32, 3), 64, np.uint8)
    linear = load_image(save(tmp_path / "linear.png", grey, icc_profile=bytes(profile)), 32, 32, crf=0)
    assert 120 < (linear.mean() + 1) * 127.5 < 155


def test_recompress_loses_detail_and_repeats() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (34, 51, 3), dtype=np.uint8)
    result = recompress(noise, 33)
    assert result.shape == (34, 50, 3)
    assert 5 < np.abs(result.astype(int) - noise[:, :50]).mean() < 80
    assert np.array_equal(result, recompress(noise, 33))
    better = np.abs(recompress(noise, 10).astype(int) - noise[:, :50]).mean()
    assert better < np.abs(result.astype(int) - noise[:, :50]).mean()
    assert recompress(noise, 0) is noise
    assert recompress(noise[:1], 33).shape == (1, 51, 3)


def test_recompress_keeps_colours() -> None:
    flat = np.full((32, 32, 3), (200, 80, 40), np.uint8)
    assert np.abs(recompress(flat, 33).astype(int) - flat).max() <= 4


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (96, 64), (32, 160)])
@pytest.mark.parametrize("source", [(64, 64), (49, 77), (1, 1), (333, 30)])
def test_resize_covers_and_centres(height: int, width: int, source: tuple[int, int]) -> None:
    ramps = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in source), indexing="ij")
    result = resize_to_cover(torch.stack((*ramps, ramps[0])).unsqueeze(0), height, width)
    assert result.shape == (1, 3, height, width)
    scale = max(height / source[0], width / source[1])
    for axis, (side, target) in enumerate(zip(source, (height, width), strict=True)):
        size = math.ceil(side * scale)
        index = torch.arange(target) + (size - target) // 2
        expected = ((index + 0.5) * side / size - 0.5).clamp(0, side - 1)
        line = result[0, axis].movedim(axis, 0)[:, 0]
        torch.testing.assert_close(line, expected, rtol=1e-4, atol=1e-3)


def test_encode_image_is_the_normalised_mean(vae: AutoencoderKLLTX2Video) -> None:
    pixels = torch.rand(1, 3, 1, 64, 96) * 2 - 1
    latent = encode_image(vae, pixels)
    assert latent.shape == (1, 8, 1, 2, 3)
    mean = vae.encoder(pixels)[:, :8]
    expected = (mean - vae.latents_mean.view(1, -1, 1, 1, 1)) / vae.latents_std.view(1, -1, 1, 1, 1)
    torch.testing.assert_close(latent, expected)
    assert not latent.requires_grad


def test_conditions_land_in_the_state(tmp_path: Path, vae: AutoencoderKLLTX2Video) -> None:
    path = save(tmp_path / "a.png", picture(50, 70))
    conditions = [ImageCondition(path, 0, 0.75), ImageCondition(path, 16, 1.0), ImageCondition(path, 5, 0.5, crf=0)]
    latents = encode_conditions(vae, conditions, 64, 96)
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])
    before = LatentState.create(VideoLatentShape(3, 2, 3, 8), dtype=torch.float32)
    state = apply_image_conditions(before, conditions, latents, fps=24.0)
    assert state.latent.shape == (1, 18 + 12, 8)
    assert not state.latent.any()
    assert torch.equal(state.clean[:, :6], patchify(latents[0]))
    assert torch.equal(state.clean[:, 18:24], patchify(latents[1]))
    assert torch.equal(state.clean[:, 24:], patchify(latents[2]))
    assert state.mask[0, :, 0].tolist() == [0.25] * 6 + [1.0] * 12 + [0.0] * 6 + [0.5] * 6
    assert torch.equal(state.positions[0, 0, 24], torch.tensor([5.0, 6.0]) / 24.0)
    assert bool((before.mask == 1).all())
    noised = state.noise(generator=torch.Generator().manual_seed(0))
    assert torch.equal(noised.latent[:, 18:24], state.clean[:, 18:24])
    assert noised.clear_conditioning().latent.shape == (1, 18, 8)
    assert noised.clear_conditioning().levels == before.levels == (1.0,)


@pytest.mark.parametrize("strengths", [(0.3, 0.1), (0.9, 0.9), (1.0, 0.0), (1 / 3, 1e-9)])
def test_the_levels_are_the_values_of_the_mask(strengths: tuple[float, float]) -> None:
    conditions = [ImageCondition("a", frame, strength) for frame, strength in zip((0, 16), strengths, strict=True)]
    state = LatentState.create(VideoLatentShape(3, 2, 3, 8))
    state = apply_image_conditions(state, conditions, [torch.zeros(1, 8, 1, 2, 3)] * 2, fps=24.0)
    assert state.levels is not None
    assert len(set(state.levels)) == len(state.levels)
    assert set(state.mask.flatten().tolist()) == set(state.levels)
    own = state.append(*(part[:, :1] for part in (state.latent, state.clean, state.mask)), state.positions[:, :, :1])
    assert own.levels is None


def test_conditions_that_do_not_fit(vae: AutoencoderKLLTX2Video) -> None:
    state = LatentState.create(VideoLatentShape(3, 2, 3, 8))
    with pytest.raises(ValueError, match="one per condition"):
        apply_image_conditions(state, [ImageCondition("a")], [], fps=24.0)
    with pytest.raises(ValueError, match="image latent must be"):
        apply_image_conditions(state, [ImageCondition("a")], [torch.zeros(1, 8, 1, 3, 2)], fps=24.0)
    with pytest.raises(ValueError, match="must be a video state"):
        apply_image_conditions(LatentState.create(AudioLatentShape(3)), [], [], fps=24.0)


def test_picture_from_memory_needs_no_suffix(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(32, 32)).save(buffer, format="JPEG")
    path = tmp_path / "picture"
    path.write_bytes(buffer.getvalue())
    assert load_image(path, 32, 32).shape == (1, 3, 1, 32, 32)
