"""Image conditioning: which pictures a video passes through, and writing them into a latent state."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltxkern.pipeline.model.decode import normalize
from ltxkern.pipeline.model.pictures import DEFAULT_CRF, load_image, read_picture
from ltxkern.pipeline.sampling.latents import LatentState, VideoLatentShape, keyframe_coordinates, patchify

if TYPE_CHECKING:
    from diffusers import AutoencoderKLLTX2Video

MAX_CRF = 51


@dataclass(frozen=True)
class ImageCondition:
    """One picture that the video shall pass through.

    frame: pixel frame it stands at; 0 replaces the first latent frame, others append key-frame tokens.
    strength: 1 keeps the picture as it is, 0 ignores it.
    crf: H.264 quality of the re-compression before encoding; 0 skips it.
    """

    path: str | Path
    frame: int = 0
    strength: float = 1.0
    crf: int = DEFAULT_CRF


def parse_image_condition(text: str) -> ImageCondition:
    """Read "PATH[:FRAME[:STRENGTH]]"; a path may begin with ~ and contain colons, and an existing file wins over a suffix.

    Raises:
        ValueError: an empty path, or a last part that is a number but no frame index.
    """
    text = os.path.expanduser(text)
    parts = text.rsplit(":", 2)
    if os.path.isfile(text) or len(parts) == 1:
        return _condition(text, text)
    path, last = text.rsplit(":", 1)
    frame_follows = _is_integer(last)
    if len(parts) == 3 and _is_integer(parts[1]) and _is_number(last) and not (frame_follows and os.path.isfile(path)):
        return _condition(text, parts[0], int(parts[1]), float(last))
    if frame_follows:
        return _condition(text, path, int(last))
    if _is_number(last):
        raise ValueError(
            f"image {text!r}: the part before the strength must be a whole frame number, PATH:FRAME:STRENGTH"
        )
    return _condition(text, text)


def _condition(text: str, path: str, frame: int = 0, strength: float = 1.0) -> ImageCondition:
    if not path:
        raise ValueError(f"image {text!r} has no path: expected PATH[:FRAME[:STRENGTH]]")
    return ImageCondition(path, frame, strength)


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def validate_image_conditions(
    conditions: Iterable[ImageCondition], num_frames: int, *, check_files: bool = True
) -> None:
    """Check every condition before anything is loaded: frame, strength and crf are in range, the file is a picture.

    check_files: False where the pictures come as latents and no file is read.

    Raises:
        ValueError: one sentence that names the image and what is wrong with it.
    """
    for condition in conditions:
        name = f"image {str(condition.path)!r}"
        if not 0 <= condition.frame < num_frames:
            raise ValueError(f"{name}: frame {condition.frame} is outside 0..{num_frames - 1}")
        if not 0 <= condition.strength <= 1:  # also refuses NaN
            raise ValueError(f"{name}: strength {condition.strength} is outside 0..1")
        if not 0 <= condition.crf <= MAX_CRF:
            raise ValueError(f"{name}: crf {condition.crf} is outside 0..{MAX_CRF}")
        if check_files:
            read_picture(condition.path)


@torch.no_grad()
def encode_image(vae: AutoencoderKLLTX2Video, pixels: Tensor) -> Tensor:
    """Encode (1, 3, 1, H, W) pixels in [-1, 1] to a normalised latent (1, C, 1, H/32, W/32): the mean, no sampling."""
    pixels = pixels.to(next(vae.encoder.parameters()).dtype)
    return normalize(vae.encode(pixels).latent_dist.mode(), vae)


def encode_conditions(
    vae: AutoencoderKLLTX2Video,
    conditions: Sequence[ImageCondition],
    height: int,
    width: int,
    *,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """The normalised latents of all conditions at one resolution, in their order."""
    return [encode_image(vae, load_image(item.path, height, width, crf=item.crf, device=device)) for item in conditions]


def apply_image_conditions(
    state: LatentState,
    conditions: Sequence[ImageCondition],
    latents: Sequence[Tensor],
    *,
    fps: float,
    spatial_ratio: int = 32,
) -> LatentState:
    """Write encoded pictures into a video state, before noise.

    Frame 0 replaces `clean` of the first latent frame and sets its mask to 1 - strength; `latent` stays, the noise step
    brings the clean value in. Any other frame appends tokens: latent zeros, clean the picture, mask 1 - strength,
    positions of that single pixel frame.

    Args:
        state: as `LatentState.create` made it.
        conditions: where and how strongly; their files are not read here.
        latents: one (1 | B, C, 1, H, W) normalised latent per condition.
        fps: frames per second of the video.

    Returns:
        The conditioned state; tokens appended in the order of `conditions`.

    Raises:
        ValueError: the counts differ or a latent does not fit the state.
    """
    shape = state.shape
    if not isinstance(shape, VideoLatentShape):
        raise ValueError("state must be a video state: pictures cannot condition audio")
    if len(conditions) != len(latents):
        raise ValueError(f"latents must be one per condition: {len(conditions)} conditions, {len(latents)} latents")
    for condition, latent in zip(conditions, latents, strict=True):
        expected = (shape.channels, 1, shape.height, shape.width)
        if latent.ndim != 5 or latent.shape[0] not in (1, shape.batch) or tuple(latent.shape[1:]) != expected:
            raise ValueError(f"image latent must be (1, {', '.join(map(str, expected))}), got {tuple(latent.shape)}")
        tokens = patchify(latent.to(state.latent)).expand(shape.batch, -1, -1)
        level = ctypes.c_float(1.0 - condition.strength).value  # the value as the fp32 mask holds it
        mask = torch.full_like(state.mask[:, : tokens.shape[1]], level)
        if condition.frame == 0:
            count = tokens.shape[1]
            state = replace(
                state,
                clean=torch.cat((tokens, state.clean[:, count:]), dim=1),
                mask=torch.cat((mask, state.mask[:, count:]), dim=1),
                levels=state.levels_with((level,)),
            )
        else:
            place = keyframe_coordinates(
                shape, condition.frame, fps, device=state.latent.device, spatial_ratio=spatial_ratio
            )
            state = state.append(torch.zeros_like(tokens), tokens, mask, place, levels=(level,))
    return state
