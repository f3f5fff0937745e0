"""The Triton tier, one file per op; triton itself is imported when a kernel is first used."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)


def load(stem: str, entry: str) -> Callable[..., None]:
    """The launcher `ltxkern.triton.<stem>.<entry>`; Triton launches on the current device: that is made the tensors' own."""
    launch = getattr(importlib.import_module(f"ltxkern.triton.{stem}"), entry)

    @functools.wraps(launch)
    def on_its_device(*args: Any) -> None:
        tensor = _first_tensor(args)
        if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
            launch(*args)
        else:
            with torch.cuda.device(tensor.device):
                launch(*args)

    return on_its_device


def refuse_elsewhere(args: tuple[Any, ...]) -> str | None:
    """Why the tier cannot serve tensors where these lie, or None."""
    tensor = _first_tensor(args)
    if tensor.is_cuda:
        return _refuse_capability(tensor.device.index)
    if os.environ.get("TRITON_INTERPRET") == "1" and tensor.device.type == "cpu":
        return None
    return f"triton serves CUDA tensors, got one on {tensor.device}"


def _first_tensor(args: Any) -> Tensor:
    first = args[0]
    while not isinstance(first, Tensor):
        first = first[0]
    return first


@functools.cache
def _refuse_capability(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    return f"triton kernels need compute capability 8.0 or later, cuda:{index} has {capability[0]}.{capability[1]}"
