"""Image conditioning: parsing, validation, and what lands in the latent state."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video

from ltxkern.pipeline.model.conditioning import (
    ImageCondition,
    apply_image_conditions,
    encode_conditions,
    encode_image,
    parse_image_condition,
    validate_image_conditions,
)
from ltxkern.pipeline.sampling.latents import AudioLatentShape, LatentState, VideoLatentShape, patchify
from tests.pipeline.model.picture_files import picture, save
from tests.pipeline.model.tiny_vae import tiny_video_vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLLTX2Video:
    return tiny_video_vae()


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
        ("C:\\pictures\\a.png:8:0.5", ImageCondition("C:\\pictures\\a.png", 8, 0.5)),
        ("take:3:b.png:8", ImageCondition("take:3:b.png", 8)),
        ("~nobody-of-this-name/a.png:8", ImageCondition("~nobody-of-this-name/a.png", 8)),
    ],
)
def test_parse(text: str, expected: ImageCondition) -> None:
    assert parse_image_condition(text) == expected


def test_parse_prefers_a_file_of_that_name(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", picture(4, 4)).rename(tmp_path / "a.png:8")
    assert parse_image_condition(str(path)) == ImageCondition(str(path))
    assert parse_image_condition(f"{path}:3").frame == 3


def test_parse_knows_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("~/a.png", "~/a.png:8", "~/a.png:8:0.5"):
        assert parse_image_condition(text).path == f"{tmp_path}/a.png"
    save(tmp_path / "a.png", picture(4, 4))
    (tmp_path / "link.png").symlink_to("a.png")
    (tmp_path / "away.png").symlink_to("nowhere.png")
    validate_image_conditions([ImageCondition("~/a.png"), ImageCondition(tmp_path / "link.png")], 9)
    with pytest.raises(ValueError, match=r"away\.png' is a link to nothing"):
        validate_image_conditions([ImageCondition("~/away.png")], 9)


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
        ({"path": "/dev/zero"}, "is not a file"),
        ({"path": "x" * 300}, "does not exist"),
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
