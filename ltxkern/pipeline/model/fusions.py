"""How the transformer block runs: passes that join several ops, the policy that lets them serve, and sound beside video.

Each is named with the composition that it replaces: the ops of diffusers' block, every one with its own rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxkern.ops.gated_residual import gated_residual as fused_gated_residual
from ltxkern.ops.gated_residual import head_gate as fused_head_gate
from ltxkern.ops.qk_norm_rope import RotaryTables, qk_norm_rope
from ltxkern.ops.rms_norm_modulate import (
    gated_residual_rms_norm_modulate,
    gated_residual_rms_norm_modulate_twice,
    rms_norm_modulate,
)
from ltxkern.patching import products, separate
from ltxkern.patching.products import product_gelu as fused_product_gelu
from ltxkern.patching.products import product_gelu_apart
from ltxkern.patching.rules import FusionPolicy, chosen_policy

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Fusion(Generic[_Given, _Result]):
    """A pass that joins several ops, and the ops themselves, with the same arguments; a call is served by one of them."""

    fused: Callable[_Given, _Result]
    separate: Callable[_Given, _Result]

    def __call__(self, *args: _Given.args, **keywords: _Given.kwargs) -> _Result:
        """As the policy that is in force says; arguments by position alone."""
        return _serve(self, *args, **keywords)


_current: ContextVar[FusionPolicy | None] = ContextVar("ltxkern_fusions", default=None)
# Kept with their verdicts.
_named = functools.cache(FusionPolicy)


@contextlib.contextmanager
def use_fusions(policy: FusionPolicy | str) -> Iterator[FusionPolicy]:
    """Within it the transformer's passes are fused as the policy says.

    Args:
        policy: one that is kept, or a name.
    Raises:
        ValueError: unknown name; with the legal ones.
    """
    chosen = FusionPolicy.of(policy)
    token = _current.set(chosen)
    try:
        yield chosen
    finally:
        _current.reset(token)


@contextlib.contextmanager
def settled_policy() -> Iterator[None]:
    """Within it the policy that is in force now is: each pass would else ask the environment."""
    with use_fusions(_in_force()):
        yield


# Runs the work of sound and that of video and returns both results; whoever reads these may do so at once.
SideBySide = Callable[[Callable[[], Any], Callable[[], Any]], Any]
_beside: ContextVar[SideBySide | None] = ContextVar("ltxkern_sound_beside_video", default=None)


@contextlib.contextmanager
def use_side_by_side(run: SideBySide | None) -> Iterator[None]:
    """Within it the sound's part of a block runs beside the video's, by `run`; one after the other where it is None."""
    token = _beside.set(run)
    try:
        yield
    finally:
        _beside.reset(token)


def sound_beside_video(sound: Callable[[], Any], video: Callable[[], Any]) -> None:
    """Both, in either order: neither reads what the other writes.

    `sound` returns all tensors that it has made and that stay; memory that it gives away must not be the video's.
    """
    run = None if torch.compiler.is_compiling() else _beside.get()
    if run is None:
        video()
        sound()
    else:
        run(sound, video)


def _in_force() -> FusionPolicy:
    return _current.get() or _named(chosen_policy(None))


def _name() -> str | None:
    """What torch.compile fixes in a graph: the policy that is in force while it traces."""
    return _in_force().name


# The mark of `torch.compiler.assume_constant_result`, which would import the whole compiler.
_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _serve(fusion: Fusion[..., _Result], *args: Any) -> _Result:
    if torch.compiler.is_compiling():
        return (fusion.fused if _name() == "rounded" else fusion.separate)(*args)
    policy = _in_force()
    return fusion.fused(*args) if policy.name == "rounded" else policy.checked(fusion.fused, fusion.separate, args)


def _norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, rows: Tensor | None) -> Tensor:
    """RMSNorm, then `(1 + scale)` and `shift`, which are tables where `rows` says which of theirs a token has."""
    return rms_norm_modulate(x, scale, shift, eps=eps, rows=rows)


def _weighted_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm with a weight. That of torch is one pass on a GPU and a pass an operation on a CPU."""
    if x.device.type != "cpu":
        return _weighted_norm_apart(x, weight, eps)
    nothing = x.new_zeros(x.shape[-1])
    return rms_norm_modulate(x, nothing, nothing, eps=eps, weight=weight)


