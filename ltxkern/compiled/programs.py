"""Programs by case, the workspace that their launches share, and where a tier's tensors must lie."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ltxkern.compiled import extension
from ltxkern.compiled.steps import Call, Launch, Step
from ltxkern.compiled.tensors import DeviceLimits, device_limits, refuse_device

# Threads of a block of the elementwise kernels.
THREADS = 256


# Programs that run, each with its tensors, where somebody wants to know.
_runs: ContextVar[list[tuple[Any, tuple[Tensor | None, ...]]] | None] = ContextVar("ltxkern_program_runs", default=None)


@contextlib.contextmanager
def noted_runs() -> Iterator[list[tuple[Any, tuple[Tensor | None, ...]]]]:
    """The programs that run within it, each with its tensors."""
    runs: list[tuple[Any, tuple[Tensor | None, ...]]] = []
    token = _runs.set(runs)
    try:
        yield runs
    finally:
        _runs.reset(token)


def program(tier: str, steps: Callable[[Any], Sequence[Step | Call]], case: Any, arguments: int) -> Callable[..., None]:
    """The program of one case, made once: `steps(case)` are calls for the tier "cpu", launches for the others."""
    made = kept_program(tier, steps, case, arguments)
    runs = _runs.get()
    if runs is None:
        return made

    def noted(*tensors: Tensor | None) -> None:
        made(*tensors)
        runs.append((made, tensors))

    return noted


@functools.lru_cache(maxsize=4096)
def kept_program(
    tier: str, steps: Callable[[Any], Sequence[Step | Call]], case: Any, arguments: int
) -> Callable[..., None]:
    made = steps(case)
    if tier == "cpu":
        return extension.cpu_program([step for step in made if isinstance(step, Call)], arguments)
    return extension.program_builder(tier)([step for step in made if not isinstance(step, Call)], arguments)


def workspace(tier: str, case: Any, x: Tensor) -> Tensor | None:
    """Memory of `case.workspace_bytes` for what launches hand to one another, on x's device; CPU calls need none."""
    if tier == "cpu" or case.workspace_bytes == 0:
        return None
    return torch.empty(case.workspace_bytes, dtype=torch.uint8, device=x.device)


@functools.cache
def _limits(tier: str, device: int) -> DeviceLimits:
    def held(launch: Launch) -> int:
        return extension.held(tier, device, launch.kernel, launch.block, launch.shared_bytes, launch.cooperative)

    return device_limits(device)._replace(held=held)


def limits_of(tier: str, x: Tensor) -> DeviceLimits | None:
    """Limits of x's device, for a case whose launches depend on them; None for the tier "cpu"."""
    return None if tier == "cpu" else _limits(tier, x.device.index)


def refuse_elsewhere(tier: str, args: Sequence[Any]) -> str | None:
    """Why a tier cannot serve tensors where these lie, or None."""
    for value in args:
        # Most optional arguments are absent, and no check is as quick as this one.
        if value is None:
            continue
        if isinstance(value, Tensor):
            if tier != "cpu":
                return refuse_device(tier, value)
            if not value.is_cpu:
                return f"needs CPU tensors, got {value.device}"
        elif isinstance(value, (list, tuple)) and (reason := refuse_elsewhere(tier, value)) is not None:
            return reason
    return None
