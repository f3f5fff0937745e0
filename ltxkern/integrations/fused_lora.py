"""LoRAs merged into anybody's weights and taken out again to the bit: PEFT layers of a pipeline, or lists of Linears."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltxkern.ops.checks import check_choice, check_finite_number, check_integer, raise_no_tensor
from ltxkern.ops.merge_lora import CHUNK_BYTES, checked_factors, merge_lora_, rows_per_chunk
from ltxkern.pipeline.memory.inplace import Correction, apply_correction, bit_pattern, record_correction
from ltxkern.registration import refuse_inference

ROUNDINGS = ("single", "reference")
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Options(NamedTuple):
    """How weights are merged; see `merge_lora_`."""

    rounding: str
    chunk_bytes: int


@dataclass(frozen=True, eq=False)
class _Layer:
    """A module with a weight, and what is merged into it; of a PEFT layer also the layer and its adapters."""

    name: str
    module: nn.Module
    a: list[Tensor]
    b: list[Tensor]
    scales: list[float]
    tuner: Any = None
    adapters: tuple[str, ...] = ()

    @property
    def matrix(self) -> Tensor:
        """The weight as (out, everything else)."""
        weight: Any = self.module.weight
        matrix: Tensor = weight.detach().flatten(1)
        return matrix

    def add(self, part: Tensor, rows: slice, sign: int, options: Options) -> Tensor:
        """Merges into some rows of the weight, or subtracts the same products."""
        b = [factor[rows].to(part.device) for factor in self.b]
        a = [factor.to(part.device) for factor in self.a]
        return merge_lora_(part, a, b, [sign * scale for scale in self.scales], **options._asdict())


@dataclass(frozen=True, eq=False)
class _Undo:
    """What takes some rows back: a correction of the subtraction, or the rows themselves where these are smaller; sums of bits."""

    rows: slice
    kept: Correction | Tensor
    before: Tensor
    after: Tensor


def _bits(part: Tensor) -> Tensor:
    """Sum of the bit patterns: the same in any order of summation."""
    return bit_pattern(part).sum(dtype=torch.int64)


class FusedLoRA:
    """What `fuse_lora` has merged. `unfuse` takes it out again, as the end of a `with` block does."""

    def __init__(self, layers: Sequence[_Layer], options: Options) -> None:
        self._options = options
        self._fused: list[tuple[_Layer, list[_Undo]]] = []
        try:
            for layer in layers:
                undo: list[_Undo] = []
                self._fused.append((layer, undo))
                self._fuse(layer, undo)
                if layer.tuner is not None:
                    # By this PEFT takes the base layer alone.
                    layer.tuner.merged_adapters.extend(layer.adapters)
        except BaseException:
            self.unfuse()
            raise

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose weights are changed."""
        return [layer.name for layer, _ in self._fused]

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept to restore the weights."""
        return sum(part.kept.nbytes for _, undo in self._fused for part in undo)

    def _fuse(self, layer: _Layer, undo: list[_Undo]) -> None:
        matrix = layer.matrix
        count = rows_per_chunk(matrix.shape[0], matrix.shape[1], matrix.itemsize, self._options.chunk_bytes)
        for top in range(0, matrix.shape[0], count):
            rows = slice(top, top + count)
            part = matrix[rows]
            merged = layer.add(part.clone(), rows, 1, self._options)
            wrong = layer.add(merged.clone(), rows, -1, self._options)
            correction = record_correction(part, wrong)
            kept = correction if correction.nbytes < part.nbytes else part.clone()
            undo.append(_Undo(rows, kept, _bits(part), _bits(merged)))
            part.copy_(merged)

    @torch.no_grad()
    def unfuse(self) -> None:
        """Restore the bits that every weight had; nothing is left to do the second time.

        Raises:
            RuntimeError: a weight is not the one that was fused any more, or its device merges otherwise; it is left as it is.
        """
        for layer, undo in self._fused:
            for part in undo:
                if bool(_bits(layer.matrix[part.rows]) != part.after.to(layer.matrix.device)):
                    raise RuntimeError(
                        f"{layer.name}: its weight was changed after fuse_lora, and is left as it is: undo that change first"
                    )
        while self._fused:
            layer, undo = self._fused[-1]
            while undo:
                self._restore(layer, undo[-1])
                undo.pop()
            for adapter in layer.adapters:
                if adapter in layer.tuner.merged_adapters:
                    layer.tuner.merged_adapters.remove(adapter)
            self._fused.pop()

    def _restore(self, layer: _Layer, undo: _Undo) -> None:
        part = layer.matrix[undo.rows]
        if isinstance(undo.kept, Tensor):
            right = undo.kept.to(part.device)
        else:
            moved = Correction(*(tensor.to(part.device) for tensor in undo.kept.tensors))
            right = apply_correction(layer.add(part.clone(), undo.rows, -1, self._options), moved)
        if bool(_bits(right) != undo.before.to(part.device)):
            raise RuntimeError(
                f"{layer.name}: {part.device} subtracts otherwise than {undo.before.device}, where it was fused, "
                f"and its weight is left as it is: move it back to {undo.before.device} first"
            )
        part.copy_(right)

    def __enter__(self) -> FusedLoRA:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unfuse()


@torch.no_grad()
def fuse_lora(
    target: Any,
    lora_a: Sequence[Tensor | Sequence[Tensor]] | None = None,
    lora_b: Sequence[Tensor | Sequence[Tensor]] | None = None,
    scale: Any = 1.0,
    *,
    adapters: Sequence[str] | None = None,
    rounding: str = "single",
    chunk_bytes: int = CHUNK_BYTES,
) -> FusedLoRA:
    """Merge LoRAs into the weights of a model of any stack, all layers or none, such that they come out again to the bit.

    Args:
        target: a pipeline of diffusers, or a module, whose LoRA layers are PEFT's; or a list of Linears, with lora_a and lora_b.
        lora_a, lora_b: for each Linear of a list what `merge_lora_` takes.
        scale: strength; with PEFT it multiplies each adapter's own. With a list of Linears also one for each.
        adapters: names of PEFT's adapters; None for those that are active.
        rounding: "single", or "reference" for the official rule; see `merge_lora_`.
        chunk_bytes: upper bound of each temporary; rows of a weight are merged, subtracted and compared by such chunks.
    Returns:
        The handle that takes the LoRAs out again: `unfuse()`, or the end of a `with` block. PEFT's layers are marked as merged, so
        that they do not add their products once more.
    Raises:
        TypeError, ValueError: a layer that cannot be fused, named with the reason; nothing is changed then.
        RuntimeError: weights of inference mode; nothing is changed then.

    Contract: rounded as `merge_lora_` says of each chunk of rows; with a weight in one chunk the bits of its call. Unfused weights
        have the bits from before, NaN and signed zeros included.
    Memory kept: two bytes for each weight that `W + delta - delta` does not restore, at most the weights themselves. Of normal
        bf16 weights, by the size of the deltas beside them: 2 % of their bytes at 1 %, 9 % at 10 %, 17 % at 30 %.
    Bytes: read and write W, and as much again through temporaries of chunk_bytes.
    Source: Hu et al. 2021; the exact subtraction is this project's.

    Example:
        >>> with ltxkern.fuse_lora(pipe, scale=0.8):
        ...     video = pipe(prompt)
    """
    check_choice("rounding", rounding, ROUNDINGS)
    check_integer("chunk_bytes", chunk_bytes, 1, use=CHUNK_BYTES)
    options = Options(rounding, chunk_bytes)
    if lora_a is None and lora_b is None:
        check_finite_number("scale", scale)
        layers = _tuned(target, adapters, float(scale))
    else:
        layers = _listed(target, lora_a, lora_b, scale)
    seen: dict[int, str] = {}
    for index, layer in enumerate(layers):
        _check_weight(layer)
        try:
            factors = checked_factors(layer.matrix, layer.a, layer.b, layer.scales, chunk_bytes, rounding, 0)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{layer.name}: {error}") from error
        layers[index] = _Layer(layer.name, layer.module, *factors, layer.tuner, layer.adapters)
        other = seen.setdefault(layer.matrix.data_ptr(), layer.name)
        if other != layer.name and layer.matrix.numel():
            raise ValueError(f"{layer.name} and {other} share one weight: fuse it once")
        refuse_inference("fuse_lora", [layer.matrix])
    return FusedLoRA(layers, options)


def _check_weight(layer: _Layer) -> None:
    """A plain weight that lies in one piece."""
    module = layer.module
    if not isinstance(module, _KINDS) or getattr(module, "groups", 1) != 1:
        raise TypeError(
            f"{layer.name} must be a Linear or a convolution of one group, got {type(module).__name__}: leave it out"
        )
    weight = module._parameters.get("weight")
    if weight is None or type(weight.data) is not Tensor:
        raise TypeError(f"{layer.name} must have a plain weight, got one that is made or quantised: leave it out")
    if weight.is_meta:
        raise ValueError(f"{layer.name}: its weight lies on the meta device: fuse before offloading is enabled")
    if not weight.is_contiguous():
        raise ValueError(
            f"{layer.name}: its weight has strides {weight.stride()}: fuse before it is laid out otherwise"
        )
    if weight.dtype == torch.float8_e4m3fn:
        raise TypeError(f"{layer.name}: a float8 weight has a scale that is not known here: use merge_lora_")


def _listed(target: Any, lora_a: Any, lora_b: Any, scale: Any) -> list[_Layer]:
    modules = [target] if isinstance(target, nn.Module) else target
    for name, value in (("target", modules), ("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(value, (list, tuple)):
            raise_no_tensor(name, value, "a list with an entry for each layer")
    scales = scale if isinstance(scale, (list, tuple)) else [scale] * len(modules)
    if not len(modules) == len(lora_a) == len(lora_b) == len(scales):
        raise ValueError(
            f"target, lora_a, lora_b and scale must have one length, got {len(modules)}, {len(lora_a)}, {len(lora_b)} "
            f"and {len(scales)}"
        )
    given = zip(modules, lora_a, lora_b, scales, strict=True)
    return [_Layer(f"target[{index}]", module, a, b, s) for index, (module, a, b, s) in enumerate(given)]


def _tuned(target: Any, adapters: Sequence[str] | None, scale: float) -> list[_Layer]:
    """The PEFT layers of a target with the adapters that are wanted of each."""
    layers, known = [], set[str]()
    for name, module in _modules(target):
        if "group_offloading" in getattr(getattr(module, "_diffusers_hook", None), "hooks", ()):
            raise ValueError(f"{name}: its weights are under group offload: fuse before it is enabled")
        if not hasattr(module, "base_layer") or not hasattr(module, "merged_adapters"):
            continue
        if not hasattr(module, "lora_A"):
            raise TypeError(f"{name} must be a LoRA layer, got {type(module).__name__}: leave it out")
        known |= set(module.lora_A)
        names = tuple(name for name in adapters or module.active_adapters if name in module.lora_A)
        for adapter in names:
            _check_adapter(name, module, adapter)
        if names:
            a, b = ([group[adapter].weight.flatten(1) for adapter in names] for group in (module.lora_A, module.lora_B))
            scales = [scale * float(module.scaling[adapter]) for adapter in names]
            layers.append(_Layer(name, module.base_layer, a, b, scales, module, names))
    missing = sorted(set(adapters or ()) - known)
    if missing:
        raise ValueError(f"adapters must be among {', '.join(sorted(known)) or 'none'}, got {', '.join(missing)}")
    if not layers:
        raise ValueError("target has no active LoRA layers: load one first, or give Linears with lora_a and lora_b")
    return layers


def _check_adapter(name: str, module: Any, adapter: str) -> None:
    if module.merged_adapters:
        raise ValueError(f"{name}: {', '.join(module.merged_adapters)} is merged already: unmerge it first")
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None or getattr(module, "use_dora", {}).get(adapter):
        raise TypeError(f"{name}: adapter {adapter} is no plain LoRA but {type(variant).__name__}: merge it by PEFT")
    if getattr(module, "lora_bias", {}).get(adapter) or getattr(module, "fan_in_fan_out", False):
        raise TypeError(f"{name}: adapter {adapter} has a bias or a transposed weight: merge it by PEFT")


def _modules(target: Any) -> Iterator[tuple[str, Any]]:
    """Modules by name: of a module, or of every component of a pipeline."""
    if isinstance(target, nn.Module):
        yield from target.named_modules()
        return
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            f"target must be a module, a pipeline, or a list of Linears with lora_a and lora_b, got {type(target).__name__}"
        )
    for name, component in components.items():
        if isinstance(component, nn.Module):
            yield from component.named_modules(prefix=name)
