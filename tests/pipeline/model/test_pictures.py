"""Reading pictures: every mode and depth people have, what is refused, compression, and covering a size."""

import io
import logging
import math
import random
import resource
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from ltxkern.pipeline.model import pictures
from ltxkern.pipeline.model.pictures import load_image, read_picture, recompress, resize_to_cover
from tests.pipeline.model.picture_files import picture, save, write_png16, write_tiff


def test_load_maps_to_minus_one_to_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", picture(64, 96))
    pixels = load_image(path, 64, 96, crf=0)
    assert pixels.shape == (1, 3, 1, 64, 96)
    expected = torch.from_numpy(picture(64, 96)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(pixels[0, :, 0], expected)
    assert torch.equal(load_image(path, 64, 96, crf=0, dtype=torch.bfloat16), pixels.bfloat16())


def test_load_turns_by_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    turned = save(tmp_path / "turned.png", picture(32, 64), exif=exif)
    upright = save(tmp_path / "upright.png", np.rot90(picture(32, 64), k=-1))
    assert torch.equal(load_image(turned, 64, 32, crf=0), load_image(upright, 64, 32, crf=0))


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


def test_picture_from_memory_needs_no_suffix(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(32, 32)).save(buffer, format="JPEG")
    path = tmp_path / "picture"
    path.write_bytes(buffer.getvalue())
    assert load_image(path, 32, 32).shape == (1, 3, 1, 32, 32)


RAMP = np.tile(np.linspace(0, 1, 64), (32, 1))
RAMP_16 = (RAMP * 65535).astype(np.uint16)
BLACK_LAST = np.where(np.arange(64) < 63, 255 * RAMP, 0)  # the brightest column is transparent
COLOUR_16 = np.repeat(RAMP_16[:, :, None], 3, axis=2)


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda path: write_tiff(path, RAMP.astype(np.float32), 1, 3), 255 * RAMP),
        (lambda path: write_tiff(path, RAMP.astype(np.float32), 0, 3), 255 - 255 * RAMP),
        (lambda path: write_tiff(path, (255 * RAMP).astype(np.int32).astype(np.float32), 1, 3), 255 * RAMP),
        (lambda path: write_tiff(path, RAMP_16, 1), 255 * RAMP),
        (lambda path: write_tiff(path, RAMP_16, 0), 255 - 255 * RAMP),
        (lambda path: write_tiff(path, (RAMP_16 >> 1).astype(np.int16), 1, 2), 255 * RAMP),
        (lambda path: write_tiff(path, RAMP_16.astype(np.int32), 1, 2), 255 * RAMP),
        (lambda path: path.write_bytes(b"P5 64 32 1023\n" + (RAMP_16 >> 6).astype(">u2").tobytes()), 255 * RAMP),
        (lambda path: path.write_bytes(b"Pf 64 32 -1.0\n" + RAMP.astype("<f4").tobytes()), 255 * RAMP),
        (lambda path: write_png16(path, RAMP_16), 255 * RAMP),
        (lambda path: write_png16(path, RAMP_16, key=(65535,)), BLACK_LAST),
        (lambda path: write_png16(path, COLOUR_16), 255 * RAMP),
        (lambda path: write_png16(path, COLOUR_16, key=(int(RAMP_16[0, 40]),) * 3), 255 * RAMP * (np.arange(64) != 40)),
        (lambda path: write_png16(path, COLOUR_16[:, :, :2]), 255 * RAMP**2),
        (lambda path: write_png16(path, np.dstack((COLOUR_16, RAMP_16))), 255 * RAMP**2),
    ],
)
def test_every_depth_is_shown_in_its_range(tmp_path: Path, write: object, expected: np.ndarray) -> None:
    write(tmp_path / "a")
    shown = np.asarray(read_picture(tmp_path / "a")).astype(float)
    assert (
        np.abs(shown - np.broadcast_to(expected, (32, 64))[:, :, None]).max() <= 2
    )  # Pillow cuts colours to their upper 8 bits


