"""Pictures as the model was trained on them: upright sRGB on black, compressed with H.264, scaled to cover a size."""

from __future__ import annotations

import io
import logging
import math
import os
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

logger = logging.getLogger(__name__)

DEFAULT_CRF = 33  # LTX models before 2.4 were trained on first frames compressed like this
MAX_PIXELS = 178_956_970  # where Pillow suspects a decompression bomb; decoded, half a gigabyte
ENCODER_SIDE = 16_384  # libx264 takes no longer one
ENCODER_PIXELS = 2**26  # a larger frame costs it gigabytes and most of a minute
# Larger pictures are cut to what is seen before they are compressed, and never made floats as a whole
_WHOLE_PIXELS = 2**24
_LARGEST_COMPRESSED = 8  # areas of the target; what is seen beyond is scaled down first
_LARGEST_SCALED = 4  # areas of the target; a strip that would grow beyond is sampled where it is seen only
_SLACK = 1e-3  # by which a renderer's filter may leave 0..1
_WHOLE_RANGES = (255, 65535)
# Tags of a TIFF, and values of the last two
_SAMPLE_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
# What decoders raise on broken files
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)


def load_image(
    path: str | Path,
    height: int,
    width: int,
    *,
    crf: int = DEFAULT_CRF,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Read a picture as the VAE encoder takes it: upright sRGB, re-compressed, covering height x width, x / 127.5 - 1.

    Returns:
        (1, 3, 1, height, width) in [-1, 1], computed in fp32 and rounded to `dtype` once.

    Raises:
        ValueError: the file does not exist or is no picture.
    """
    image = read_picture(path)
    picture = recompress(np.asarray(_within_encoder(image, height, width) if crf else image), crf)
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1).unsqueeze(0).to(device)
    pixels = resize_to_cover(pixels, height, width) / 127.5 - 1.0
    return pixels.to(dtype).unsqueeze(2)


def read_picture(path: str | Path) -> Image.Image:
    """The first picture of a file, upright, as sRGB; what is transparent shows black.

    Raises:
        ValueError: there is no such file, it is no picture, it has more than MAX_PIXELS (found before they are decoded), or
            values without a known range.
    """
    file, name = Path(os.path.expanduser(path)), f"image {str(path)!r}"
    if not os.path.exists(file):  # of pathlib's, some raise where a name is too long
        raise ValueError(f"{name} " + ("is a link to nothing" if os.path.islink(file) else "does not exist"))
    if not file.is_file():
        raise ValueError(f"{name} is not a file")
    try:
        with _Bounded(io.FileIO(file)) as source:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # below the limit that is stated here
                opened = _open(source, name)
            with opened:
                return _decoded(opened, name)
    except _RefusedError as refused:
        raise ValueError(str(refused)) from refused.__cause__
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is not read: {str(error).split(',')[0]}: scale it down first") from error
    except _BROKEN as error:
        raise ValueError(f"{name} cannot be read: {str(error) or 'it needs more memory than there is'}") from error


class _RefusedError(Exception):
    """A sentence of ours, told apart from what a broken file makes a decoder raise."""


class _Bounded(io.BufferedReader):
    """A file that makes no room for more than it holds, whatever a length within it says."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _open(source: io.BufferedReader, name: str) -> Image.Image:
    try:
        return Image.open(source)
    except UnidentifiedImageError as error:
        if not _is_heic(source):
            raise _RefusedError(
                f"{name} is not a picture that can be read: save it as PNG, JPEG or WebP (raw, HDR and float colour are not read)"
            ) from error
    try:
        from pillow_heif import register_heif_opener
    except ModuleNotFoundError as error:
        raise _RefusedError(
            f'{name} is a HEIC picture: pip install "ltxkern[heic]", or save it as JPEG or PNG'
        ) from error
    register_heif_opener()
    return Image.open(source)


def _is_heic(source: io.BufferedReader) -> bool:
    source.seek(0)
    head = source.read(64)
    brands = {head[start : start + 4] for start in range(8, min(len(head), int.from_bytes(head[:4], "big")), 4)}
    return head[4:8] == b"ftyp" and not brands.isdisjoint(_HEIC_BRANDS)


def _decoded(opened: Image.Image, name: str) -> Image.Image:
    if opened.width * opened.height > MAX_PIXELS:
        raise _RefusedError(
            f"{name} is not read: {opened.width}x{opened.height} pixels exceed the limit of {MAX_PIXELS}: scale it down first"
        )
    # Every phone writes a second picture into MPO
    if getattr(opened, "is_animated", False) and opened.format != "MPO":
        logger.warning("%s holds several pictures: the first is taken", name)
    tags = dict(getattr(opened, "tag_v2", {}))
    if opened.format == "PPM":
        tags[_SAMPLE_BITS] = (16,)  # Pillow widens every depth above 8
    opened.load()
    ImageOps.exif_transpose(opened, in_place=True)  # else a copy, also of what is upright
    image = opened
    opacity = _opacity(image)
    if opacity is not None and image.mode == "P":
        image = image.convert("RGBA")  # to RGB at once, Pillow warns
    if image.mode.startswith(("I", "F")):
        image = _of_bytes(image, tags, name)
    colour = _to_srgb(image, name)
    if opacity is None or opacity.getextrema()[0] == 255:
        return colour
    logger.warning("%s is transparent in parts: they show black", name)
    colour.paste((0, 0, 0), mask=ImageChops.invert(opacity))
    return colour


def _opacity(image: Image.Image) -> Image.Image | None:
    """0 to 255 per pixel; None where nothing can be transparent."""
    key = image.info.get("transparency")
    if image.mode.startswith(("I", "F")):
        return None if key is None else Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return None
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in key)  # a key of 16 bits, pixels that Pillow cut to 8
    return (image if image.mode == "RGBA" else image.convert("RGBA")).getchannel("A")


