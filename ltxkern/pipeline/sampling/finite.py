"""Names the stage, step and modality that gave NaN, infinity, a picture without content or silence, and what may have caused it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SILENCE = 1e-4  # peak amplitude; 16-bit audio at this level has steps of 3
FLAT = 1.0 / 255.0  # spread of a video in [0, 1] that no viewer sees
_SAMPLED = 8  # every eighth row and column tell whether a picture moves

_CAUSES = {
    "constant": "weights that are all zero, or a checkpoint of another model",
    "black": "a VAE that overflowed in fp16 (use bf16 or fp32), or one of another checkpoint",
    "flat": "a VAE of another checkpoint, or a latent without content",
    "frozen": "pictures held at strength 1 at both ends, too few steps, or a prompt without motion",
    "silent": "a prompt that asks for silence, or an audio VAE and vocoder of another checkpoint",
}


class NonFiniteError(ArithmeticError):
    """A stage produced NaN or infinity; the message names stage, step, modality and what holds non-finite weights.

    Attributes:
        stage: where a run can be taken up again: "text", "stage1", "stage2" or "decode"; empty where nobody knows.
        finite_weights: whether all weights were looked at and found finite, so that more precision may help.
    """

    stage = ""
    finite_weights = False


class Spread(NamedTuple):
    """Of one tensor: how many values are no number and how many infinite, the least, the greatest, the standard deviation."""

    nan: int
    infinite: int
    low: float
    high: float
    std: float


def spreads(tensors: Mapping[str, Tensor]) -> dict[str, Spread]:
    """Of each tensor, of any floating dtype and one device, with one host read for all."""
    rows = torch.stack([_spread(tensor) for tensor in tensors.values()]).tolist()
    return {name: _read(row) for name, row in zip(tensors, rows, strict=True)}


def _spread(tensor: Tensor) -> Tensor:
    wide = tensor.detach().flatten()
    wide = wide if wide.dtype == torch.float64 else wide.float()
    low, high = wide.aminmax()
    parts = (wide.isnan().sum(), wide.isinf().sum(), low, high, wide.std(correction=0))
    return torch.stack([part.double() for part in parts])


def _read(row: list[float]) -> Spread:
    nan, infinite, *others = row
    return Spread(int(nan), int(infinite), *others)


def check_finite(stage: str, name: str, tensor: Tensor) -> None:
    """Raise NonFiniteError if `tensor` holds NaN or infinity.

    Reads the host once: call it at the end of a stage, never inside a loop.

    Args:
        stage: where the tensor was made, e.g. "stage 1".
        name: what it is, e.g. "video latent".
        tensor: any shape and floating dtype.
    """
    _require_finite(stage, name, tensor.numel(), spreads({name: tensor})[name])


def _require_finite(stage: str, name: str, count: int, spread: Spread) -> None:
    bad = spread.nan + spread.infinite
    if bad:
        raise NonFiniteError(
            f"{stage}: the {name} has {bad} non-finite of {count} values ({spread.nan} NaN, {spread.infinite} infinite)"
        )


def check_latents(stage: str, latents: Mapping[str, Tensor]) -> None:
    """`check_finite` of all, and a warning where every value is the same; one host read."""
    _judge(stage, latents, spreads(latents))


def _judge(stage: str, latents: Mapping[str, Tensor], found: Mapping[str, Spread]) -> None:
    for name, spread in found.items():
        count = latents[name].numel()
        _require_finite(stage, name, count, spread)
        logger.info("%s: %s from %.4g to %.4g, std %.4g", stage, name, spread.low, spread.high, spread.std)
        if count > 1 and spread.low == spread.high:
            _warn(stage, f"the {name} is constant: the decoded result will have no content", "constant")


class StageWatch:
    """Follows the latents of a stage; nothing is read on the host before its end."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._steps: list[tuple[int, list[str], Tensor]] = []

    def after_step(self, done: int, latents: Mapping[str, Tensor]) -> None:
        """Note whether the latents after `done` steps are finite."""
        flags = torch.stack([latent.isfinite().all() for latent in latents.values()])
        self._steps.append((done, list(latents), flags))

    def check(self, latents: Mapping[str, Tensor]) -> None:
        """`check_latents` at the end of the stage, naming the first step that was not finite; one host read.

        Raises:
            NonFiniteError: NaN or infinity.
        """
        named = {f"{name} latent": latent for name, latent in latents.items()}
        rows = torch.stack([_spread(latent) for latent in named.values()])
        flags = [flags.to(rows) for _, _, flags in self._steps]
        read = torch.cat([rows.flatten(), *flags]).tolist()
        width = rows.shape[1]
        found = {name: _read(read[place * width :][:width]) for place, name in enumerate(named)}
        at = rows.numel()
        for done, names, flags_of in self._steps:
            bad = [name for name, finite in zip(names, read[at : at + len(flags_of)], strict=True) if not finite]
            at += len(flags_of)
            if bad and any(spread.nan + spread.infinite for spread in found.values()):
                first = f"the {bad[0]} latent is the first that is not finite"
                both = f"the {' and the '.join(bad)} latents are the first that are not finite"
                raise NonFiniteError(f"{self._stage}, step {done}: {both if bad[1:] else first}")
        _judge(self._stage, named, found)


class VideoWatch:
    """Follows the chunks of a decoded video; one host read a chunk."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._low, self._high, self._change = math.inf, -math.inf, 0.0
        self._frames = 0
        self._last: Tensor | None = None

    def chunk(self, decoded: Tensor) -> None:
        """Take in a chunk (1, 3, F, H, W) as the decoder gives it, in [-1, 1] or beyond.

        Raises:
            NonFiniteError: NaN or infinity.
        """
        low, high = decoded.aminmax()
        sample = decoded[0, :, :, ::_SAMPLED, ::_SAMPLED].clamp(-1, 1).float()
        before = sample[:, :1] if self._last is None else self._last
        change = torch.cat((before, sample), dim=1).diff(dim=1).abs().amax()
        self._last, self._frames = sample[:, -1:], self._frames + sample.shape[1]
        read = torch.stack((low.float(), high.float(), change)).tolist()
        if not all(map(math.isfinite, read)):
            check_finite(self._stage, "video", decoded)
        pictures = [min(max((value + 1) / 2, 0.0), 1.0) for value in read[:2]]
        self._low, self._high = min(self._low, pictures[0]), max(self._high, pictures[1])
        self._change = max(self._change, read[2] / 2)

    def end(self) -> None:
        """Warn where the whole video has no content, or does not move."""
        if self._high - self._low < FLAT:
            colour = "black" if self._high < FLAT else "white" if self._low > 1 - FLAT else "one constant colour"
            _warn(self._stage, f"the video is {colour} in every frame", "black" if colour == "black" else "flat")
        elif self._frames > 1 and self._change < FLAT:
            _warn(self._stage, "every frame of the video is the same", "frozen")


def check_audio(stage: str, waveform: Tensor) -> None:
    """`check_finite`, and a warning where no sample exceeds 1e-4 of full scale."""
    if not waveform.numel():
        return
    spread = spreads({"waveform": waveform})["waveform"]
    _require_finite(stage, "waveform", waveform.numel(), spread)
    if max(-spread.low, spread.high) < SILENCE:
        _warn(stage, f"the audio is silent (no sample above {SILENCE:g} of full scale)", "silent")


def _warn(stage: str, what: str, cause: str) -> None:
    logger.warning("%s: %s; likely causes: %s", stage, what, _CAUSES[cause])
