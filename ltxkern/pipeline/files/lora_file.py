"""Reads LoRA files as the tools write them, and checks them against the transformer from their headers alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ltxkern.pipeline.files.headers import CheckpointError, Header, StoredTensor, listed, read_header
from ltxkern.pipeline.files.hub import local_lora
from ltxkern.pipeline.files.lora_kinds import (
    Change,
    Decomposed,
    Difference,
    KroneckerProduct,
    LoRAFactors,
    PartsMissingError,
    ScaledDifference,
    Sum,
    build_change,
    misfits,
)
from ltxkern.pipeline.files.lora_layout import (
    ModuleNames,
    Part,
    Shape,
    is_foreign,
    parameter_shapes,
    read_key,
    spellings,
    unread,
)
from ltxkern.pipeline.files.lora_scale import Statement, effective_alpha, statements

logger = logging.getLogger(__name__)

LoraWeights = dict[str, tuple[Tensor, Tensor, float | None]]
Transformer = nn.Module | Mapping[str, Shape]

_FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
# Parts whose rows are the rows of the weight: those of a fused projection can be cut.
_ROWS = ("b", "diff", "diff_b", "bias", "hada_w1_a", "hada_w2_a", "magnitude")
_BESIDE = ("alpha", "a_scale", "b_scale")
_HADAMARD = ("hada_w1_a", "hada_w2_a")
_UNCUT = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def dequantise(factor: Tensor, scale: Tensor | float | None = None) -> Tensor:
    """A stored factor as a tensor that the merge can read.

    Args:
        factor: fp16, bf16, fp32, fp64, or fp8 (e4m3, e5m2).
        scale: multiplier of an fp8 factor: one number, or one per row (rows,) or (rows, 1).

    Returns:
        fp16, bf16, fp32 and fp64 without a scale as they are; fp8 without a scale in bf16 (exact); with a scale in
        fp32, `factor * scale` rounded once.
    """
    if scale is None:
        return factor.to(torch.bfloat16) if factor.dtype in _FLOAT8 else factor
    multiplier = torch.as_tensor(scale, dtype=torch.float32, device=factor.device)
    if multiplier.dim() == 1 and multiplier.numel() == factor.shape[0]:
        multiplier = multiplier[:, None]
    return factor.to(torch.float32) * multiplier


class Stored(NamedTuple):
    """A part of a change in the file, and which share of its rows: (which, of how many) equal ones."""

    tensor: StoredTensor
    share: tuple[int, int] = (0, 1)

    @property
    def shape(self) -> Shape:
        """Of the share, as a matrix where it is a convolution's kernel of one element."""
        shape = self.tensor.shape
        # PEFT's magnitude of a kernel is a row where that of a matrix is a column: it stays what it is.
        while len(shape) > 2 and shape[-1] == 1 and "lora_magnitude" not in self.tensor.key:
            shape = shape[:-1]
        return shape if self.share[1] == 1 or not shape else (shape[0] // self.share[1], *shape[1:])


@dataclass(frozen=True)
class LoRAFile:
    """What the header of a LoRA file says.

    Args:
        header: of the file.
        targets: parts by the parameter they change, as `lora_layout.parameter_shapes` names it.
        written: a module's name as the file writes it, by target.
        said: about alpha and rank.
        left_out: keys of the text connectors or a text encoder.
    """

    header: Header
    targets: Mapping[str, Mapping[str, Stored]]
    written: Mapping[str, str]
    said: Sequence[Statement]
    left_out: Sequence[str]

    @property
    def path(self) -> Path:
        """The file."""
        return self.header.path

    @property
    def nbytes(self) -> int:
        """Bytes of all parts that are merged."""
        return sum({s.tensor.key: s.tensor.nbytes for p in self.targets.values() for s in p.values()}.values())

    def changes(self, *, read: bool = False) -> dict[str, Change]:
        """The change of each target with its alpha: its tensors read, or without memory.

        Raises:
            CheckpointError: parts that do not go together, or places that disagree about alpha or rank.
        """
        try:
            with safe_open(str(self.path), framework="pt") as file:
                return self._changes(file, read)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error})") from error

    def _changes(self, file: Any, read: bool) -> dict[str, Change]:
        found: dict[str, Change] = {}
        halves: list[str] = []
        others: list[str] = []
        pairs: list[str] = []
        whole: dict[str, Tensor] = {}
        for target, parts in sorted(self.targets.items()):
            tensors = {
                name: self._tensor(file if read else None, name, parts, whole) for name in parts if name not in _BESIDE
            }
            alpha = _alpha(self.path, file.get_tensor(parts["alpha"].tensor.key), target) if "alpha" in parts else None
            try:
                for one, change in self._change(target, tensors, alpha).items():
                    found[one] = Sum((found[one], change)) if one in found else change
            except PartsMissingError as error:
                (halves if error.is_half else others).append(f"{target} {error}")
            except CheckpointError as error:
                raise CheckpointError(f"{self.path}: {error}") from error
            except ValueError as error:
                pairs.append(f"{target} {error}")
        problems = [f"{len(halves)} modules without lora_A or lora_B: {listed(halves)}"] if halves else []
        problems += [f"{len(others)} modules whose parts make no change: {listed(others)}"] if others else []
        problems += [f"{len(pairs)} pairs that are not (R, in) and (out, R): {listed(pairs)}"] if pairs else []
        problems += list(self._promised())
        if problems:
            raise CheckpointError(f"{self.path} does not fit the transformer; {'; '.join(problems)}")
        return found

    def _change(self, target: str, tensors: dict[str, Tensor], alpha: float | None) -> dict[str, Change]:
        bias = tensors.pop("bias", None)
        beside = tensors.pop("diff") if len(tensors) > 1 and "magnitude" not in tensors and "diff" in tensors else None
        change = build_change(tensors)
        change.shape  # noqa: B018 - raises where the parts do not go together
        inner = change.inner if isinstance(change, Decomposed) else change
        told: float | None = None
        names = (target, self.written[target], *(name for few in spellings(target).values() for name in few))
        if isinstance(inner, KroneckerProduct) and inner.is_whole:
            # LyCORIS stores an alpha that means nothing here; PEFT scales by what its configuration says.
            told = _whole_scale(self.said, names) if alpha is None else None
        elif inner.rank is not None:
            told = effective_alpha(inner.rank, alpha, self.said, names)
        if told is not None:
            inner = replace(inner, alpha=told)  # type: ignore[type-var]
            change = replace(change, inner=inner) if isinstance(change, Decomposed) else inner
        if beside is not None:
            change = Sum((change, Difference(beside)))
            change.shape  # noqa: B018 - as above
        found = {target: change}
        if bias is not None:
            found[f"{target}.bias"] = ScaledDifference(bias, told, inner.rank or 1)
        return found

    def _promised(self) -> Iterator[str]:
        """What a configuration says is in the file, and is not."""
        factors = {
            target: parts for target, parts in self.targets.items() if not {"a", *_UNCUT, *_HADAMARD}.isdisjoint(parts)
        }
        for statement in self.said:
            for is_said, part, name in (
                (statement.decomposed, "magnitude", "weight decomposition (DoRA)"),
                (statement.biased, "bias", "a bias (lora_B.bias)"),
            ):
                missing = [target for target, parts in sorted(factors.items()) if part not in parts]
                if is_said and missing:
                    yield f"{len(missing)} modules without {name}, which {statement.where} says they have: {listed(missing)}"

    @staticmethod
    def _tensor(file: Any, name: str, parts: Mapping[str, Stored], whole: dict[str, Tensor]) -> Tensor:
        """One part in a dtype that can be computed with: fp8 times its scale where the file has one."""
        stored = parts[name]
        if file is None:
            return torch.empty(stored.shape, device="meta")
        key = stored.tensor.key
        if key not in whole:
            scale = parts.get(f"{name}_scale")
            tensor = dequantise(file.get_tensor(key), None if scale is None else file.get_tensor(scale.tensor.key))
            whole[key] = tensor.reshape(stored.tensor.shape[:1] + stored.shape[1:])
        index, count = stored.share
        return whole[key] if count == 1 else whole[key].chunk(count)[index].contiguous()


