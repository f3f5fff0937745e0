"""diffusers' LTX-2 attention and transformer block on the row ops, with its arguments, masks and processors as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_ltx2 as stock
from torch import Tensor

from ltxkern.ops.checks import ACTIVATION_DTYPES
from ltxkern.ops.gated_residual import gated_residual, head_gate
from ltxkern.ops.qk_norm_rope import qk_norm_rope
from ltxkern.ops.rms_norm_modulate import (
    gated_residual_rms_norm_modulate,
    gated_residual_rms_norm_modulate_twice,
    rms_norm_modulate,
)
from ltxkern.patching import separate
from ltxkern.patching.products import is_plain, joins, product_gelu
from ltxkern.patching.report import Site
from ltxkern.patching.rules import FusionPolicy
from ltxkern.patching.watch import Fused, Group, stands


class Modulation(NamedTuple):
    """Modulation parameters: (B, 1 or T, n * D), or with `rows` (B, T) a row (N, n * D) for each distinct timestep."""

    table: Tensor
    rows: Tensor | None = None

    def by_token(self) -> Tensor:
        """(B, 1 or T, n * D)."""
        return self.table if self.rows is None else self.table[self.rows]


@dataclass
class Held:
    """The sites of an attention or a block, each by the child it stands at and its op; `policy` checks them, where it is exact."""

    sites: dict[tuple[str, str], Site]
    group: Group
    policy: FusionPolicy | None = None


# Each op, and what stands in its place where the patch may not use it.
OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "rms_norm_modulate": (rms_norm_modulate, separate.norm),
    "gated_residual": (gated_residual, separate.residual),
    "gated_residual_rms_norm_modulate": (gated_residual_rms_norm_modulate, separate.residual_norm),
    "gated_residual_rms_norm_modulate_twice": (gated_residual_rms_norm_modulate_twice, separate.residual_norms),
    "head_gate": (head_gate, separate.head_gate),
}


def _run(held: Held, child: str, op: str, x: Tensor, *args: Tensor, **keywords: Any) -> Any:
    fused, composed = OPS[op]
    site = held.sites.get((child, op))
    policy = held.policy
    traced = policy is not None and torch.compiler.is_compiling()
    if site is None or traced or x.dtype not in ACTIVATION_DTYPES or any(value.dtype != x.dtype for value in args):
        if site is not None:
            site.compose()
        return composed(x, *args, **keywords)
    if policy is not None and not policy.proven(fused, (x, *args), keywords):
        site.compose()
        return policy.checked(fused, composed, (x, *args), keywords)
    return site.serve(x, lambda x: fused(x, *args, **keywords))


def _autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _composed(held: Held) -> None:
    for site in held.sites.values():
        site.compose()


class FusedAttention(Fused):
    """LTX2Attention: q and k normalised and rotated in one op, the heads' gate in another."""

    _ltxkern: Held

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Any = None,
        **others: Any,
    ) -> Tensor:
        """As the stock one; a processor of somebody else has the call."""
        given = (hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb)
        if not stands(self):
            others |= {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
            return type(self).forward(self, *given, **{k: v for k, v in others.items() if v is not None})
        kind = type(self.processor)
        perturbs = kind is stock.LTX2PerturbedAttnProcessor
        if not (perturbs or kind is stock.LTX2AudioVideoAttnProcessor) or others or _autocast(hidden_states):
            _composed(self._ltxkern)
            if perturbation_mask is not None or all_perturbed is not None:
                others |= {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
            return super().forward(*given, **others)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = self.prepare_attention_mask(attention_mask, source.shape[1], source.shape[0])
            attention_mask = attention_mask.view(source.shape[0], self.heads, -1, attention_mask.shape[-1])
        logits = None if self.to_gate_logits is None else self.to_gate_logits(hidden_states)
        value = self.to_v(source)
        if not perturbs:
            perturbation_mask, all_perturbed = None, False
        elif all_perturbed is None:
            all_perturbed = False if perturbation_mask is None else torch.all(perturbation_mask == 0)
        result = value
        if not all_perturbed:
            query, key = _rotated(self, self.to_q(hidden_states), self.to_k(source), query_rotary_emb, key_rotary_emb)
            result = dispatch_attention_fn(
                *(part.unflatten(2, (self.heads, -1)) for part in (query, key, value)),
                attn_mask=attention_mask,
                dropout_p=0.0,
                is_causal=False,
                backend=self.processor._attention_backend,
                parallel_config=self.processor._parallel_config,
            )
            result = result.flatten(2, 3).to(query.dtype)
            if perturbation_mask is not None:
                result = torch.lerp(value, result, perturbation_mask)
        if logits is not None:
            result = _run(self._ltxkern, "to_gate_logits", "head_gate", result.unflatten(2, (self.heads, -1)), logits)
            result = result.flatten(2, 3)
        for layer in self.to_out:
            result = layer(result)
        return result


def _rotated(
    attention: Any,
    query: Tensor,
    key: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    key_tables: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, normalised, and rotated where there are tables."""
    first, second = attention.norm_q, attention.norm_k
    site = attention._ltxkern.sites.get(("norm_q", "qk_norm_rope"))
    # A norm that offloading has got hold of since the patch has its weight only within its own call.
    apart = site is None or "forward" in vars(first) or "forward" in vars(second)
    if tables is None:
        return first(query), second(key)
    if apart or query.dtype not in ACTIVATION_DTYPES or key.dtype != query.dtype or first.eps is None:
        if site is not None:
            site.compose()
        split = attention.rope_type == "split"
        rotate = stock.apply_split_rotary_emb if split else stock.apply_interleaved_rotary_emb
        return rotate(first(query), tables), rotate(second(key), tables if key_tables is None else key_tables)
    cos, sin = (_by_head(table, attention) for table in tables)
    k_cos, k_sin = (None, None) if key_tables is None else (_by_head(table, attention) for table in key_tables)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        weights, how = (first.weight, second.weight), {"eps": first.eps, "layout": attention.rope_type}
        return qk_norm_rope(x, key, *weights, cos, sin, k_cos=k_cos, k_sin=k_sin, **how)

    rotated: tuple[Tensor, Tensor] = site.serve(query, call)
    return rotated


def _by_head(table: Tensor, attention: Any) -> Tensor:
    """(B, heads, T, d / 2), a view: interleaved tables come as (B, T, heads * d), each number twice."""
    if table.dim() == 4:
        return table
    return table[..., ::2].unflatten(-1, (attention.heads, -1)).transpose(1, 2)


class FusedBlock(Fused):
    """LTX2VideoTransformerBlock: norms, modulations and gated residuals in one op each."""

    _ltxkern: Held

    def forward(
        self: Any,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        temb: Tensor | Modulation,
        temb_audio: Tensor | Modulation,
        temb_ca_scale_shift: Tensor | Modulation,
        temb_ca_audio_scale_shift: Tensor | Modulation,
        temb_ca_gate: Tensor | Modulation,
        temb_ca_audio_gate: Tensor | Modulation,
        temb_prompt: Tensor | None = None,
        temb_prompt_audio: Tensor | None = None,
        video_rotary_emb: tuple[Tensor, Tensor] | None = None,
        audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ca_video_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ca_audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        audio_encoder_attention_mask: Tensor | None = None,
        self_attention_mask: Tensor | None = None,
        audio_self_attention_mask: Tensor | None = None,
        a2v_cross_attention_mask: Tensor | None = None,
        v2a_cross_attention_mask: Tensor | None = None,
        use_a2v_cross_attention: bool = True,
        use_v2a_cross_attention: bool = True,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """As the stock one; modulation may also come by rows."""
        x, y = hidden_states, audio_hidden_states
        base, audio_base, cross, audio_cross, gate, audio_gate = (
            value if isinstance(value, Modulation) else Modulation(value)
            for value in (
                temb,
                temb_audio,
                temb_ca_scale_shift,
                temb_ca_audio_scale_shift,
                temb_ca_gate,
                temb_ca_audio_gate,
            )
        )
        if not stands(self) or not _row_ops_take(self, x, y, base.table, audio_base.table):
            if stands(self):
                _composed(self._ltxkern)
            forward = super().forward if stands(self) else type(self).forward.__get__(self)
            modulations = (value.by_token() for value in (base, audio_base, cross, audio_cross, gate, audio_gate))
            ropes = video_rotary_emb, audio_rotary_emb, ca_video_rotary_emb, ca_audio_rotary_emb
            masks: tuple[Any, ...] = encoder_attention_mask, audio_encoder_attention_mask
            masks += self_attention_mask, audio_self_attention_mask
            masks += a2v_cross_attention_mask, v2a_cross_attention_mask
            flags = use_a2v_cross_attention, use_v2a_cross_attention
            texts = encoder_hidden_states, audio_encoder_hidden_states
            prompts = temb_prompt, temb_prompt_audio
            others = *prompts, *ropes, *masks, *flags, perturbation_mask, all_perturbed
            return forward(x, y, *texts, *modulations, *others)
        perturbed = (
            {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed} if self.perturbed_attn else {}
        )
        own = {"query_rotary_emb": video_rotary_emb, "attention_mask": self_attention_mask, **perturbed}
        text = (encoder_hidden_states, encoder_attention_mask, temb_prompt)
        video = _Stream(self, _VIDEO, x, base, cross, gate, ca_video_rotary_emb)
        audio = _Stream(self, _AUDIO, y, audio_base, audio_cross, audio_gate, ca_audio_rotary_emb)
        _attentions(video, own, text, self.video_cross_attn_adaln)
        own = {"query_rotary_emb": audio_rotary_emb, "attention_mask": audio_self_attention_mask, **perturbed}
        text = (audio_encoder_hidden_states, audio_encoder_attention_mask, temb_prompt_audio)
        _attentions(audio, own, text, self.audio_cross_attn_adaln)
        if use_a2v_cross_attention or use_v2a_cross_attention:
            # Both directions read the states before either is added.
            seen, heard = _cross_norms(video), _cross_norms(audio)
            if use_a2v_cross_attention:
                _from_other("audio_to_video_attn", video, audio, seen[0], heard[0], a2v_cross_attention_mask)
            if use_v2a_cross_attention:
                _from_other("video_to_audio_attn", audio, video, heard[1], seen[1], v2a_cross_attention_mask)
        return _feed_forward(video), _feed_forward(audio)


class _Names(NamedTuple):
    """A modality's children."""

    prefix: str
    cross_norm: str
    cross_table: str


_VIDEO = _Names("", "audio_to_video_norm", "video_a2v_cross_attn_scale_shift_table")
_AUDIO = _Names("audio_", "video_to_audio_norm", "audio_a2v_cross_attn_scale_shift_table")


def _row_ops_take(block: Any, *tensors: Tensor) -> bool:
    """Of one dtype, so that nothing is promoted."""
    dtype = block.scale_shift_table.dtype
    return dtype in ACTIVATION_DTYPES and all(t.dtype == dtype for t in tensors) and not _autocast(tensors[0])


def _parts(table: Tensor, modulation: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
    """Parts start..stop of `table (n, D) + modulation (..., n * D)`, each (..., D)."""
    width = table.shape[1]
    part = modulation[..., start * width : stop * width].unflatten(-1, (stop - start, width))
    return (table[start:stop] + part).unbind(-2)


class _Branch(NamedTuple):
    """What is to be added to a state with the pass that next goes over it."""

    update: Tensor
    gate: Tensor
    rows: Tensor | None


@dataclass(eq=False)
class _Stream:
    """A modality on its way through a block."""

    block: Any
    names: _Names
    x: Tensor
    base: Modulation
    cross: Modulation
    gate: Modulation
    rope: tuple[Tensor, Tensor] | None
    branch: _Branch | None = None

    def parts(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Parts of the block's own modulation."""
        return _parts(getattr(self.block, f"{self.names.prefix}scale_shift_table"), self.base.table, start, stop)

    def add(self, update: Tensor, gate: Tensor, rows: Tensor | None) -> None:
        """Have `update gate` added by the next pass."""
        self.branch = _Branch(update, gate, rows)

    def norms(self, child: str, eps: float, rows: Tensor | None, *modulation: Tensor) -> tuple[Tensor, ...]:
        """Add what is to be added; the norm of the sum by each scale and shift."""
        held = self.block._ltxkern
        if self.branch is None:
            return (_run(held, child, "rms_norm_modulate", self.x, *modulation, eps=eps, rows=rows),)
        op = "gated_residual_rms_norm_modulate" + ("_twice" if len(modulation) == 4 else "")
        (update, gate, own), self.branch = self.branch, None
        if own is not rows:
            gate, rows, modulation = _by_token(own, gate)[0], None, _by_token(rows, *modulation)
        self.x, *normed = _run(held, child, op, self.x, update, gate, *modulation, eps=eps, rows=rows)
        return tuple(normed)


def _by_token(rows: Tensor | None, *tables: Tensor) -> tuple[Tensor, ...]:
    return tables if rows is None else tuple(table[rows] for table in tables)


def _attentions(stream: _Stream, own: dict[str, Any], text: Any, modulates: bool) -> None:
    """Self-attention, then attention to the text, whose queries are modulated or not."""
    block, rows, prefix = stream.block, stream.base.rows, stream.names.prefix
    first, second = (f"{prefix}norm{number}" for number in (1, 2))
    shift, scale, gate = stream.parts(0, 3)
    (normed,) = stream.norms(first, getattr(block, first).eps, rows, scale, shift)
    stream.add(getattr(block, f"{prefix}attn1")(normed, encoder_hidden_states=None, **own), gate, rows)
    context, mask, prompt = text
    if block.cross_attn_adaln:
        context = _modulated_context(getattr(block, f"{prefix}prompt_scale_shift_table"), context, prompt)
    if modulates:
        shift, scale, gate = stream.parts(6, 9)
    else:
        shift = scale = torch.zeros_like(gate)
        gate = torch.ones_like(gate)
    (queries,) = stream.norms(second, getattr(block, second).eps, rows, scale, shift)
    attention = getattr(block, f"{prefix}attn2")
    update = attention(queries, encoder_hidden_states=context, query_rotary_emb=None, attention_mask=mask)
    stream.add(update, gate, rows)


def _modulated_context(table: Tensor, context: Tensor, prompt: Tensor | None) -> Tensor:
    if prompt is None:
        shift, scale = table[None, None].to(context).unbind(2)
    else:
        shift, scale = _parts(table, prompt, 0, 2)
    return context * (1 + scale) + shift


def _cross_norms(stream: _Stream) -> tuple[Tensor, ...]:
    """A state modulated for each direction of the attention between modalities: into video, into audio."""
    child, (modulation, rows) = stream.names.cross_norm, stream.cross
    parts = _parts(getattr(stream.block, stream.names.cross_table), modulation, 0, 4)
    return stream.norms(child, getattr(stream.block, child).eps, rows, *parts)


def _from_other(child: str, own: _Stream, other: _Stream, queries: Tensor, keys: Tensor, mask: Tensor | None) -> None:
    """What a modality's attention to the other one adds to it."""
    update = getattr(own.block, child)(
        queries,
        encoder_hidden_states=keys,
        query_rotary_emb=own.rope,
        key_rotary_emb=other.rope,
        attention_mask=mask,
    )
    own.add(update, getattr(own.block, own.names.cross_table)[4] + own.gate.table, own.gate.rows)


def _feed_forward(stream: _Stream) -> Tensor:
    block, rows, child = stream.block, stream.base.rows, f"{stream.names.prefix}ff"
    shift, scale, gate = stream.parts(3, 6)
    norm = f"{stream.names.prefix}norm3"
    (normed,) = stream.norms(norm, getattr(block, norm).eps, rows, scale, shift)
    network, site = getattr(block, child), block._ltxkern.sites.get((child, "linear_gelu"))
    if site is not None and joins(normed) and is_plain(network, normed.dtype):
        site.count(normed, None)
        first, last = network.net[0].proj, network.net[2]
        update = last(product_gelu(normed, first.weight, first.bias))
    else:
        if site is not None:
            site.compose()
        update = network(normed)
    x: Tensor = _run(block._ltxkern, child, "gated_residual", stream.x, update, gate, rows=rows)
    return x
