"""The product of a linear layer: by oneDNN where that multiplies quicker than what torch has on the processor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxkern.ops.checks import unplain


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` by oneDNN; `product_apart` has torch's own."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


product_apart = F.linear


@functools.cache
def onednn_quicker() -> bool:
    """Whether fp32 products are oneDNN's on this processor.

    torch's are MKL's, which reached half of oneDNN's rate on an AMD EPYC with 512-bit instructions (108 and 191 GFLOP/s at
    256 x 4096 x 4096 on two cores) and is written for Intel's. oneDNN's are up to 2.1 times as far from fp64 there: 4.1e-7 of the
    result's norm, where MKL's are at 2.0e-7 for many rows and at 4.1e-7 for one.
    """
    built = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return built and torch.backends.cpu.get_cpu_capability() == "AVX512" and _maker() == "AuthenticAMD"


def _maker() -> str:
    """Of the processor, as Linux has it; empty where it is not known."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")), "")


def serves(layer: Any, x: Tensor) -> bool:
    """Whether `product` stands for a call of the layer: a linear one without anything around it, and nothing that traces."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if x.dtype != torch.float32 or x.device.type != "cpu" or not onednn_quicker():
        return False
    if type(layer) is not nn.Linear or unplain(layer):
        return False
    # Of operands with gaps oneDNN multiplies by plain loops.
    return layer.weight.dtype == x.dtype and layer.weight.is_contiguous() and x.is_contiguous()


def linear(layer: Any, x: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = product) -> Tensor:
    """The layer's result for x (..., D).

    Args:
        product: where it serves.
    """
    return product(x, layer.weight, layer.bias) if serves(layer, x) else layer(x)