@pytest.mark.parametrize(
    "values",
    [[0, 3.7], [-0.5, 1], [0, np.nan], [0, np.inf], [0, 254.5], [0, 70000], [0, 1000], [-5, 200]],
    ids=str,
)
def test_values_without_a_range_are_refused(tmp_path: Path, values: list[float]) -> None:
    """Never a black picture in silence."""
    kinds = [np.float32] if any(value != value or value % 1 for value in values) else [np.float32, np.int32]
    for kind in kinds:
        path = write_tiff(tmp_path / "a.tif", np.array([values] * 4, kind), 1, 3 if kind == np.float32 else 2)
        with pytest.raises(ValueError, match=r"a\.tif' has values from .*: scale them first"):
            read_picture(path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "JPEG2000", "ICO"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_broken_file_is_one_sentence(tmp_path: Path, form: str) -> None:
    """Cut anywhere, or with bytes changed in its head: a picture or a refusal, never another error."""
    if not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}.get(form, "zlib")):
        pytest.skip(f"this Pillow does not know {form}")
    buffer = io.BytesIO()
    Image.fromarray(picture(48, 64)).save(buffer, form)
    refused, draw = [], random.Random(form)
    for index in range(40):
        content = bytearray(buffer.getvalue())
        if index % 2:
            content = content[: draw.randrange(len(content))]
        for _ in range(0 if index % 2 else draw.randrange(1, 8)):
            content[draw.randrange(min(len(content), 400))] = draw.randrange(256)
        (tmp_path / "broken").write_bytes(content)
        try:
            read_picture(tmp_path / "broken")
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 5
    assert all(sentence.startswith(f"image '{tmp_path}/broken'") and "\n" not in sentence for sentence in refused)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
@pytest.mark.parametrize("opacity", [0, 128, 255])
def test_transparency_shows_black_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, opacity: int
) -> None:
    """Half of it; the last three modes hold one colour that is all transparent."""
    keyed = mode in ("P", "RGB", "L")
    grey = np.where(np.arange(64) < 32, 90, 200).astype(np.uint8)[None].repeat(32, 0)
    path = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    if keyed:
        image = Image.fromarray(grey).convert(mode)
        key = {"P": image.getpixel((0, 0)), "RGB": (90, 90, 90), "L": 90}[mode]
        image.save(path, **({"transparency": key} if opacity < 255 else {}))
        opacity = 0 if opacity < 255 else 255
    else:
        alpha = Image.fromarray(np.where(grey == 90, opacity, 255).astype(np.uint8))
        image = Image.fromarray(grey).convert("RGB" if mode == "RGBA" else "L")
        image.putalpha(alpha)
        (image if mode != "PA" else image.convert("RGBA")).save(path)
    with caplog.at_level(logging.WARNING):
        shown = np.asarray(read_picture(path)).astype(int)
    assert np.abs(shown[:, :32] - round(90 * opacity / 255)).max() <= 1
    assert np.abs(shown[:, 32:] - 200).max() <= (0 if not keyed else 1)
    assert ("transparent" in caplog.text) == (opacity < 255)


def test_a_grey_profile_holds_for_16_bits_too(tmp_path: Path) -> None:
    """A file of 16 bits shows what the same file of 8 bits does."""
    linear = _grey_profile(1.0)
    Image.new("L", (32, 32), 64).save(tmp_path / "8.png", icc_profile=linear)
    Image.fromarray(np.full((32, 32), 64 * 257, np.uint16)).save(tmp_path / "16.png", icc_profile=linear)
    shown = [np.asarray(read_picture(tmp_path / f"{bits}.png")) for bits in (8, 16)]
    assert (shown[0] == shown[1]).all()
    assert abs(int(shown[0][0, 0, 0]) - 137) <= 2