def _weighted_norm_apart(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _residual(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
    """`x + y gate`."""
    return fused_gated_residual(x, y, gate, rows=rows)


def _gated_norm(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`x + y gate`, and its modulated norm."""
    return gated_residual_rms_norm_modulate(x, y, gate, scale, shift, eps=eps, rows=rows)


def _gated_norms(
    x: Tensor, y: Tensor, gate: Tensor, modulation: tuple[Tensor, ...], eps: float, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`x + y gate`, and its norm with two modulations: scale, shift, scale, shift."""
    return gated_residual_rms_norm_modulate_twice(x, y, gate, *modulation, eps=eps, rows=rows)


def _gated_norms_apart(
    x: Tensor, y: Tensor, gate: Tensor, modulation: tuple[Tensor, ...], eps: float, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return separate.residual_norms(x, y, gate, *modulation, eps=eps, rows=rows)


def _rotated(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    heads: int,
    rope: RotaryTables,
    k_rope: RotaryTables | None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys normalised over all heads and rotated; `k_rope` None where both have one table."""
    k_cos, k_sin, k_rows = k_rope or (None, None, None)
    cos, sin, rows = rope
    known = None if rows is None else heads
    tables = {"rows": rows, "k_cos": k_cos, "k_sin": k_sin, "k_rows": k_rows}
    return qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps=eps, heads=known, **tables)  # type: ignore[arg-type]


def _rotated_apart(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    heads: int,
    rope: RotaryTables,
    k_rope: RotaryTables | None,
) -> tuple[Tensor, Tensor]:
    # Not above: a request is refused by its policy's name before diffusers is imported.
    from diffusers.models.transformers.transformer_ltx2 import apply_split_rotary_emb

    def one(x: Tensor, weight: Tensor, tables: RotaryTables) -> Tensor:
        cos, sin = (
            table.expand(x.shape[0], -1, -1, -1) for table in tables.by_token(heads, x.shape[-1] // (2 * heads))
        )
        return apply_split_rotary_emb(_weighted_norm_apart(x, weight, eps), (cos, sin))

    return one(q, q_weight, rope), one(k, k_weight, k_rope or rope)


def _head_gate(x: Tensor, logits: Tensor) -> Tensor:
    """`x 2 sigmoid(logits)` per head of (..., heads, d)."""
    return fused_head_gate(x, logits)


def _layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), eps)


def _layer_norm_apart(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return separate.modulate(F.layer_norm(x, x.shape[-1:], eps=eps), scale, shift)


norm_modulate = Fusion(_norm, separate.norm)
weighted_norm = Fusion(_weighted_norm, _weighted_norm_apart)
gated_residual = Fusion(_residual, separate.residual)
gated_norm = Fusion(_gated_norm, separate.residual_norm)
gated_norms = Fusion(_gated_norms, _gated_norms_apart)
rotated = Fusion(_rotated, _rotated_apart)
head_gate = Fusion(_head_gate, separate.head_gate)
product_gelu = Fusion(fused_product_gelu, product_gelu_apart)
product = Fusion(products.product, products.product_apart)
layer_norm = Fusion(_layer_norm, _layer_norm_apart)


def layer_norm_modulate(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm without weights of (B, T, D), then `(1 + scale)` and `shift`: one pass where they are one row for all tokens."""
    if scale.numel() == x.shape[-1]:
        return layer_norm(x, scale, shift, norm.eps)
    return separate.modulate(norm(x), scale, shift)


def linear(layer: Any, x: Tensor) -> Tensor:
    """A linear layer on (..., D), or whatever stands in its place."""
    return products.linear(layer, x, product)
