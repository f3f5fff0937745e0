"""The Triton backend, one file per op; triton itself is imported when a kernel is first used."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltxkern.backend import Backend

LEAST_CAPABILITY = (8, 0)


def triton_backend(stem: str, refuse: Callable[..., str | None], entry: str = "launch") -> Backend:
    """The "triton" entry of an op: `ltxkern.triton.<stem>.<entry>(out, *args)`, refused first by device, then by `refuse`."""

    def refuse_call(*args: Any) -> str | None:
        return _device_refusal(_first_tensor(args)) or refuse(*args)

    def load() -> Callable[..., None]:
        return _on_its_device(getattr(importlib.import_module(f"ltxkern.triton.{stem}"), entry))

    return Backend("triton", refuse_call, load)


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    first = args[0]
    while not isinstance(first, Tensor):
        first = first[0]
    return first


def _device_refusal(tensor: Tensor) -> str | None:
    if tensor.is_cuda:
        return _capability_refusal(tensor.device.index)
    if os.environ.get("TRITON_INTERPRET") == "1" and tensor.device.type == "cpu":
        return None
    return f"triton serves CUDA tensors, got one on {tensor.device}"


@functools.cache
def _capability_refusal(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    return f"triton kernels need compute capability 8.0 or later, cuda:{index} has {capability[0]}.{capability[1]}"


def _on_its_device(launch: Callable[..., None]) -> Callable[..., None]:
    """Triton launches on the current device: make that the tensors' own where it is another."""

    @functools.wraps(launch)
    def guarded(*args: Any) -> None:
        tensor = _first_tensor(args)
        if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
            launch(*args)
        else:
            with torch.cuda.device(tensor.device):
                launch(*args)

    return guarded
