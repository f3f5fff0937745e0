"""How the video decoder's tensors lie in memory: as the card's convolutions are faster, checked at its first use."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d
from torch.utils._python_dispatch import _disable_current_modes

from ltxkern.nn import PixelNormSiLU

logger = logging.getLogger(__name__)

LAYOUTS: Mapping[str, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels-last": torch.channels_last_3d,
}
NAMES = ("auto", *LAYOUTS)
VARIABLE = "LTXKERN_DECODER_LAYOUT"
# Relative RMS distance from fp64, in units of the number format, that is right however well the contiguous layout did.
ROUNDINGS = 4


def order(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The layouts that serve unnamed, best first.

    Tensor cores take the channels of a position side by side: of contiguous tensors of 16 bits, cuDNN transposes the input and the
    output of every convolution, four passes over each. On a CPU, whose library has blocks of its own, and in fp32 nothing is won.
    """
    halves = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or torch.version.hip or not halves or torch.cuda.get_device_capability(device) < (8, 0):
        return ("contiguous",)
    return ("channels-last", "contiguous")


def _sample(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input and the weight of a convolution."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 3, 6, 10, generator=generator)
    weight = torch.randn(32, 64, 3, 3, 3, generator=generator) * (27 * 64) ** -0.5
    return x.to(dtype), weight.to(dtype)


@functools.cache
def fault(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the decoder's norm and convolution in a layout; None where they are right. Costs a call the first time.

    They are held to fp64, within 1.5 times what the contiguous layout is away from it or a few roundings.
    """
    with _disable_current_modes(), torch.no_grad():
        exact, weight = (tensor.double() for tensor in _sample(dtype))
        exact = PixelNormSiLU()(exact)
        expected = conv3d(torch.cat((exact[:, :, :1], exact, exact[:, :, -1:]), 2), weight, padding=(0, 1, 1))

        def error(layout: str) -> float:
            x, weight = (tensor.to(device, memory_format=LAYOUTS[layout]) for tensor in _sample(dtype))
            found = conv3d(PixelNormSiLU().with_frames(x, 1, 1), weight, padding=(0, 1, 1))
            return float((found.cpu().double() - expected).norm() / expected.norm())

        try:
            found, limit = error(name), max(1.5 * error("contiguous"), ROUNDINGS * torch.finfo(dtype).eps)
        except RuntimeError as failure:
            return f"it failed on a tiny case: {str(failure).strip().splitlines()[0]}"
    return None if found <= limit else f"it is {found:.1e} from fp64 on a tiny case, allowed {limit:.1e}"


def asked() -> str:
    """The layout that the variable LTXKERN_DECODER_LAYOUT names, else "auto".

    Raises:
        ValueError: it names none.
    """
    name = os.environ.get(VARIABLE) or "auto"
    if name not in NAMES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


@functools.cache
def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The first layout of the card's order that is right; one that is not is dropped with a warning."""
    for name in order(device, dtype):
        wrong = None if name == "contiguous" else fault(name, device, dtype)
        if wrong is None:
            logger.info("the video decoder's tensors lie %s on %s", name, device)
            return name
        logger.warning("the video decoder's tensors do not lie %s on %s: %s", name, device, wrong)
    return "contiguous"


def lay_out(decoder: nn.Module) -> str:
    """Brings a decoder's weights into the layout of its card, or into the one that is asked for; activations follow them.

    Args:
        decoder: with its weights where it will run. Values, names and shapes stay.

    Returns:
        Name of the layout.

    Raises:
        ValueError: the variable LTXKERN_DECODER_LAYOUT names no layout.
    """
    name, weight = asked(), next((p for p in decoder.parameters() if p.dim() == 5), None)
    if weight is None or weight.is_meta:
        return "contiguous"
    chosen = choose(weight.device, weight.dtype) if name == "auto" else name
    # A decoder whose owner laid it out otherwise stays so where the card has no preference.
    if chosen != "contiguous" or name != "auto":
        decoder.to(memory_format=LAYOUTS[chosen])  # type: ignore[call-overload]
    return chosen


def describe(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """One line on what `lay_out` does on a device, for `ltxkern verify`."""
    name = choose(device, dtype)
    refused = [f"not {other} ({wrong})" for other in order(device, dtype) if (wrong := fault(other, device, dtype))]
    return f"video decoder on {device}: {name}, checked against fp64{''.join(', ' + one for one in refused)}"
