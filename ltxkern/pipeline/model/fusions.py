"""How the transformer block runs: passes that join several ops, the policy that lets them serve, and sound beside video.

Each is named with the composition that it replaces: the ops of diffusers' block, every one with its own rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ltxkern.ops.gated_residual import gated_residual as fused_gated_residual
from ltxkern.ops.gated_residual import head_gate as fused_head_gate
from ltxkern.ops.qk_norm_rope import RotaryTables, qk_norm_rope
from ltxkern.ops.rms_norm_modulate import (
    gated_residual_rms_norm_modulate,
    gated_residual_rms_norm_modulate_twice,
    rms_norm_modulate,
)
from ltxkern.patching.rules import chosen_policy

ERROR_RATIO = 1.5  # of a fused pass's distance from fp64 to that of the composition
ENOUGH = 1 << 20  # results that had the same bits before a pass counts as exact: a few could have them by chance


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


@dataclass
class FusionPolicy:
    """Which fused passes serve the transformer.

    "rounded": all of them; each is at least as close to fp64 as what it replaces. "exact": those alone that gave the bits of the
    separate ops on this device in their first calls of a dtype and shape, where both run until `ENOUGH` results were compared;
    the others never again. What torch.compile traces is made of the separate ops then.

    Attributes:
        name: one of `POLICIES`; None for what the variable LTXKERN_POLICY says, else "rounded".
        verdicts: under "exact", by fused function and layout of its arguments, results that had the bits; 0 once one had not.
    """

    name: str | None = None
    verdicts: dict[tuple[Any, ...], int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.name = chosen_policy(self.name)

    @classmethod
    def of(cls, policy: str | FusionPolicy | None) -> FusionPolicy:
        """One by a name, or the one that is given."""
        return policy if isinstance(policy, FusionPolicy) else cls(policy)

    def checked(self, fusion: Fusion[..., _Result], args: tuple[Any, ...]) -> _Result:
        """The result under "exact"."""
        layout = (fusion.fused, *map(_layout, tree_leaves(args)))
        known = self.verdicts.get(layout)
        if known is not None and known >= ENOUGH:
            return fusion.fused(*args)
        expected = fusion.separate(*args)
        if known == 0 or _traces(args) or _captures(args):
            return expected
        pairs = [*zip(tree_leaves(fusion.fused(*args)), tree_leaves(expected), strict=True)]
        same = all(_same_bits(*pair) for pair in pairs)
        self.verdicts[layout] = (known or 0) + sum(other.numel() for _, other in pairs) if same else 0
        return expected


def _layout(value: Any) -> Any:
    return (value.device, value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else value


def _tensors(args: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))


def _traces(args: Any) -> bool:
    """Whether the tensors have shapes and no values."""
    return any(tensor.device.type == "meta" or type(tensor) not in (Tensor, nn.Parameter) for tensor in _tensors(args))


def _captures(args: Any) -> bool:
    return any(tensor.is_cuda for tensor in _tensors(args)) and torch.cuda.is_current_stream_capturing()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(*(x.contiguous().view(torch.uint8) for x in (one, other)))


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
    return fusion.fused(*args) if policy.name == "rounded" else policy.checked(fusion, args)


def _taken(rows: Tensor | None, table: Tensor) -> Tensor:
    return table if rows is None else table[rows]


def _rms(x: Tensor, eps: float) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(x.dtype)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x (1 + scale) + shift`."""
    return x * (1 + scale) + shift


def _norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, rows: Tensor | None) -> Tensor:
    """RMSNorm, then `(1 + scale)` and `shift`, which are tables where `rows` says which of theirs a token has."""
    return rms_norm_modulate(x, scale, shift, eps=eps, rows=rows)


def _norm_apart(x: Tensor, scale: Tensor, shift: Tensor, eps: float, rows: Tensor | None) -> Tensor:
    return modulate(_rms(x, eps), _taken(rows, scale), _taken(rows, shift))


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