def _alpha(path: Path, stored: Tensor, target: str) -> float:
    if stored.numel() != 1 or not math.isfinite(float(stored)):
        raise CheckpointError(f"{path}: the alpha of {target} must be one finite number, got {stored.tolist()}")
    return float(stored)


def _whole_scale(said: Sequence[Statement], names: tuple[str, ...]) -> float | None:
    for statement in said:
        rank, alpha = statement.of(names)
        if rank is not None and alpha is not None:
            return alpha / rank
    return None


def load_lora(path: str | Path, *, transformer: Transformer | None = None) -> LoraWeights:
    """Reads a LoRA file of low-rank factors, in any of the layouts of `lora_layout.LAYOUTS` and their like.

    Args:
        path: safetensors file, a folder with one, or a hub name `owner/name[/file]`.
        transformer: where given (a module, or shapes by parameter name), every module and shape is checked against it.

    Returns:
        {diffusers module name: (lora_A, lora_B, alpha or None)}, tensors on the CPU in the dtype of the file, fp8
        dequantised (`.lora_A.weight_scale` or `.scale_weight` beside it is its scale). Alpha comes from the `.alpha`
        tensors, the header's metadata, or a configuration beside the file, in this order; a rank-stabilised one is
        given as the alpha for which alpha / rank is the scale. The published files have none.

    Raises:
        CheckpointError: no LoRA, halves missing, ranks that disagree, modules or shapes the transformer does not have,
            places that disagree about alpha or rank, or changes of other kinds (for those: `LoRA.from_file`).
    """
    found: LoraWeights = {}
    for target, change in read_changes(path, transformer=transformer).items():
        if not isinstance(change, LoRAFactors):
            raise CheckpointError(f"{path}: {target} has no low-rank factors; read it with LoRA.from_file")
        found[target] = (change.a, change.b, change.alpha)
    return found