def _grey_profile(gamma: float) -> bytes:
    """A grey ICC profile of version 2: a white point and one tone curve."""
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    start = 128 + 4 + 2 * 12
    tags = struct.pack(">I", 2) + b"".join(
        struct.pack(">4sII", name, place, length)
        for name, place, length in ((b"wtpt", start, 20), (b"kTRC", start + 20, 14))
    )
    head = struct.pack(">I4sI4s4s4s", start + 36, bytes(4), 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + tags + white + curve


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_of_several_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str) -> None:
    first, second = (Image.new("RGB", (64, 32), grey) for grey in ((60, 60, 60), (200, 200, 200)))
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=[second], **({"lossless": True} if suffix == "webp" else {}))
    assert (np.asarray(read_picture(path)) == 60).all()
    assert "the first is taken" in caplog.text


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(_png_header(20000, 20000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for limit in (Image.MAX_IMAGE_PIXELS, None):  # many programs switch Pillow's own check off
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"bomb.png' is not read: .*178956970.*: scale it down first"):
            read_picture(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def _png_header(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    content = buffer.getvalue()
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def test_heic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the sentence names it; with it the picture is read."""
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(100))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(ValueError, match=r"is a HEIC picture: pip install \"ltxkern\[heic\]\", or save it as JPEG"):
            read_picture(path)
    heif = pytest.importorskip("pillow_heif")
    with pytest.raises(ValueError, match="cannot be read"):
        read_picture(path)
    heif.from_pillow(Image.fromarray(picture(64, 96))).save(path, quality=95)
    assert np.abs(np.asarray(read_picture(path)).astype(int) - picture(64, 96)).mean() < 4


@pytest.mark.parametrize(("height", "width"), [(16390, 80), (70, 16390), (40000, 8), (6, 30001), (1, 17000)])
def test_long_pictures_are_served(tmp_path: Path, height: int, width: int) -> None:
    """Longer than the encoder takes: what is seen is the middle, in the picture's own colours."""
    path = save(tmp_path / "strip.png", np.full((height, width, 3), (200, 80, 40), np.uint8))
    pixels = (load_image(path, 128, 192) + 1) * 127.5
    assert (pixels.flatten(1).view(3, -1) - torch.tensor([[200.0], [80.0], [40.0]])).abs().max() <= 4


def test_a_long_picture_shows_its_middle(tmp_path: Path) -> None:
    rows = np.linspace(0, 255, 16390).astype(np.uint8)
    path = save(tmp_path / "strip.png", np.broadcast_to(rows[:, None, None], (16390, 80, 3)).copy())
    whole, seen = load_image(path, 64, 96, crf=0), load_image(path, 64, 96, crf=10)
    assert (whole - seen).abs().max() * 127.5 <= 3


def test_a_huge_picture_is_scaled_before_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(pictures, "recompress", lambda pixels, crf: seen.append(pixels.shape) or pixels)
    monkeypatch.setattr(pictures, "ENCODER_PIXELS", 2**16)
    path = save(tmp_path / "a.png", picture(600, 1200))
    pixels = load_image(path, 128, 192)
    assert seen == [(209, 313, 3)]
    # What is compressed is a few areas of the target where that is less.
    monkeypatch.setattr(pictures, "_WHOLE_PIXELS", 2**14)
    load_image(path, 64, 96)
    assert seen.pop() == (181, 271, 3)
    assert (pixels - load_image(path, 128, 192, crf=0)).abs().mean() < 0.08
    load_image(save(tmp_path / "b.png", picture(256, 256)), 128, 192)
    assert seen[-1] == (256, 256, 3)


@pytest.mark.parametrize(("source", "target"), [((2500, 10), (64, 96)), ((7, 900), (96, 64)), ((1, 410), (64, 64))])
def test_memory_follows_the_target(
    monkeypatch: pytest.MonkeyPatch, source: tuple[int, int], target: tuple[int, int]
) -> None:
    """A strip is sampled where it is seen: the same numbers as scaled in full."""
    pixels = torch.rand(1, 3, *source, generator=torch.Generator().manual_seed(0)) * 255
    smooth = torch.nn.functional.avg_pool2d(pixels, (min(source[0], 5), min(source[1], 5)), 1)
    largest = []
    real = torch.Tensor.index_select
    monkeypatch.setattr(
        torch.Tensor, "index_select", lambda *given: largest.append((out := real(*given)).numel()) or out
    )
    bounded = resize_to_cover(smooth, *target)
    monkeypatch.setattr(pictures, "_LARGEST_SCALED", math.inf)
    torch.testing.assert_close(bounded, resize_to_cover(smooth, *target), rtol=0, atol=0.5)
    assert 0 < max(largest) <= 3 * max(target) * max(min(source), max(target))


def test_a_huge_picture_stays_bytes_until_it_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats of 178 million pixels, or all of them scaled, take gigabytes: also where nothing is compressed."""
    pixels = torch.arange(90 * 120).view(1, 1, 90, 120).expand(1, 3, 90, 120).div(43).to(torch.uint8)
    scaled = resize_to_cover(pixels, 64, 96)
    largest = []
    real = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda *given: largest.append(given[0].dtype) or real(*given))
    monkeypatch.setattr(pictures, "_WHOLE_PIXELS", 90 * 120 - 1)
    torch.testing.assert_close(resize_to_cover(pixels, 64, 96), scaled, rtol=0, atol=1e-3)
    assert largest[0] == torch.uint8


def test_a_picture_reaches_the_scaling_as_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        pictures, "resize_to_cover", lambda pixels, *size: seen.append(pixels.dtype) or resize_to_cover(pixels, *size)
    )
    load_image(save(tmp_path / "a.png", picture(60, 120)), 64, 96, crf=0)
    assert seen == [torch.uint8]
