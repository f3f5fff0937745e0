"""The Triton tier, one file per op; triton itself is imported when a kernel is first used."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("ltxkern")

LEAST_CAPABILITY = (8, 0)
# Where a kernel of Triton's compiles itself; no public name leads there.
COMPILE = "_do_compile"


def load(stem: str, entry: str) -> Callable[..., None]:
    """The launcher `ltxkern.triton.<stem>.<entry>`; Triton launches on the current device: that is made the tensors' own."""
    module = importlib.import_module(f"ltxkern.triton.{stem}")
    launch = getattr(module, entry)
    if not interpreted():
        _compile_outside_captures(module)

    @functools.wraps(launch)
    def on_its_device(*args: Any) -> None:
        tensor = _first_tensor(args)
        if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
            launch(*args)
        else:
            with torch.cuda.device(tensor.device):
                launch(*args)

    return on_its_device


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors; it looks as it decorates them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _compile_outside_captures(module: ModuleType) -> None:
    """A module's kernels refuse to be compiled, and so to be loaded, while a CUDA graph is captured."""
    from triton.runtime.jit import JITFunction

    if not callable(getattr(JITFunction, COMPILE, None)):
        _warn_of_captures()
        return

    def guarded(kernel: Any) -> Callable[..., Any]:
        def compile_kernel(*args: Any, **named: Any) -> Any:
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{kernel.__module__}.{kernel.__name__} is not compiled yet for such a call, and a CUDA graph capture is no "
                    "time to compile and load it: make the same call once before the capture"
                )
            return getattr(type(kernel), COMPILE)(kernel, *args, **named)

        return compile_kernel

    for kernel in vars(module).values():
        # Triton asks for it where a call finds no kernel compiled for its dtypes, alignments and constants.
        if isinstance(kernel, JITFunction):
            setattr(kernel, COMPILE, guarded(kernel))


@functools.cache
def _warn_of_captures() -> None:
    """Once a process."""
    import triton

    logger.warning(
        "Triton %s has no JITFunction.%s, so that a Triton kernel's first call within a CUDA graph capture is not refused and may "
        "break the capture: make every call once before it",
        *(triton.__version__, COMPILE),
    )


def refuse_elsewhere(args: tuple[Any, ...]) -> str | None:
    """Why the tier cannot serve tensors where these lie, or None."""
    tensor = _first_tensor(args)
    if tensor.is_cuda:
        return _refuse_capability(tensor.device.index)
    if interpreted() and tensor.device.type == "cpu":
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
