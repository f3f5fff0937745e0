"""What the values of a request must be, each refused in one sentence with the nearest legal one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from ltxkern.ops.checks import check_finite_number


class SeveralProblemsError(ValueError):
    """All that is wrong with a request.

    Attributes:
        problems: a sentence each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n  ".join([f"{len(problems)} problems:", *problems]))
        self.problems = list(problems)


def require_all(*checks: Callable[[], object]) -> None:
    """Make every check, and refuse with all that they say.

    Raises:
        ValueError, TypeError: that of the only check that failed.
        SeveralProblemsError: of several.
    """
    failed: list[ValueError | TypeError] = []
    for check in checks:
        try:
            check()
        except (ValueError, TypeError) as error:
            failed.append(error)
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise SeveralProblemsError([str(error) for error in failed])


def find_device(name: str | torch.device | None) -> torch.device:
    """The device that a name asks for; None is the first CUDA device, else the CPU.

    Raises:
        ValueError: not a CPU or CUDA device, or one that this machine does not have.
    """
    count = torch.cuda.device_count()
    legal = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
    if name is None:
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be one of {legal}, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be one of {legal}, got {str(name)!r}")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {str(name)!r} is not there: use one of {legal}")
    return device


def require_strength(name: str, strength: float, *, signed: bool = False) -> None:
    """A LoRA strength is a finite number; that of the distilled LoRA is not negative, that of others may be (`signed`).

    Raises:
        ValueError: it is not.
    """
    if signed and isinstance(strength, (int, float)) and math.isfinite(strength):
        return
    if not (isinstance(strength, (int, float)) and 0 <= strength < float("inf")):
        raise ValueError(
            f"{name}: the strength must be a finite number{'' if signed else ' of at least 0'}, got {strength}: "
            "use 0 to switch it off"
        )


def require_texts(prompts: list[str], negatives: list[str]) -> None:
    if not prompts:
        raise ValueError("prompt must hold at least one text, got none")
    for name, texts in (("prompt", prompts), ("negative_prompt", negatives)):
        wrong = [type(text).__name__ for text in texts if not isinstance(text, str)]
        if wrong:
            raise TypeError(f"{name} must be a text or a list of texts, got {wrong[0]}")
        for text in texts:
            try:
                text.encode()
            except (
                UnicodeEncodeError
            ) as error:  # bytes of another encoding on the command line, or half a character in JSON
                raise ValueError(
                    f"{name} must be Unicode text, got {text[error.start]!r} after {text[: error.start][-20:]!r}: write it in UTF-8"
                ) from error
    if len(negatives) != len(prompts):
        raise ValueError(
            f"negative_prompt must be one text, or one per prompt: {len(prompts)} prompts, {len(negatives)} given"
        )


def whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    return value


def require_side(name: str, value: int, multiple: int) -> None:
    if whole(name, value) >= multiple and value % multiple == 0:
        return
    below, above = value // multiple * multiple, -(-value // multiple) * multiple
    if below < multiple:
        raise ValueError(f"{name} {value} is not a positive multiple of {multiple}: use {multiple}")
    nearest, other = (above, below) if above - value <= value - below else (below, above)
    raise ValueError(f"{name} {value} is not a multiple of {multiple}: use {nearest} or {other}")


def require_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value}")


def require_share(name: str, share: float) -> None:
    check_finite_number(name, share)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {share}: use {0 if share < 0 else 1}")


def require_at_least_one(name: str, value: Any) -> None:
    if whole(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}: use 1")


def require_schedule(name: str, sigmas: list[float]) -> None:
    falling = all(later < earlier for earlier, later in pairwise(sigmas))
    if len(sigmas) < 2 or not falling or not all(0 <= sigma <= 1 for sigma in sigmas):
        raise ValueError(f"{name} must be at least two strictly falling numbers between 1 and 0, got {sigmas}")
