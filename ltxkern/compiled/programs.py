"""Plans by case, and the stand-ins for outputs that do not lie as the kernels write them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ltxkern.backend import Backend
from ltxkern.compiled import extension
from ltxkern.compiled.steps import Call, Step
from ltxkern.compiled.tensors import refuse_device

TIERS = ("cuda", "nvrtc", "cpu")
# Threads of a block of the elementwise kernels.
THREADS = 256


@functools.lru_cache(maxsize=4096)
def planned(tier: str, steps: Callable[[Any], Sequence[Step | Call]], case: Any, arguments: int) -> Callable[..., None]:
    """The plan of one case, made once: `steps(case)` are calls for the tier "cpu", launches for the others."""
    made = steps(case)
    if tier == "cpu":
        return extension.cpu_plan([step for step in made if isinstance(step, Call)], arguments)
    return extension.plan_builder(tier)([step for step in made if not isinstance(step, Call)], arguments)


def dense(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, or contiguous stand-ins for those that are not."""
    return [o if o.is_contiguous() else torch.empty(o.shape, dtype=o.dtype, device=o.device) for o in outputs]


def hand_back(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies stand-ins to the outputs that they stand for."""
    for out, target in zip(outputs, targets, strict=True):
        if target is not out:
            out.copy_(target)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a dense copy of it."""
    return None if tensor is None else tensor.contiguous()


def refuse_elsewhere(tier: str, args: Sequence[Any]) -> str | None:
    """Why a tier cannot serve tensors where these lie, or None."""
    for value in args:
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(tensor, Tensor):
                continue
            if tier != "cpu":
                return refuse_device(tensor)
            if not tensor.is_cpu:
                return f"needs CPU tensors, got {tensor.device}"
    return None


def backends(run: Callable[..., None], *details: Any, refuse: Callable[..., str | None] | None = None) -> list[Backend]:
    """Entries of the compiled tiers: `run(tier, *details, out, *args)`, refused first by device, then by `refuse(*args)`."""

    def backend(tier: str) -> Backend:
        def reason(*args: Any) -> str | None:
            return refuse_elsewhere(tier, args) or (refuse(*args) if refuse else None)

        return Backend(tier, reason, lambda: functools.partial(run, tier, *details))

    return [backend(tier) for tier in TIERS]
