"""Argument checks shared by the ops: each raises one sentence that names the parameter, what was expected and what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SAMPLER_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object, *, dtypes: tuple[torch.dtype, ...] | None = None, min_dim: int = 0) -> None:
    """`value` is a tensor of an allowed dtype with at least `min_dim` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(str(d) for d in dtypes)}, got {value.dtype}")
    if value.dim() < min_dim:
        raise ValueError(f"{name} must have at least {min_dim} dimensions, got shape {tuple(value.shape)}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...] | torch.Size) -> None:
    """`value` has exactly this shape."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    """`value` lies on the same device as the op's first tensor."""
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def check_finite_number(name: str, value: float, *, low: float | None = None, high: float | None = None) -> None:
    """`value` is a finite real number within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # A comparison, where math.isfinite would break the graph of a compiled caller.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}: use {low}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}, got {value}: use {high}")


def check_out(
    out: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str = "out"
) -> None:
    """`out` can take a result of this shape, dtype and device."""
    check_tensor(name, out)
    check_shape(name, out, shape)
    check_device(name, out, device)
    if out.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {out.dtype}")
