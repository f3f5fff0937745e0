"""HF `kernels`: a mapping whose layers run on our ops, for `use_kernel_mapping` and `register_kernel_mapping`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxkern.integrations.routes import same_kind
from ltxkern.nn import GroupNormSiLU, PixelNormSiLU, QKNormRope, RMSNormModulate
from ltxkern.ops.checks import check_choice
from ltxkern.ops.group_norm_silu import fuses, group_norm_silu
from ltxkern.ops.rms_norm_modulate import rms_norm_modulate


class _Layer(nn.Module):
    """`kernels` takes the forward alone, and binds it to the module of the model: no state, no methods beside it."""

    can_torch_compile = True
    has_backward = True


class _RMSNorm(_Layer):
    """That of Llama, Qwen and many others in transformers: `weight`, `variance_epsilon`."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """The norm over the last dim, times the weight."""
        x, weight = hidden_states, self.weight
        if same_kind(x, weight):
            none = torch.zeros_like(weight)
            return rms_norm_modulate(x, none, none, eps=self.variance_epsilon, weight=weight)
        return weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.variance_epsilon).to(x.dtype)


class _RMSNormZeroCentered(_Layer):
    """That whose weight is a difference to one, as in Qwen3-Next and Qwen3.5: `weight`, `eps`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """The norm over the last dim, times 1 + weight."""
        if same_kind(x, self.weight):
            return rms_norm_modulate(x, self.weight, torch.zeros_like(self.weight), eps=self.eps)
        return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * (1.0 + self.weight.float())).type_as(x)


class _GroupNormSiLU(_Layer):
    def forward(self: Any, x: Tensor) -> Tensor:
        """As `ltxkern.nn.GroupNormSiLU`, whose own forward asks for its class."""
        if fuses(x, self):
            return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)
        return F.silu(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


class _PixelNormSiLU(_Layer):
    forward = PixelNormSiLU.forward


class _RMSNormModulate(_Layer):
    forward = RMSNormModulate.forward


class _QKNormRope(_Layer):
    forward = QKNormRope.forward


_LAYERS = {
    "RMSNorm": _RMSNorm,
    "RMSNormZeroCentered": _RMSNormZeroCentered,
    GroupNormSiLU.__name__: _GroupNormSiLU,
    PixelNormSiLU.__name__: _PixelNormSiLU,
    RMSNormModulate.__name__: _RMSNormModulate,
    QKNormRope.__name__: _QKNormRope,
}


class LayerOfOurs(NamedTuple):
    """What `kernels` calls a repository of a layer, without a download: `load` gives the class."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        """The layer."""
        return _LAYERS[self.layer_name]

    def __str__(self) -> str:
        return f"layer `{self.layer_name}` of ltxkern"


def kernel_mapping(
    layers: Iterable[str] | None = None, devices: Iterable[str] = ("cuda", "cpu")
) -> dict[str, dict[str, LayerOfOurs]]:
    """A mapping for `kernels.use_kernel_mapping` and `register_kernel_mapping`; the package itself is not needed for it.

    `RMSNorm` and `RMSNormZeroCentered` are the names that transformers gives its norms. The others are those of the modules in
    `ltxkern.nn`: a layer that is declared under such a name, with its attributes and its forward's parameters, gets its forward.

    Args:
        layers: names of the layers; None for all.
        devices: types of the devices that the mapping is for.
    Returns:
        For each layer and device what `kernels` loads; any mode, with gradients, and within torch.compile.
    Raises:
        ValueError: no layer of that name.

    Contract: rounded, as each op says. What an op does not take (another dtype of the weights) goes by its composition.
    Example:
        >>> with use_kernel_mapping(kernel_mapping()):
        ...     model = kernelize(model, mode=Mode.INFERENCE, device="cpu")
    """
    names = list(_LAYERS) if layers is None else [layers] if isinstance(layers, str) else list(layers)
    for name in names:
        check_choice("layers", name, tuple(_LAYERS))
    where = list(devices)
    return {name: dict.fromkeys(where, LayerOfOurs(name)) for name in names}
