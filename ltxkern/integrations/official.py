"""Lightricks' own LTX-2 transformer (`ltx_core`): the callables that its operation slots take, and `install` to fill them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxkern.integrations.routes import Left, Routes, modulates, rotates, same_kind
from ltxkern.ops.checks import is_plain
from ltxkern.ops.gated_residual import head_gate
from ltxkern.ops.qk_norm_rope import qk_norm_rope
from ltxkern.ops.rms_norm_modulate import gated_residual_rms_norm_modulate, rms_norm_modulate
from ltxkern.pipeline.model.attention_choice import softmax_attention

Rotary = tuple[Tensor, Tensor] | None


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` of (B, T, heads * d), by the attention kernel that is in force; with a mask torch's own."""
    q, k, v = (one.unflatten(-1, (heads, -1)) for one in (q, k, v))
    if mask is None:
        return softmax_attention(q, k, v).flatten(2, 3)
    mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim < 3 else mask.unsqueeze(1) if mask.ndim == 3 else mask
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    by_heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return by_heads.transpose(1, 2).flatten(2, 3)


def preattention(
    q: Tensor, k: Tensor, attn_module: nn.Module, mask: Tensor | None, pe: Rotary, k_pe: Rotary
) -> tuple[Tensor, Tensor]:
    """Norms and rotation of queries and keys by `qk_norm_rope`; what it does not serve by the module's own."""
    first: Any = attn_module.q_norm
    last: Any = attn_module.k_norm
    if _rotates(q, k, first, last, attn_module, pe, k_pe):
        assert pe is not None
        k_cos, k_sin = (None, None) if k_pe is None else k_pe
        return qk_norm_rope(q, k, first.weight, last.weight, *pe, eps=first.eps, k_cos=k_cos, k_sin=k_sin)
    q, k = first(q), last(k)
    if pe is not None:
        apply: Any = importlib.import_module("ltx_core.model.transformer.rope").apply_rotary_emb
        q = apply(q, pe, attn_module.rope_type)
        k = apply(k, pe if k_pe is None else k_pe, attn_module.rope_type)
    return q, k


def _rotates(q: Tensor, k: Tensor, first: Any, last: Any, module: Any, pe: Rotary, k_pe: Rotary) -> bool:
    if pe is None or getattr(module.rope_type, "value", None) != "split":
        return False
    for norm in (first, last):
        if (
            type(norm) is not nn.RMSNorm
            or not is_plain(norm)
            or norm.weight is None
            or norm.eps != first.eps
            or norm.eps is None
        ):
            return False
    return rotates((q, first.weight, *pe), (k, last.weight, *(pe if k_pe is None else k_pe)))


def gated_attention(x: Tensor, attn_out: Tensor, attn_module: nn.Module) -> Tensor:
    """`attn_out 2 sigmoid(to_gate_logits(x))` per head, by `head_gate`."""
    module: Any = attn_module
    logits = module.to_gate_logits(x)
    by_head = attn_out.unflatten(-1, (module.heads, -1))
    if same_kind(by_head, logits):
        return head_gate(by_head, logits).flatten(-2)
    return (by_head * (2.0 * torch.sigmoid(logits)).unsqueeze(-1)).flatten(-2)


def ada_zero(x: Tensor, eps: float, scale: Tensor, shift: Tensor) -> Tensor:
    """`rms_norm(x) (1 + scale) + shift`, by `rms_norm_modulate`."""
    if modulates(x, scale, shift):
        return rms_norm_modulate(x, scale, shift, eps=eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def post_sa(x: Tensor, y: Tensor, norm_weights: Tensor | None, eps: float, gate: Tensor) -> tuple[Tensor, Tensor]:
    """`x + y gate` and its norm in one pass, by `gated_residual_rms_norm_modulate`."""
    weights = () if norm_weights is None else (norm_weights,)
    if y.shape == x.shape and same_kind(x, y, *weights) and modulates(x, gate):
        none = x.new_zeros(x.shape[-1])
        return gated_residual_rms_norm_modulate(x, y, gate, none, none, eps=eps, weight=norm_weights)
    moved = x + y * gate
    return moved, F.rms_norm(moved, x.shape[-1:], norm_weights, eps)


class Operations(NamedTuple):
    """Arguments of `TransformerOpsConfig.from_functions`."""

    attention: Callable[..., Tensor] = attention
    preattention: Callable[..., tuple[Tensor, Tensor]] = preattention
    gated_attention: Callable[..., Tensor] = gated_attention
    ada_zero: Callable[..., Tensor] = ada_zero
    post_sa: Callable[..., tuple[Tensor, Tensor]] = post_sa


_OPS = {
    "attention": "pipeline's attention",
    "preattention": "qk_norm_rope",
    "gated_attention": "head_gate",
    "ada_zero": "rms_norm_modulate",
    "post_sa": "gated_residual_rms_norm_modulate",
}


def install(model: nn.Module, *, attention: bool = False) -> Routes:
    """Fill the operation slots of every block and attention of an `ltx_core` model.

    Args:
        model: an LTXModel, or what holds one.
        attention: also the slot of unmasked attention; False leaves the kernel that the model was built with.
    Returns:
        What was replaced, what was left with the reason, and the way back. A slot that holds another fused callable is left.
    Raises:
        ValueError: no module has such slots.

    Contract: rounded, as each op says; what an op does not serve takes the composition that stood there.
    Example:
        >>> routes = install(model)
        >>> print(routes)
    """
    routes, wanted = Routes(), [name for name in _OPS if attention or name != "attention"]
    for place, module in model.named_modules():
        for name in wanted:
            slot = f"{name}_function"
            held = vars(module).get(slot)
            if held is None:
                continue
            if not type(held).__name__.startswith(("Pytorch", "XFormers", "FlashAttention")):
                routes.left.append(
                    Left(f"{place}.{slot}", f"it holds {getattr(held, '__name__', type(held).__name__)}")
                )
                continue
            routes.put(module, slot, getattr(Operations(), name))
            routes.places[f"{place}.{slot}"] = _OPS[name]
    if not routes.places and not routes.left:
        raise ValueError(
            "model has no module with operation slots (ada_zero_function, post_sa_function, preattention_function): "
            "give an ltx_core transformer that has them"
        )
    return routes
