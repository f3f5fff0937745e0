"""ComfyUI: models and VAEs whose sites are fused while ComfyUI uses them, and LoRA files merged in chunks of rows.

Clones of a model patcher share one model. So nothing is fused when a node runs: a patched model is while it samples, a patched VAE
while it is the clone that is loaded; in between, and for all other clones, the model is as it was.
"""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ltxkern.integrations.routes import Left
from ltxkern.ops.group_norm_silu import group_norm_silu
from ltxkern.ops.merge_lora import WEIGHT_DTYPES, merge_lora_
from ltxkern.patch import fuse
from ltxkern.patching.norms import KINDS, FusedGroupNorm, FusedLengthNorm, takes
from ltxkern.patching.report import Report
from ltxkern.patching.rules import Rules, chosen_policy
from ltxkern.patching.watch import stands

# Under which a patcher keeps what is ours.
KEY = "ltxkern"


class CastGroupNorm(FusedGroupNorm):
    """A GroupNorm of comfy.ops: its weights may lie elsewhere, in another dtype, or wait for a LoRA."""

    LIVE = FusedGroupNorm.LIVE | {"comfy_cast_weights", "weight_function", "bias_function"}

    def forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`silu(gn(x) [+ residual])`."""
        if not stands(self):
            return type(self).forward(self, x)
        if not (self.comfy_cast_weights or self.weight_function or self.bias_function):
            return super().forward(x, residual)
        ops = sys.modules["comfy.ops"]
        if self.weight is None or residual is not None or not takes(x, None) or not hasattr(ops, "uncast_bias_weight"):
            self._ltxkern.compose()
            y: Tensor = super(FusedGroupNorm, self).forward(x)
            return F.silu(y if residual is None else y + residual)
        weight, bias, stream = ops.cast_bias_weight(self, x, offloadable=True)
        call = functools.partial(group_norm_silu, weight=weight, bias=bias, num_groups=self.num_groups, eps=self.eps)
        y = self._ltxkern.serve(x, call)
        ops.uncast_bias_weight(self, weight, bias, stream)
        return y


class CastLengthNorm(FusedLengthNorm):
    """The norm of the Wan VAE, which takes its weight to its input."""

    def _ltxkern_gamma(self: Any, x: Tensor) -> Tensor:
        return self.gamma.to(x)


def _register() -> None:
    """Norms of ComfyUI's own models, each beside the one of torch or diffusers that does the same."""
    group = KINDS["torch.nn.modules.normalization.GroupNorm"]._replace(mixin=CastGroupNorm)
    vae = "diffusers.models.autoencoders.autoencoder_kl_"
    KINDS["comfy.ops.disable_weight_init.GroupNorm"] = KINDS["comfy.ops.manual_cast.GroupNorm"] = group
    KINDS["comfy.ldm.lightricks.vae.pixel_norm.PixelNorm"] = KINDS[f"{vae}ltx2_audio.LTX2AudioPixelNorm"]
    KINDS["comfy.ldm.wan.vae.RMS_norm"] = KINDS[f"{vae}wan.WanRMS_norm"]._replace(mixin=CastLengthNorm)


_register()


class Fusing:
    """What a patched clone does to the model that it shares with others.

    Attributes:
        text: the report of the use that is under way or was the last; before the first one, of a trial.
    """

    _standing: ClassVar[list[Fusing]] = []

    def __init__(self, model: nn.Module, rules: Rules) -> None:
        self._rules = rules
        self._model: nn.Module | None = None
        self._report: Report | None = None
        self._release(model)
        with fuse(model, rules) as report:
            self._text = str(report)

    @property
    def text(self) -> str:
        """The report."""
        return self._text if self._report is None else str(self._report)

    @classmethod
    def _release(cls, model: nn.Module) -> None:
        for other in [*cls._standing]:
            if other._model is model:
                other.eject()

    def inject(self, patcher: Any) -> None:
        """Fuse the model of a patcher that has been loaded."""
        self._release(patcher.model)
        self._model, self._report = patcher.model, fuse(patcher.model, self._rules)
        self._standing.append(self)

    def eject(self, patcher: Any = None) -> None:
        """Give the modules their classes back; twice is fine."""
        if self._report is not None:
            self._text = str(self._report)
            self._report.undo()
            self._standing.remove(self)
            self._model = self._report = None

    def around(self, executor: Any, *args: Any, **keywords: Any) -> Any:
        """Fuse the model of a guider while it samples."""
        with fuse(executor.class_obj.model_patcher.model, self._rules) as report:
            try:
                return executor(*args, **keywords)
            finally:
                self._text = str(report)


def _prepared(patcher: Any, policy: str | None) -> tuple[Any, Fusing]:
    if not hasattr(patcher, "set_injections") or not hasattr(patcher, "add_wrapper_with_key"):
        raise TypeError(
            f"expected a ModelPatcher with injections and wrappers, got {type(patcher).__name__}: update ComfyUI"
        )
    fusing = Fusing(patcher.model, Rules(chosen_policy(policy) == "exact", None, meta=True))
    clone = patcher.clone()
    clone.set_attachments(KEY, fusing)
    return clone, fusing


def patch_model(patcher: Any, policy: str | None = None) -> tuple[Any, str]:
    """A clone of a model patcher whose model runs on fused ops whenever the clone samples.

    Args:
        patcher: ComfyUI's MODEL.
        policy: as in `ltxkern.patch`.
    Returns:
        The clone, and the report of a trial: which sites will be fused, which are left alone and why.
    Raises:
        TypeError: no patcher, or one of an old ComfyUI.

    Contract: that of `ltxkern.patch`. The given patcher, and every other clone of it, runs as before.
    """
    clone, fusing = _prepared(patcher, policy)
    kind = importlib.import_module("comfy.patcher_extension").WrappersMP.OUTER_SAMPLE
    clone.remove_wrappers_with_key(kind, KEY)
    clone.add_wrapper_with_key(kind, KEY, fusing.around)
    return clone, fusing.text