def _of_bytes(image: Image.Image, tags: Mapping[int, Any], name: str) -> Image.Image:
    """A grey picture of more than 8 bits or of floating point, scaled to 8 bits: Pillow's own conversion clips.

    The range is what the samples' depth says, where it says it; else 0 to 1, or whole numbers to 255 or 65535.
    """
    values = np.asarray(image).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    bits = tags.get(_SAMPLE_BITS, (16,))[0] - (tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED)
    full: float | None
    if image.mode != "F" and bits <= 16 and low >= 0:
        full = 2**bits - 1
    elif low >= -_SLACK and high <= 1 + _SLACK:
        full = 1.0
    else:
        full = next((limit for limit in _WHOLE_RANGES if limit / 4 <= high <= limit), None)  # darker ones are a guess
    # Also refuses NaN, which compares with nothing
    if full is None or not low >= -_SLACK or (full in _WHOLE_RANGES and not np.array_equal(values, np.floor(values))):
        raise _RefusedError(
            f"{name} has values from {low:g} to {high:g}; 0 to 1, or whole numbers to 255 or 65535, are read: scale them first"
        )
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = full - values
    shown = Image.fromarray((values * 255 / full).clip(0, 255).round().astype(np.uint8))
    shown.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    return shown


def _to_srgb(image: Image.Image, name: str) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode in ("LA", "La"):
        image = image.convert("L")
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if not profile:
        return image if image.mode == "RGB" else image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        logger.warning("%s: its colour profile does not apply and is ignored (%s)", name, error)
        return image.convert("RGB")
    return converted if converted is not None else image.convert("RGB")


def _within_encoder(image: Image.Image, height: int, width: int) -> Image.Image:
    """A picture as it is where the encoder takes it; else the part that height x width shows, scaled down if still needed.

    So what compressing costs follows the target, beyond what is small in any case.
    """
    largest = min(ENCODER_PIXELS, max(_WHOLE_PIXELS, _LARGEST_COMPRESSED * height * width))
    if max(image.size) <= ENCODER_SIDE and image.width * image.height <= largest:
        return image
    seen = (
        min(image.width, math.ceil(image.height * width / height)),
        min(image.height, math.ceil(image.width * height / width)),
    )
    left, top = (image.width - seen[0]) // 2, (image.height - seen[1]) // 2
    scale = min(1.0, ENCODER_SIDE / max(seen), math.sqrt(largest / (seen[0] * seen[1])))
    size = (max(1, int(seen[0] * scale)), max(1, int(seen[1] * scale)))
    box = (left, top, left + seen[0], top + seen[1])
    return image.crop(box) if size == seen else image.resize(size, Image.Resampling.BICUBIC, box)


def recompress(picture: np.ndarray, crf: int) -> np.ndarray:
    """Encode one frame with H.264 at `crf` and decode it again, the artefacts the model expects of a given frame.

    Args:
        picture: uint8 (H, W, 3).
        crf: 0 returns the picture unchanged.

    Returns:
        uint8 (H, W, 3), cropped to even sides; unchanged where a side is below 2.
    """
    import av

    height, width = (side // 2 * 2 for side in picture.shape[:2])
    if crf == 0 or height < 2 or width < 2:
        return picture
    picture = np.ascontiguousarray(picture[:height, :width])
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1  # slices, and so the result, would depend on the machine
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer, mode="r", format="mp4") as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def resize_to_cover(pixels: Tensor, height: int, width: int) -> Tensor:
    """Scale (1, 3, H, W), bytes or fp32, until it covers height x width, then crop the centre.

    Scale = max of the two ratios, size = ceil, bilinear without antialiasing, align_corners False, floor offsets. Of a strip
    and of a large picture the same samples are taken without the rest: memory follows the target.

    Returns:
        (1, 3, height, width) fp32.
    """
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    size = (math.ceil(pixels.shape[2] * scale), math.ceil(pixels.shape[3] * scale))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    within = pixels.shape[2] * pixels.shape[3] <= _WHOLE_PIXELS
    if within and size[0] * size[1] <= _LARGEST_SCALED * height * width:
        pixels = torch.nn.functional.interpolate(pixels.float(), size=size, mode="bilinear", align_corners=False)
        return pixels[:, :, top : top + height, left : left + width]
    axes = [(2, size[0], top, height), (3, size[1], left, width)]
    for axis, scaled, first, count in sorted(axes, key=lambda axis: axis[3] / axis[1]):  # the longer one shrinks first
        pixels = _sampled(pixels, axis, scaled, first, count)
    return pixels


def _sampled(pixels: Tensor, axis: int, scaled: int, first: int, count: int) -> Tensor:
    """Samples first to first + count of an axis that is scaled to `scaled`, bilinear."""
    side = pixels.shape[axis]
    index = torch.arange(first, first + count, device=pixels.device, dtype=torch.float32)
    position = ((index + 0.5) * (side / scaled) - 0.5).clamp(0, side - 1)
    lower = position.floor().long()
    weight = (position - lower).view([-1 if dim == axis else 1 for dim in range(4)])
    upper = (lower + 1).clamp(max=side - 1)
    return pixels.index_select(axis, lower) * (1 - weight) + pixels.index_select(axis, upper) * weight
