"""sglang: its fused functions for diffusion models routed to ours where ours serve, and back."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ltxkern.integrations.routes import Left, Routes, modulates, rotates, same_kind
from ltxkern.ops.checks import broadcasts
from ltxkern.ops.gated_residual import gated_residual
from ltxkern.ops.group_norm_silu import apply_group_norm_silu
from ltxkern.ops.qk_norm_rope import qk_norm_rope
from ltxkern.ops.rms_norm_modulate import gated_residual_rms_norm_modulate, rms_norm_modulate

Theirs = Callable[..., Any]
_HOME = "sglang.jit_kernel.diffusion"
# Where they are from 0.5.23 on; models take them from the first one, which hands out what the others have.
_FACADE = "sglang.kernels.ops.diffusion"
_MADE = "sglang.kernels.kda_kernels"
_ROPE = "ltx2_qknorm_split_rope"


def _group_norm_silu(theirs: Theirs) -> Theirs:
    def routed(x: Tensor, norm: nn.Module, activation: nn.Module) -> Any:
        if type(norm) is nn.GroupNorm and type(activation) is nn.SiLU:
            return apply_group_norm_silu(x, norm, activation)
        return theirs(x, norm, activation)

    return routed


def _gates(*operands: Any) -> bool:
    if not all(isinstance(one, Tensor) for one in operands):
        return False
    residual, update, gate = operands
    same = update.shape == residual.shape and same_kind(residual, update, gate)
    return bool(same and broadcasts(gate.shape, residual.shape))


def _can_gate(theirs: Theirs) -> Theirs:
    def routed(residual: Tensor, update: Tensor, gate: Tensor) -> Any:
        return _gates(residual, update, gate) or theirs(residual, update, gate)

    return routed


def _gate(theirs: Theirs) -> Theirs:
    def routed(residual: Tensor, update: Tensor, gate: Tensor) -> Any:
        if _gates(residual, update, gate):
            return gated_residual(residual, update, gate)
        return theirs(residual, update, gate)

    return routed


def _qk_norm_rope_pair(theirs: Theirs) -> Theirs:
    def routed(
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        q_cos: Tensor,
        q_sin: Tensor,
        k_cos: Tensor,
        k_sin: Tensor,
        eps: float,
    ) -> Any:
        if rotates((q, q_weight, q_cos, q_sin), (k, k_weight, k_cos, k_sin)):
            return qk_norm_rope(q, k, q_weight, k_weight, q_cos, q_sin, eps=float(eps), k_cos=k_cos, k_sin=k_sin)
        return theirs(q, k, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, eps)

    return routed


def _can_qk_norm_rope(theirs: Theirs) -> Theirs:
    def routed(*args: Tensor, **options: Any) -> bool:
        return _rotates(*args, **options) or theirs(*args, **options)

    return routed


def _qk_norm_rope(theirs: Theirs) -> Theirs:
    def routed(*args: Tensor, eps: float, **options: Any) -> Any:
        if _rotates(*args, **options):
            q, q_cos, q_sin, q_weight, k, k_cos, k_sin, k_weight = args
            return qk_norm_rope(q, k, q_weight, k_weight, q_cos, q_sin, eps=float(eps), k_cos=k_cos, k_sin=k_sin)
        return theirs(*args, eps=eps, **options)

    return routed


def _rotates(*args: Any, num_heads: int, head_dim: int, allow_sm90: bool = False) -> bool:
    """Whether ours take what sglang's later functions are given: x, cos, sin and weight of queries, then of keys."""
    if len(args) != 8 or not all(isinstance(one, Tensor) for one in args):
        return False
    q, q_cos, q_sin, q_weight, k, k_cos, k_sin, k_weight = args
    fits = rotates((q, q_weight, q_cos, q_sin), (k, k_weight, k_cos, k_sin))
    return fits and (q_cos.shape[1], 2 * q_cos.shape[3]) == (num_heads, head_dim)


def _modulates(x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: tuple[Any, ...], norm_type: str) -> bool:
    """An RMSNorm whose modulation lies over x; a LayerNorm or a shift of its own is theirs."""
    if norm_type != "rms" or bias is not None or not all(isinstance(row, Tensor) for row in rows):
        return False
    return modulates(x, *rows) and (weight is None or same_kind(x, weight))


def _norm_scale_shift(theirs: Theirs) -> Theirs:
    def routed(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        norm_type: str,
        eps: float = 1e-5,
    ) -> Any:
        if _modulates(x, weight, bias, (scale, shift), norm_type):
            return rms_norm_modulate(x, scale, shift, eps=float(eps), weight=weight)
        return theirs(x, weight, bias, scale, shift, norm_type, eps)

    return routed