def read_changes(path: str | Path, *, transformer: Transformer | None = None) -> dict[str, Change]:
    """Reads a LoRA file: the change of each parameter, by module name for weights, by whole name for others.

    Args, Raises: as `load_lora`; changes of every kind that can be computed exactly are read.
    """
    found = check_lora_file(path, transformer=transformer)
    if found.left_out:
        logger.warning(
            "%s: %d keys of the text connectors or a text encoder are left out, as the official merge does",
            found.path,
            len(found.left_out),
        )
    return found.changes(read=True)


def check_lora_file(path: str | Path, *, transformer: Transformer | None = None) -> LoRAFile:
    """Checks a LoRA file from its header alone (and its alphas, of one number each).

    Args:
        path: as for `load_lora`.
        transformer: where given (on the meta device, or shapes by parameter name), every module and shape is checked
            against it, and underscored names are looked up in it.

    Raises:
        CheckpointError: as `load_lora`.
    """
    found = describe_lora_file(path, transformer=transformer)
    changes = found.changes()
    if transformer is not None:
        problems = misfits(changes, parameter_shapes(transformer))
        if problems:
            raise CheckpointError(f"{found.path} does not fit the transformer; {'; '.join(problems)}")
    return found


def describe_lora_file(path: str | Path, *, transformer: Transformer | None = None) -> LoRAFile:
    """Sorts the keys of a LoRA file by what they change; nothing of their shapes is checked.

    Raises:
        CheckpointError: keys of no known kind, none at all, two for one part, several adapters, names that stand for no
            module or for several.
    """
    header = read_header(local_lora(path))
    names = ModuleNames(None if transformer is None else parameter_shapes(transformer))
    targets: dict[str, dict[str, Stored]] = {}
    written: dict[str, str] = {}
    adapters: dict[str, str] = {}
    left_out, unknown, nameless, twice = [], [], [], []
    for key, tensor in header.tensors.items():
        if is_foreign(key):
            left_out.append(key)
            continue
        part = read_key(key)
        if part is None:
            unknown.append(key)
            continue
        adapters.setdefault(part.adapter, key)
        target = names(part.module)
        if target is None:
            nameless.append(part.module)
            continue
        for one, name, stored in _targets_of(part, target, tensor, names):
            if name in targets.setdefault(one, {}):
                twice.append(f"{key} and {targets[one][name].tensor.key}")
            targets[one][name] = stored
            written[one] = part.module
    if left_out and len(left_out) == len(header.tensors):
        raise CheckpointError(
            f"{header.path}: changes nothing of the transformer, all {len(left_out)} keys are of the text connectors or a "
            f"text encoder: {listed(left_out)}"
        )
    unread = [
        f"{stored.tensor.key} ({stored.tensor.dtype})"
        for parts in targets.values()
        for name, stored in parts.items()
        if name != "alpha" and not stored.tensor.dtype.startswith(("F", "BF"))
    ]
    if unread:
        raise CheckpointError(f"{header.path}: expected factors of floats, got {len(unread)} others: {listed(unread)}")
    _refuse_keys(header.path, targets, unknown, nameless, twice, {a: k for a, k in adapters.items() if a})
    try:
        said = statements(header, _ranks(targets.values()))
    except CheckpointError as error:
        raise CheckpointError(f"{header.path}: {error}") from error
    return LoRAFile(header, targets, written, said, left_out)


