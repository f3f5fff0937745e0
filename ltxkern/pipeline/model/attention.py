"""Attention of the LTX-2.3 block with its fused neighbours: q/k norm and RoPE before, the per-head gate after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ltxkern.ops.qk_norm_rope import RotaryTables
from ltxkern.pipeline.model.attention_choice import softmax_attention
from ltxkern.pipeline.model.fusions import head_gate, linear, rotated, weighted_norm

if TYPE_CHECKING:
    from ltxkern.pipeline.parallel.by_token import TokenShards


def kept_update(x: Tensor, flags: tuple[bool, ...], instead: Tensor | None = None) -> Tensor:
    """The result of an attention, which is the caller's, made zero, or `instead`, for the branches that leave it out."""
    if not all(flags):
        branches = x.unflatten(0, (len(flags), -1))
        others = None if instead is None else instead.unflatten(0, (len(flags), -1))
        for branch, flag in enumerate(flags):
            if not flag:
                branches[branch].zero_() if others is None else branches[branch].copy_(others[branch])
    return x


def text_keys_and_values(attention: Any, context: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised keys, and values, of an attention without rotation; both (B, L, D)."""
    norm = attention.norm_k
    return weighted_norm(linear(attention.to_k, context), norm.weight, norm.eps), linear(attention.to_v, context)


def attend_to_text(attention: Any, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of (B, T, D) to keys and values that `text_keys_and_values` has made."""
    norm = attention.norm_q
    query = weighted_norm(linear(attention.to_q, x), norm.weight, norm.eps)
    return _gated(attention, x, _softmax(attention, query, key, value, None, False))


def attend(
    attention: Any,
    x: Tensor,
    context: Tensor | None = None,
    *,
    rope: RotaryTables | None = None,
    context_rope: RotaryTables | None = None,
    keep: tuple[bool, ...] = (True,),
    shards: TokenShards | None = None,
) -> Tensor:
    """`to_out(gate(softmax(q k^T / sqrt(d)) v))` with q, k normalised over all heads and rotated.

    Args:
        attention: diffusers' LTX2Attention: its projections, norms and gate.
        x: (B, T, D) queries; the gate's logits come from it.
        context: (B, L, Dc) keys and values; None for self-attention.
        rope: split tables of the queries; None for no rotation.
        context_rope: tables of the keys, where they differ, in the same form.
        keep: one flag for every branch of the batch; False puts its values in the place of the attention result (self-attention
            that is left out).
        shards: where keys and values are video tokens shared out over ranks; the queries then are this rank's tokens too in
            self-attention, and whole elsewhere.
    Returns:
        (B, T, D).
    """
    source = x if context is None else context
    value = linear(attention.to_v, source)
    result = value
    if any(keep):
        query, key = _queries_and_keys(attention, x, source, rope, context_rope)
        result = kept_update(_softmax(attention, query, key, value, shards, context is None), keep, value)
    return _gated(attention, x, result)


def _softmax(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, shards: TokenShards | None, is_self: bool
) -> Tensor:
    q, k, v = (tensor.unflatten(2, (attention.heads, -1)) for tensor in (query, key, value))
    if shards is None:
        result = softmax_attention(q, k, v)
    elif is_self:
        result = shards.self_attention(q, k, v, softmax_attention)
    else:
        result = shards.attention_from_outside(q, k, v, softmax_attention)
    return result.flatten(2, 3).to(query.dtype)


def _gated(attention: Any, x: Tensor, result: Tensor) -> Tensor:
    if attention.to_gate_logits is not None:
        result = head_gate(result.unflatten(2, (attention.heads, -1)), linear(attention.to_gate_logits, x)).flatten(
            2, 3
        )
    return linear(attention.to_out[0], result)


def _queries_and_keys(
    attention: Any, x: Tensor, source: Tensor, rope: RotaryTables | None, context_rope: RotaryTables | None
) -> tuple[Tensor, Tensor]:
    query, key = linear(attention.to_q, x), linear(attention.to_k, source)
    first, second = attention.norm_q, attention.norm_k
    if rope is None:
        return first(query), second(key)
    return rotated(query, key, first.weight, second.weight, first.eps, attention.heads, rope, context_rope)