def _residual_apart(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
    return x + y * _taken(rows, gate)


def _gated_norm(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`x + y gate`, and its modulated norm."""
    return gated_residual_rms_norm_modulate(x, y, gate, scale, shift, eps=eps, rows=rows)


def _gated_norm_apart(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    summed = _residual_apart(x, y, gate, rows)
    return summed, _norm_apart(summed, scale, shift, eps, rows)


def _gated_norms(
    x: Tensor, y: Tensor, gate: Tensor, modulation: tuple[Tensor, ...], eps: float, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`x + y gate`, and its norm with two modulations: scale, shift, scale, shift."""
    return gated_residual_rms_norm_modulate_twice(x, y, gate, *modulation, eps=eps, rows=rows)


def _gated_norms_apart(
    x: Tensor, y: Tensor, gate: Tensor, modulation: tuple[Tensor, ...], eps: float, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    scale, shift, scale2, shift2 = modulation
    summed, normed = _gated_norm_apart(x, y, gate, scale, shift, eps, rows)
    return summed, normed, _norm_apart(summed, scale2, shift2, eps, rows)


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


def _head_gate_apart(x: Tensor, logits: Tensor) -> Tensor:
    return x * (2.0 * torch.sigmoid(logits)).unsqueeze(-1)


def _product_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    product = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return product.unflatten(0, x.shape[:-1])


def _product_gelu_apart(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    hidden = F.linear(x, weight, bias)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.gelu(hidden, approximate="tanh")
    return torch.ops.aten.gelu_(hidden, approximate="tanh")


def _layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), eps)


def _layer_norm_apart(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return modulate(F.layer_norm(x, x.shape[-1:], eps=eps), scale, shift)


norm_modulate = Fusion(_norm, _norm_apart)
weighted_norm = Fusion(_weighted_norm, _weighted_norm_apart)
gated_residual = Fusion(_residual, _residual_apart)
gated_norm = Fusion(_gated_norm, _gated_norm_apart)
gated_norms = Fusion(_gated_norms, _gated_norms_apart)
rotated = Fusion(_rotated, _rotated_apart)
head_gate = Fusion(_head_gate, _head_gate_apart)
product_gelu = Fusion(_product_gelu, _product_gelu_apart)
layer_norm = Fusion(_layer_norm, _layer_norm_apart)


@functools.cache
def _gelu_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device's product with GELU is tanh GELU, within the contract; some have the one of the error function."""
    if device.type == "meta":
        return True
    with _disable_current_modes(), torch.no_grad():
        # Around -3 the two differ by more than a 16-bit product is off, which they do not elsewhere.
        return all(_gelu_fits(device, dtype, *case) for case in ((1.0, 0.0), (0.05, -3.0)))


def _gelu_fits(device: torch.device, dtype: torch.dtype, spread: float, centre: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((64, 128), (512, 128)))
    x, weight, bias = x * spread, weight * 128**-0.5, torch.full((512,), centre).to(x)
    exact = _product_gelu_apart(x.double(), weight.double(), bias.double())

    def error(result: Tensor) -> float:
        return float((result.double() - exact).norm())

    try:
        return error(_product_gelu(x, weight, bias)) <= ERROR_RATIO * error(_product_gelu_apart(x, weight, bias))
    except RuntimeError:
        return False


def is_plain(network: Any, dtype: torch.dtype) -> bool:
    """Whether diffusers' FeedForward is two products with tanh GELU and a bias in the first: no adapters, no hooks on the way."""
    first = network.net[0]
    layer: Any = getattr(first, "proj", None)
    known = type(layer) is nn.Linear and layer.bias is not None and getattr(first, "approximate", None) == "tanh"
    # Weights of another dtype, or of a tensor class of their own, are left to whoever put them there.
    if not known or type(layer.weight) is not nn.Parameter or {layer.weight.dtype, layer.bias.dtype} != {dtype}:
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = any(getattr(module, name) for module in (network, first, layer) for name in hooks)
    return not hooked and not network.training and len(network.net) == 3


def feed_forward(network: Any, x: Tensor) -> Tensor:
    """diffusers' FeedForward with tanh GELU, which goes into the epilogue of the first product where it can."""
    if not is_plain(network, x.dtype):
        return network(x)
    layer, last = network.net[0].proj, network.net[2]
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _gelu_serves(x.device, x.dtype):
        hidden = _product_gelu_apart(x, layer.weight, layer.bias)
    else:
        hidden = product_gelu(x, layer.weight, layer.bias)
    del x  # not read while the second product runs
    return last(hidden)


def layer_norm_modulate(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm without weights of (B, T, D), then `(1 + scale)` and `shift`: one pass where they are one row for all tokens."""
    if scale.numel() == x.shape[-1]:
        return layer_norm(x, scale, shift, norm.eps)
    return modulate(norm(x), scale, shift)
