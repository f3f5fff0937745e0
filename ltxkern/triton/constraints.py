"""What each Triton kernel declines, in words; decided from the arguments alone, without importing triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltxkern.triton.layout import all_contiguous, channel_view, power_of_two, rows_of, unit_rows

MAX_CHANNELS = 1024
MAX_WIDTH = 16384
MAX_LORAS = 4


def _strided(name: str, value: Tensor) -> str:
    return f"{name} has strides {tuple(value.stride())}"


def _not_contiguous(tensors: dict[str, Tensor | None]) -> str | None:
    for name, value in tensors.items():
        if value is not None and not value.is_contiguous():
            return f"{_strided(name, value)}: the kernel takes contiguous tensors"
    return None


def _channel_layout(name: str, value: Tensor) -> str | None:
    if value.numel() == 0 or channel_view(value) is not None:
        return None
    return f"{_strided(name, value)}: the dims after the channels must collapse to one (contiguous or channels-last)"


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    residual: Tensor | None,
    conv_bias: Tensor | None,
) -> str | None:
    """Positions must collapse to one stride, in x and in the residual."""
    return _channel_layout("x", x) or (None if residual is None else _channel_layout("residual", residual))


def pixel_norm_silu(x: Tensor, eps: float, weight: Tensor | None) -> str | None:
    """Positions must collapse to one stride; all channels of a position stay in registers."""
    if x.shape[1] > MAX_CHANNELS:
        return f"x has {x.shape[1]} channels: the kernel keeps at most {MAX_CHANNELS} in registers"
    return _channel_layout("x", x)


def contiguous_slices(x: Tensor) -> str | None:
    """Noise and its like: contiguous, no slice without elements."""
    if x.shape[-1] * x.shape[-2] == 0 and x.shape[:-2].numel() > 0:
        return f"slices of x have no elements: shape {tuple(x.shape)}"
    return _not_contiguous({"x": x})


def combine_guidance(
    cond: Tensor, uncond: Tensor | None, perturbed: Tensor | None, isolated: Tensor | None, *scales: float
) -> str | None:
    """All branches contiguous."""
    return _not_contiguous({"cond": cond, "uncond": uncond, "perturbed": perturbed, "isolated": isolated})


def res2s_sde_step(
    sample: Tensor, denoised: Tensor, noise: Tensor, coefficients: Sequence[float], stats: Tensor | None
) -> str | None:
    """All tensors contiguous."""
    return _not_contiguous({"sample": sample, "denoised": denoised, "noise": noise, "noise_stats": stats})


def res2s_half_step(*args: Any) -> str | None:
    """All tensors of all modalities contiguous."""
    for value in args:
        if isinstance(value, (list, tuple)):
            for tensor in value:
                if isinstance(tensor, Tensor) and not tensor.is_contiguous():
                    return f"{_strided('a tensor of the half-step', tensor)}: the kernel takes contiguous tensors"
    return None


def merge_lora_(
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float],
    chunk_bytes: int,
    rounding: str,
    seed: int = 0,
) -> str | None:
    """One rounding; no fp64 or float8; at most four LoRAs; dense rows."""
    if rounding == "reference":
        return "reference rounding must be bit-equal to torch's own matrix product, whose order of sums the kernel does not follow"
    if len(lora_a) > MAX_LORAS:
        return f"{len(lora_a)} LoRAs at once: the kernel merges at most {MAX_LORAS} with one rounding"
    if weight.dtype == torch.float8_e4m3fn:
        return "torch.float8_e4m3fn weight: the kernel rounds to fp16, bf16 or fp32"
    if any(tensor.dtype == torch.float64 for tensor in (weight, *lora_a, *lora_b)):
        return "torch.float64 weights or factors: the kernel accumulates in fp32"
    if not unit_rows(weight) or (weight.shape[0] > 1 and weight.stride(0) < weight.shape[1]):
        return f"{_strided('weight', weight)}: the kernel takes dense rows that do not overlap"
    if not all_contiguous([*lora_a, *lora_b]):
        return "lora_a or lora_b is not contiguous"
    return None


def dual_add(x: Tensor, first: Tensor, second: Tensor) -> str | None:
    """All tensors contiguous."""
    return _not_contiguous({"x": x, "first": first, "second": second})


def _rows(
    over_x: Sequence[Tensor], modulation: Sequence[Tensor], index: Tensor | None, *, dense: bool = True
) -> str | None:
    x = over_x[0]
    if x.numel() == 0 or x.dim() == 0:
        return None
    if not unit_rows(*over_x, *(modulation if dense else ())):
        return "the last dim of an operand is not dense"
    if rows_of(over_x, modulation, index) is None:
        return f"the leading dims of the operands do not collapse to two: x is {tuple(x.shape)} with {x.stride()}"
    return None


def dense_rows(x: Tensor, *operands: Tensor | float | None) -> str | None:
    """Dense rows of any width, leading dims that collapse to two; a weight of one dim is no operand of the rows."""
    tensors = [operand for operand in operands[:-1] if isinstance(operand, Tensor)]
    return _rows([x], tensors, None)


def rms_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor | None, rows: Tensor | None
) -> str | None:
    """Dense rows of bounded width, leading dims that collapse to two."""
    if x.shape[-1] > MAX_WIDTH:
        return f"rows of {x.shape[-1]}: the kernel keeps at most {MAX_WIDTH} in registers"
    return _rows([x], [scale, shift], rows)


def gated_residual_rms_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    weight: Tensor | None,
    rows: Tensor | None,
) -> str | None:
    """Dense rows of bounded width, leading dims that collapse to two."""
    if x.shape[-1] > MAX_WIDTH:
        return f"rows of {x.shape[-1]}: the kernel keeps at most {MAX_WIDTH} in registers"
    return _rows([x, y], [gate, scale, shift], rows)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> str | None:
    """Dense rows in x and y, leading dims that collapse to two."""
    return _rows([x, y], [gate], rows, dense=False)


def head_gate(x: Tensor, logits: Tensor) -> str | None:
    """Dense heads, leading dims that collapse to two."""
    return _rows([x], [logits[..., None]], None, dense=False)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    layout: str,
) -> str | None:
    """Dense tokens of bounded width, an even head size, tables of one layout."""
    padded = 2 * power_of_two(cos.shape[1]) * power_of_two(cos.shape[3])
    if padded > MAX_WIDTH:
        return f"tokens of {q.shape[-1]}: the kernel keeps at most {MAX_WIDTH} padded elements in registers, needs {padded}"
    return dense_tokens(q, k, q_weight, k_weight, cos, sin, eps, layout)


def dense_tokens(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    layout: str,
) -> str | None:
    """Dense tokens of any width, tables of one layout."""
    if not unit_rows(q, k):
        return "the last dim of q or k is not dense"
    if cos.stride() != sin.stride():
        return f"cos and sin have strides {cos.stride()} and {sin.stride()}: the kernel takes tables of one layout"
    return None
