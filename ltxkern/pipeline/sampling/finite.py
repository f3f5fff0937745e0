"""Names the stage that produced NaN, infinity, a picture without content or silence, so that users need not guess."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SILENCE = 1e-4  # peak amplitude; 16-bit audio at this level has steps of 3
FLAT = 1.0 / 255.0  # spread of a video in [0, 1] that no viewer sees


class NonFiniteError(ArithmeticError):
    """A stage produced NaN or infinity; the message names the stage."""


def check_finite(stage: str, name: str, tensor: Tensor) -> None:
    """Raise NonFiniteError if `tensor` holds NaN or infinity.

    Reads one flag back to the host: call it once at the end of a stage, never inside a loop.

    Args:
        stage: where the tensor was made, e.g. "stage 1".
        name: what it is, e.g. "video latent".
        tensor: any shape and floating dtype.
    """
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    bad = tensor.numel() - int(finite.sum())
    nan = int(torch.isnan(tensor).sum())
    raise NonFiniteError(
        f"{stage}: the {name} has {bad} non-finite of {tensor.numel()} values ({nan} NaN, {bad - nan} infinite)"
        " - check the weights and LoRAs loaded for this stage, or run it in float32"
    )


def check_latent(stage: str, name: str, latent: Tensor) -> None:
    """`check_finite`, and a warning where every value is the same (weights that are all zero, an empty latent)."""
    check_finite(stage, name, latent)
    if latent.numel() > 1 and bool((latent == latent.flatten()[0]).all()):
        logger.warning("%s: the %s is constant: the decoded result will have no content", stage, name)


def check_audio(stage: str, waveform: Tensor) -> None:
    """`check_finite`, and a warning where no sample exceeds 1e-4 of full scale."""
    check_finite(stage, "waveform", waveform)
    if waveform.numel() and float(waveform.abs().max()) < SILENCE:
        logger.warning("%s: the audio is silent (no sample above %g of full scale)", stage, SILENCE)


def warn_if_flat(stage: str, low: float, high: float) -> None:
    """Warn where a whole video in [0, 1] spans from `low` to `high` only, a step that cannot be seen."""
    if high - low >= FLAT:
        return
    colour = "black" if high < FLAT else "white" if low > 1 - FLAT else "one constant colour"
    logger.warning("%s: the video is %s in every frame", stage, colour)