def patch_vae(vae: Any, policy: str | None = None) -> tuple[Any, str]:
    """A copy of a VAE whose model runs on fused ops while the copy's patcher is the one that is loaded.

    Args:
        vae: ComfyUI's VAE.
        policy: as in `ltxkern.patch`.
    Returns:
        The copy, and the report of a trial.
    Raises:
        TypeError: nothing with a patcher, or one of an old ComfyUI.

    Contract: that of `ltxkern.patch`. The given VAE decodes as before: to load its patcher takes that of the copy out.
    """
    if not hasattr(vae, "patcher"):
        raise TypeError(f"vae must be a VAE of ComfyUI with a patcher, got {type(vae).__name__}")
    patched = copy.copy(vae)
    patched.patcher, fusing = _prepared(vae.patcher, policy)
    injection = importlib.import_module("comfy.patcher_extension").PatcherInjection
    patched.patcher.set_injections(KEY, [injection(inject=fusing.inject, eject=fusing.eject)])
    return patched, fusing.text


def patch_module(model: nn.Module, policy: str | None = None) -> tuple[nn.Module, str]:
    """A copy of a module that no patcher holds, as ComfyUI's latent upscalers are: fused, on the very weights of the original.

    Args:
        model: ComfyUI's LATENT_UPSCALE_MODEL, or any other module.
        policy: as in `ltxkern.patch`.
    Returns:
        The copy, and the report.
    Raises:
        TypeError: no module.

    Contract: that of `ltxkern.patch`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    patched = copy.deepcopy(model, shared)
    return patched, str(fuse(patched, Rules(chosen_policy(policy) == "exact", None, meta=True)))


def report_of(patcher: Any) -> str:
    """The report of a patched clone's last use, with the calls of each site.

    Raises:
        ValueError: the patcher is not patched.
    """
    fusing = patcher.get_attachment(KEY) if hasattr(patcher, "get_attachment") else None
    if not isinstance(fusing, Fusing):
        raise ValueError("expected a model or VAE that went through a patch node of ltxkern, got one that did not")
    return fusing.text


@functools.cache
def _chunked(kind: Any) -> Any:
    """ComfyUI's own class of plain LoRAs, merging by `merge_lora_`."""

    class ChunkedLoRA(kind):
        def calculate_weight(self, weight: Tensor, key: str, strength: float, *rest: Any, **options: Any) -> Any:
            """The weight that ComfyUI made for this, changed in place; what does not fit goes ComfyUI's way."""
            up, down, alpha = self.weights[:3]
            a, b = down.flatten(1), up.flatten(1)
            plain = type(weight) is Tensor and weight.dtype in WEIGHT_DTYPES
            if plain and (weight.dim() == 2 or (weight.dim() > 2 and weight.is_contiguous())):
                matrix = weight.flatten(1)
                if matrix.shape == (b.shape[0], a.shape[1]) and b.shape[1] == a.shape[0]:
                    scale = float(strength if alpha is None else strength * alpha / a.shape[0])
                    merge_lora_(matrix, a.to(weight), b.to(weight), scale)
                    return weight
            return super().calculate_weight(weight, key, strength, *rest, **options)

    return ChunkedLoRA


def _against(key: Any, patch: Any, kind: Any) -> str | None:
    """Why a patch of a LoRA file goes ComfyUI's way."""
    if type(patch) is not kind:
        return f"is a {type(patch).__name__}, no plain LoRA"
    if not isinstance(key, str) and len(key) > 2:
        return "goes through a function"
    names = ("a mid weight", "a DoRA scale", "another shape of its weight")
    return next((f"has {name}" for name, held in zip(names, patch.weights[3:], strict=False) if held is not None), None)


def merge_lora(patcher: Any, patches: Mapping[Any, Any], strength: float, kind: type) -> tuple[Any, str]:
    """A clone of a model patcher with the patches of a LoRA file, plain LoRAs merged by `merge_lora_`.

    ComfyUI makes a copy of each weight when it loads the clone, and keeps the weight to restore it. Into that copy the product of
    the two factors goes in chunks of rows: it is never there as a whole, and the sum is rounded once.

    Args:
        patcher: ComfyUI's MODEL.
        patches: what `comfy.lora.load_lora` made of the file.
        strength: of the LoRA.
        kind: `comfy.weight_adapter.LoRAAdapter`.
    Returns:
        The clone, and what became of each patch.

    Contract: rounded, as `merge_lora_` with "single".
    """
    chosen: dict[Any, Any] = {}
    left: list[Left] = []
    for key, patch in patches.items():
        reason = _against(key, patch, kind)
        chosen[key] = _chunked(kind)(patch.loaded_keys, patch.weights) if reason is None else patch
        if reason is not None:
            left.append(Left(key if isinstance(key, str) else key[0], reason))
    clone = patcher.clone()
    taken = set(clone.add_patches(chosen, strength))
    left += [
        Left(key if isinstance(key, str) else key[0], "the model has no such weight") for key in chosen.keys() - taken
    ]
    merged = sum(type(chosen[key]) is _chunked(kind) for key in taken)
    rows = [f"{merged} weights: ltxkern.merge_lora_ at strength {strength}, in chunks of rows"]
    return clone, "\n".join(rows + [f"{place}: left to ComfyUI, {reason}" for place, reason in left])
