"""`patch(model)`: fused norm and activation inside models of other stacks, and `.undo()` to take it out again.

Blocks are recognised by class name and by what they hold, so that nothing is imported from the stacks themselves. Parameters and
state-dict keys stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ltxkern.nn import GroupNormSiLU, PixelNormSiLU
from ltxkern.ops.group_norm_silu import apply_group_norm_silu, fuses, group_norm_silu, is_plain


@dataclass(frozen=True)
class Site:
    """One place of a block class: norms whose output goes straight into one activation, and nothing else does.

    norms, activation: attribute names; free: says of a block whether the activation has no further use in it.
    """

    norms: tuple[str, ...]
    activation: str
    free: Callable[[Any], bool] = lambda block: True


def _no_time_embedding(block: Any) -> bool:
    return getattr(block, "time_emb_proj", None) is None


def _no_time_projection(block: Any) -> bool:
    return getattr(block, "temb_proj", None) is None


def _no_timestep(block: Any) -> bool:
    return getattr(block, "scale_shift_table", None) is None


SITES: dict[str, Site] = {
    "LTX2VideoResnetBlock3d": Site(("norm1", "norm2"), "nonlinearity", _no_timestep),
    "LTX2VideoEncoder3d": Site(("norm_out",), "conv_act"),
    "LTX2VideoDecoder3d": Site(("norm_out",), "conv_act", _no_timestep),
    "LTX2AudioResnetBlock": Site(("norm1", "norm2"), "non_linearity", _no_time_projection),
    "LTX2AudioEncoder": Site(("norm_out",), "non_linearity"),
    "LTX2AudioDecoder": Site(("norm_out",), "non_linearity"),
    "LTX2LatentUpsamplerModel": Site(("initial_norm",), "initial_activation"),
    "LTXLatentUpsamplerModel": Site(("initial_norm",), "initial_activation"),
    "ResnetBlock2D": Site(("norm1", "norm2"), "nonlinearity", _no_time_embedding),
    "TemporalResnetBlock": Site(("norm1", "norm2"), "nonlinearity", _no_time_embedding),
    "Encoder": Site(("conv_norm_out",), "conv_act"),
    "Decoder": Site(("conv_norm_out",), "conv_act"),
    "HunyuanVideoResnetBlockCausal3D": Site(("norm1", "norm2"), "nonlinearity"),
    "HunyuanVideoEncoder3D": Site(("conv_norm_out",), "conv_act"),
    "HunyuanVideoDecoder3D": Site(("conv_norm_out",), "conv_act"),
    "HunyuanImageResnetBlock": Site(("norm1", "norm2"), "nonlinearity"),
}
RESIDUAL_BLOCKS = ("ResBlock",)
PIXEL_NORMS = ("PerChannelRMSNorm", "LTX2AudioPixelNorm")


@dataclass
class Patched:
    """What `patch` changed; a context manager that undoes it at its end.

    Attributes:
        sites: names of the norms that are fused now, e.g. "decoder.mid_block.resnets.0.norm1".
    """

    sites: list[str] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put everything back as it was; twice is fine."""
        while self._undo:
            self._undo.pop()()
        self.sites.clear()

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch(model: nn.Module) -> Patched:
    """Fuse norm and SiLU wherever a known block of the model has them, in place.

    Args:
        model: any module; blocks of diffusers' LTX-2, LTX, HunyuanVideo, HunyuanImage and Stable Diffusion VAEs and latent
            upsamplers are known, and GroupNorm directly before SiLU in any `nn.Sequential`.
    Returns:
        `Patched`: the fused sites, `.undo()`, and a context manager.

    Contract: that of `group_norm_silu` and `pixel_norm_silu`. Blocks whose norm or activation has hooks, a forward of its own or
        no weights in memory are left alone.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
        >>> handle = patch(model)
        >>> handle.sites
        ['0']
        >>> handle.undo()
    """
    patched = Patched()
    for name, block in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        kind = type(block).__name__
        if kind in RESIDUAL_BLOCKS and _is_residual_block(block):
            _override(patched, block, _residual_block_forward)
            patched.sites += [f"{prefix}norm1", f"{prefix}norm2"]
        elif kind in SITES:
            _fuse_site(patched, block, SITES[kind], prefix)
        elif isinstance(block, nn.Sequential):
            for first, second in _pairs(block):
                _replace(patched, block, {first: _fused(block[int(first)]), second: nn.Identity()})
                patched.sites.append(prefix + first)
    return patched


def _fuse_site(patched: Patched, block: nn.Module, site: Site, prefix: str) -> None:
    activation = getattr(block, site.activation, None)
    norms = {name: getattr(block, name, None) for name in site.norms}
    fused = {name: _fused(norm) for name, norm in norms.items()}
    if type(activation) is not nn.SiLU or None in fused.values() or not is_plain(activation) or not site.free(block):
        return
    _replace(patched, block, {**fused, site.activation: nn.Identity()})
    patched.sites += [prefix + name for name in site.norms]


def _fused(norm: Any) -> nn.Module | None:
    if not is_plain(norm):
        return None
    if type(norm) is nn.GroupNorm:
        return GroupNormSiLU.sharing(norm)
    if type(norm).__name__ in PIXEL_NORMS and getattr(norm, "channel_dim", getattr(norm, "dim", 1)) == 1:
        return PixelNormSiLU(norm.eps)
    return None


def _pairs(block: nn.Sequential) -> Iterator[tuple[str, str]]:
    children = list(block.named_children())
    for (first, norm), (second, activation) in pairwise(children):
        if type(norm) is nn.GroupNorm and type(activation) is nn.SiLU and is_plain(norm) and is_plain(activation):
            yield first, second


def _replace(patched: Patched, block: nn.Module, modules: dict[str, nn.Module | None]) -> None:
    for name, module in modules.items():
        before = getattr(block, name)
        setattr(block, name, module)
        patched._undo.append(partial(setattr, block, name, before))


def _override(patched: Patched, block: nn.Module, forward: Callable[..., Tensor]) -> None:
    block.forward = MethodType(forward, block)
    patched._undo.append(lambda: block.__dict__.pop("forward", None))


def _is_residual_block(block: Any) -> bool:
    parts = [getattr(block, name, None) for name in ("conv1", "norm1", "conv2", "norm2", "activation")]
    norms = type(parts[1]) is nn.GroupNorm and type(parts[3]) is nn.GroupNorm
    return norms and type(parts[4]) is nn.SiLU and "forward" not in vars(block) and all(map(is_plain, parts))


def _residual_block_forward(block: Any, x: Tensor) -> Tensor:
    """`silu(gn2(conv2(silu(gn1(conv1(x))))) + x)`, the second activation after the residual."""
    y = apply_group_norm_silu(block.conv1(x), block.norm1, block.activation)
    y, norm = block.conv2(y), block.norm2
    if fuses(y, norm) and y.dtype == x.dtype and y.shape == x.shape:
        return group_norm_silu(y, norm.weight, norm.bias, norm.num_groups, norm.eps, residual=x)
    return block.activation(norm(y) + x)
