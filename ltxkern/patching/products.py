"""Products of linear layers by what multiplies quicker on the device, and diffusers' FeedForward with GELU within its first one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ltxkern.ops.checks import unplain
from ltxkern.registration import transforming
from ltxkern.trust.machine import processor_fields

# Of a row. oneDNN's call takes 10 us more (AMD EPYC, two cores): at 256 it is slower for few rows and no quicker for many, at 1024
# 1.3 times as quick.
LEAST_WIDTH = 1024
ERROR_RATIO = 1.5  # of the product with GELU, in distance from fp64, to product and GELU apart


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` by oneDNN; `product_apart` has torch's own."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


product_apart = F.linear


@functools.cache
def onednn_quicker() -> bool:
    """Whether fp32 products are oneDNN's on this processor.

    torch's are MKL's, which reached half of oneDNN's rate on an AMD EPYC with 512-bit instructions (108 and 191 GFLOP/s at
    256 x 4096 x 4096 on two cores) and is written for Intel's. oneDNN's are further from fp64 there, up to 2.1 times by the norm
    and 2.7 times by the largest error (nearer for one row), and a forward of production width 1.2 to 1.3 times in video and 1.6 to
    1.7 times in sound: bench/product_errors.py.
    """
    built = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return (
        built
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and processor_fields().get("vendor_id") == "AuthenticAMD"
    )


def _untouched(device: torch.device) -> bool:
    """Whether nothing traces, differentiates, transforms or casts products on the device, and oneDNN is not turned off."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or transforming():
        return False
    if device.type == "cpu" and not torch.backends.mkldnn.enabled:
        return False
    return device.type == "meta" or not torch.is_autocast_enabled(device.type)


def _is_wide(x: Tensor) -> bool:
    return x.dim() > 0 and x.shape[-1] >= LEAST_WIDTH


def serves(layer: Any, x: Tensor) -> bool:
    """Whether `product` stands for a call of the layer: a linear one without anything around it, and nothing that traces."""
    if (
        x.dtype != torch.float32
        or x.device.type != "cpu"
        or not _is_wide(x)
        or not _untouched(x.device)
        or not onednn_quicker()
    ):
        return False
    if type(layer) is not nn.Linear or unplain(layer) or x.shape[-1:] != layer.weight.shape[1:]:
        return False
    weight, bias = layer.weight, layer.bias
    alike = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    return alike and x.is_contiguous() and _are_dense(weight, bias)


def _are_dense(weight: Tensor, bias: Tensor | None) -> bool:
    """oneDNN takes a bias to be dense, and multiplies weights with gaps by plain loops."""
    return weight.is_contiguous() and (bias is None or bias.is_contiguous())


def linear(layer: Any, x: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = product) -> Tensor:
    """The layer's result for x (..., D).

    Args:
        product: where it serves.
    """
    return product(x, layer.weight, layer.bias) if serves(layer, x) else layer(x)


def product_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x weight^T + bias)` by one launch."""
    joined = _of_onednn if x.device.type == "cpu" else _of_torch
    return joined(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def _of_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def _of_onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What torch has for a CPU itself is the GELU of the error function. Of operands with gaps oneDNN multiplies by plain loops."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "gelu", [], "tanh")


def product_gelu_apart(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same by two, the second in place."""
    hidden = F.linear(x, weight, bias)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.gelu(hidden, approximate="tanh")
    return torch.ops.aten.gelu_(hidden, approximate="tanh")


@functools.cache
def gelu_serves(device: torch.device, dtype: torch.dtype, quicker: bool = False) -> bool:
    """Whether this device's product with GELU is tanh GELU, within the contract; some have the one of the error function.

    Args:
        quicker: fp32 products may be oneDNN's where it is quicker, whatever `onednn_quicker` says of their errors.
    """
    if device.type == "meta":
        return True
    if device.type == "cpu" and not (
        _onednn_multiplies(dtype) or (quicker and dtype is torch.float32 and onednn_quicker())
    ):
        return False
    with _disable_current_modes(), torch.no_grad():
        # Around -3 the two differ by more than a 16-bit product is off, which they do not elsewhere.
        return all(_gelu_fits(device, dtype, *case) for case in ((1.0, 0.0), (0.05, -3.0)))


def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions for products of 16 bits. Those of fp32 are further from fp64 than torch's own."""
    probes = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    supported = getattr(torch.ops.mkldnn, probes.get(dtype, ""), None)
    return supported is not None and supported()


def _gelu_fits(device: torch.device, dtype: torch.dtype, spread: float, centre: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((64, 128), (512, 128)))
    x, weight, bias = x * spread, weight * 128**-0.5, torch.full((512,), centre).to(x)
    exact = product_gelu_apart(x.double(), weight.double(), bias.double())

    def error(result: Tensor) -> float:
        return float((result.double() - exact).norm())

    try:
        return error(product_gelu(x, weight, bias)) <= ERROR_RATIO * error(product_gelu_apart(x, weight, bias))
    except (AttributeError, RuntimeError):  # no oneDNN, or a dtype that the device has no product of
        return False


def is_plain(network: Any, dtype: torch.dtype) -> bool:
    """Whether a FeedForward is two products with tanh GELU and a bias in the first: no adapters, no hooks on the way."""
    if type(network).__name__ != "FeedForward" or len(network.net) != 3:
        return False
    parts = [*network.net]
    layer: Any = getattr(parts[0], "proj", None)
    if type(layer) is not nn.Linear or type(parts[0]).__name__ != "GELU" or parts[0].approximate != "tanh":
        return False
    weight, bias = layer.weight, layer.bias
    # Weights of another dtype, or of a tensor class of their own, are left to whoever put them there.
    if bias is None or network.training or not weight.dtype == bias.dtype == dtype:
        return False
    if weight.device.type == "cpu" and not _are_dense(weight, bias):
        return False
    return not (unplain(network, meta=True) or unplain(parts[0], meta=True) or unplain(layer, meta=True))


def joins(x: Tensor, quicker: bool = False) -> bool:
    """Whether a product with x can have its GELU within; `quicker` as in `gelu_serves`."""
    return _untouched(x.device) and gelu_serves(x.device, x.dtype, quicker and _is_wide(x))


def feed_forward(
    network: Any,
    x: Tensor,
    product: Callable[[Tensor, Tensor, Tensor], Tensor] = product_gelu,
    linear: Callable[[Any, Tensor], Tensor] | None = None,
) -> Tensor:
    """A FeedForward on (..., D).

    Args:
        product: serves where the first product can have its GELU within.
        linear: makes the second product, by whatever is quicker, as the first one then is; None: both are torch's, but for 16 bits.
    """
    if not is_plain(network, x.dtype):
        return network(x)
    layer, last = network.net[0].proj, network.net[2]
    if not joins(x, linear is not None):
        product = product_gelu_apart
    hidden = product(x, layer.weight, layer.bias)
    del x  # not read while the second product runs
    return last(hidden) if linear is None else linear(last, hidden)