def _residual_norm_scale_shift(theirs: Theirs) -> Theirs:
    def routed(
        residual: Tensor,
        x: Tensor,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        norm_type: str,
        eps: float = 1e-5,
    ) -> Any:
        if residual.shape == x.shape and _modulates(residual, weight, bias, (x, gate, scale, shift), norm_type):
            assert gate is not None
            moved, normed = gated_residual_rms_norm_modulate(
                residual, x, gate, scale, shift, eps=float(eps), weight=weight
            )
            return normed, moved
        return theirs(residual, x, gate, weight, bias, scale, shift, norm_type, eps)

    return routed


class _Site(NamedTuple):
    """A function of sglang, what takes its place, and the op behind that."""

    module: str
    name: str
    route: Callable[[Theirs], Theirs]
    op: str


def _norms(module: str) -> tuple[_Site, _Site]:
    return (
        _Site(module, "fused_norm_scale_shift", _norm_scale_shift, "rms_norm_modulate"),
        _Site(
            *(module, "fused_scale_residual_norm_scale_shift"),
            *(_residual_norm_scale_shift, "gated_residual_rms_norm_modulate"),
        ),
    )


_SITES = (
    _Site(f"{_HOME}.group_norm_silu", "apply_group_norm_silu", _group_norm_silu, "group_norm_silu"),
    _Site(f"{_HOME}.residual_gate_add", "can_use_residual_gate_add_cuda", _can_gate, "gated_residual"),
    _Site(f"{_HOME}.residual_gate_add", "residual_gate_add_cuda", _gate, "gated_residual"),
    _Site(f"{_HOME}.triton.ltx2_qknorm", "ltx2_qknorm_split_rope_pair", _qk_norm_rope_pair, "qk_norm_rope"),
    *_norms(f"{_HOME}.cutedsl.scale_residual_norm_scale_shift"),
)
_SITES_NOW = (
    _Site(f"{_FACADE}.norm.group_norm_silu", "apply_group_norm_silu", _group_norm_silu, "group_norm_silu"),
    _Site(f"{_MADE}.residual_gate_add_jit", "can_use_residual_gate_add_cuda", _can_gate, "gated_residual"),
    _Site(f"{_MADE}.residual_gate_add_jit", "residual_gate_add_cuda", _gate, "gated_residual"),
    _Site(f"{_MADE}.residual_gate_add_jit", "residual_gate_add", _gate, "gated_residual"),
    _Site(f"{_MADE}.{_ROPE}_jit", f"can_use_{_ROPE}_cuda", _can_qk_norm_rope, "qk_norm_rope"),
    _Site(f"{_MADE}.{_ROPE}_jit", f"{_ROPE}_cuda", _qk_norm_rope, "qk_norm_rope"),
    *_norms(f"{_FACADE}.norm.scale_residual_norm_cutedsl"),
)


def _sites() -> tuple[_Site, ...]:
    try:
        return _SITES_NOW if importlib.util.find_spec("sglang.kernels") else _SITES
    except ImportError:  # of sglang itself: each place tells of it
        return _SITES_NOW


def install() -> Routes:
    """Route sglang's fused functions for diffusion models to ours, in its own modules and where these were imported by name.

    Returns:
        What was replaced, what was left with the reason, and the way back. Each call that ours do not serve goes on to sglang's.
    Raises:
        ImportError: sglang is not installed.

    Contract: rounded, as each op says. sglang rounds between norm and rotation, ours once at the end.
    Example:
        >>> routes = ltxkern.integrations.sglang.install()
        >>> routes.undo()
    """
    if importlib.util.find_spec("sglang") is None:
        raise ImportError("sglang is not installed: pip install sglang")
    routes = Routes()
    for site in _sites():
        place = f"{site.module}.{site.name}"
        try:
            home = importlib.import_module(site.module)
        except ImportError as missing:
            routes.left.append(Left(place, f"its module does not load: {missing}"))
            continue
        theirs = getattr(home, site.name, None)
        if theirs is None:
            routes.left.append(Left(place, "this version has no such function"))
        elif hasattr(theirs, "ltxkern_op"):
            routes.left.append(Left(place, "it is routed already"))
        else:
            routed: Any = site.route(theirs)
            for name in ("__name__", "__doc__", "__module__"):
                setattr(routed, name, getattr(theirs, name, getattr(routed, name)))
            routed.ltxkern_op = site.op
            routes.put_everywhere("sglang", theirs, routed)
            routes.places[place] = site.op
    return routes
