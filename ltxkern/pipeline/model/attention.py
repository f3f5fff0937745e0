"""Attention of the LTX-2.3 block with its fused neighbours: q/k norm and RoPE before, the per-head gate after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ltxkern.ops.gated_residual import head_gate
from ltxkern.ops.qk_norm_rope import RotaryTables, qk_norm_rope
from ltxkern.pipeline.model.attention_choice import softmax_attention

if TYPE_CHECKING:
    from ltxkern.pipeline.parallel.by_token import TokenShards

Keep = bool | Tensor


def attend(
    attention: Any,
    x: Tensor,
    context: Tensor | None = None,
    *,
    rope: RotaryTables | None = None,
    context_rope: RotaryTables | None = None,
    keep: Keep = True,
    shards: TokenShards | None = None,
) -> Tensor:
    """`to_out(gate(softmax(q k^T / sqrt(d)) v))` with q, k normalised over all heads and rotated.

    Args:
        attention: diffusers' LTX2Attention: its projections, norms and gate.
        x: (B, T, D) queries; the gate's logits come from it.
        context: (B, L, Dc) keys and values; None for self-attention.
        rope: split tables of the queries; None for text attention.
        context_rope: tables of the keys, where they differ, in the same form.
        keep: False puts the values in the place of the attention result (self-attention that is left out); a (B, 1, 1)
            tensor of 0 and 1 does so for some items of the batch.
        shards: where keys and values are video tokens shared out over ranks; the queries then are this rank's tokens too in
            self-attention, and whole elsewhere.
    Returns:
        (B, T, D).
    """
    source = x if context is None else context
    value = attention.to_v(source)
    result = value
    if keep is not False:
        query, key = _queries_and_keys(attention, x, source, rope, context_rope)
        q, k, v = (tensor.unflatten(2, (attention.heads, -1)) for tensor in (query, key, value))
        if shards is None:
            result = softmax_attention(q, k, v)
        elif context is None:
            result = shards.self_attention(q, k, v, softmax_attention)
        else:
            result = shards.attention_from_outside(q, k, v, softmax_attention)
        result = result.flatten(2, 3).to(query.dtype)
    if isinstance(keep, Tensor):
        result = result * keep + value * (1 - keep)
    if attention.to_gate_logits is not None:
        result = head_gate(result.unflatten(2, (attention.heads, -1)), attention.to_gate_logits(x)).flatten(2, 3)
    return attention.to_out[0](result)


def _queries_and_keys(
    attention: Any, x: Tensor, source: Tensor, rope: RotaryTables | None, context_rope: RotaryTables | None
) -> tuple[Tensor, Tensor]:
    query, key = attention.to_q(x), attention.to_k(source)
    first, second = attention.norm_q, attention.norm_k
    if rope is None:
        return first(query), second(key)
    k_cos, k_sin, k_rows = context_rope or (None, None, None)
    return qk_norm_rope(
        query,
        key,
        first.weight,
        second.weight,
        rope.cos,
        rope.sin,
        eps=first.eps,
        rows=rope.rows,
        heads=None if rope.rows is None else attention.heads,
        k_cos=k_cos,
        k_sin=k_sin,
        k_rows=k_rows,
    )