def _ranks(targets: Iterable[Mapping[str, Stored]]) -> set[int]:
    """All ranks of the factors of a file."""
    sides = {"a": 0, "hada_w1_b": 0, "lokr_w1_b": 0, "lokr_w2_b": 0}
    return {
        parts[name].shape[side]
        for parts in targets
        for name, side in sides.items()
        if name in parts and parts[name].shape
    }


def _targets_of(part: Part, target: str, tensor: StoredTensor, names: ModuleNames) -> list[tuple[str, str, Stored]]:
    """(parameter, part, where it lies) for a key: several where it is of a fused projection."""
    split = names.split(target)
    if part.part in _UNCUT or (part.part == "magnitude" and tensor.shape[:1] == (1,)):
        # A Kronecker product and the norms of columns cannot be cut: a fused projection is then no module of the transformer.
        split = (target,)
    found = []
    for index, one in enumerate(split):
        cut = len(split) > 1 and part.part in _ROWS and bool(tensor.shape) and tensor.shape[0] % len(split) == 0
        stored = Stored(tensor, (index, len(split)) if cut else (0, 1))
        if part.part == "diff_b":
            found.append((f"{one}.bias", "diff", stored))
        else:
            found.append((one, part.part, stored))
    return found


def _refuse_keys(
    path: Path,
    targets: Mapping[str, Mapping[str, Stored]],
    unknown: list[str],
    nameless: list[str],
    twice: list[str],
    adapters: Mapping[str, str],
) -> None:
    if unknown or not (targets or nameless):
        raise CheckpointError(
            f"{path}: expected keys diffusion_model.<module>.lora_A.weight and .lora_B.weight, or another layout that "
            f"`ltxkern lora --layouts` lists, got {listed([unread(key) for key in unknown]) or 'none'}"
        )
    if nameless:
        count = len(set(nameless))
        raise CheckpointError(
            f"{path} does not fit the transformer; {count} names that stand for no module of it, or for several: "
            f"{listed(sorted(set(nameless)))}"
        )
    if twice:
        raise CheckpointError(f"{path}: {len(twice)} parts are there twice: {listed(twice)}")
    if len(adapters) > 1:
        raise CheckpointError(
            f"{path}: expected one adapter, got {len(adapters)}: {listed(sorted(adapters))}; save one of them alone"
        )
