"""Weights stored in fp8: which scale belongs to which weight, and the exact value; anything narrower is named and refused."""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ltxkern.pipeline.files.headers import FLOAT8, FLOATS, CheckpointError, Header, StoredTensor, listed

logger = logging.getLogger(__name__)

# What people call the number that an fp8 weight is multiplied by; the published "inverse" is the inverse of the one that
# was applied when it was stored, so it multiplies too. `bare` may also be a parameter's own name.
_SCALE = re.compile(
    r"(?P<weight>.+\.)(?:weights?_scales?(?:_inv)?|scales?_weights?(?:_inv)?|weights?_scaling_factor|weight\.scales?)$"
    r"|(?P<bare>.+\.)scales?(?:_inv)?$"
    r"|(?P<parameter>.+)_scales?(?:_inv)?$"
)
# For kernels that compute in fp8, or as a remark: a weight that is multiplied out needs none of them.
_IGNORED = re.compile(
    r"(?:^|\.)(?:(?:input|output|activation|act)s?_(?:scales?(?:_inv)?|a(?:bs)?max|scaling_factor)"
    r"|scales?_(?:input|output)s?|(?:input|output)_quantizer\._a?max|[qkv]_scale|comfy_quant|scaled_fp8|fp8_scaled)$"
)
_MARK = re.compile(r"(?P<start>.*\.|)(?:scaled_fp8|fp8_scaled)$")
# Keys that give a quantisation away.
_FOREIGN_KEYS = (
    (re.compile(r"bitsandbytes__nf4$"), "nf4 (bitsandbytes)"),
    (re.compile(r"bitsandbytes__fp4$"), "fp4 (bitsandbytes)"),
    (re.compile(r"\.SCB$|\.weight_format$"), "int8 (bitsandbytes)"),
    (re.compile(r"\.(?:nested_)?absmax$|\.quant_map$"), "4 bit (bitsandbytes)"),
    (re.compile(r"\.wscales$|\.smooth_factor(?:_orig)?$"), "SVDQuant (nunchaku)"),
    (re.compile(r"\.qweight$|\.qzeros$"), "GPTQ or AWQ"),
    (re.compile(r"\.W_q$"), "HQQ"),
    (re.compile(r"\.weight\._(?:data|scale|shift)$"), "quanto"),
    (re.compile(r"\.weight_packed$"), "packed integers (compressed-tensors)"),
    (re.compile(r"(?:\.|^|_)weight_?:?_?qdata$"), "torchao"),
    (re.compile(r"\.weight_scale_2$|\.weight_global_scale$"), "nvfp4"),
)
_FOREIGN_DTYPES = {
    "I8": "int8", "U8": "packed 4 or 8 bit integers", "I32": "packed integers", "F4": "fp4", "F8_E8M0": "mxfp8",
    "F6_E2M3": "fp6", "F6_E3M2": "fp6", "F8_E4M3FNUZ": "fp8 of another kind (fnuz)", "F8_E5M2FNUZ": "fp8 of another kind (fnuz)",
}  # fmt: skip
# Words beside a float8 format that say the values were changed by more than a scale.
_CHANGED = re.compile(r"rot|hadamard|asym|zero_?point|codebook|perm|smooth|svd", re.IGNORECASE)
_USUAL_BLOCKS = ((128, 128),)


def with_scales(
    path: Any, tensors: Mapping[str, StoredTensor], headers: Iterable[Header], config: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Parameters with their scales attached; marks and scales of inputs left out, with a word in the log.

    Args:
        path: of the model, for messages.
        tensors: of a component, by module name.
        headers: of the files they lie in.
        config: of the component, which may name block sizes.

    Raises:
        CheckpointError: a quantisation that is not fp8, by name; a scale that fits no weight or comes twice.
    """
    headers = list(headers)
    formats = {key: words for header in headers for key, words in header.layer_formats.items()}
    foreign = _foreign_quantisation(tensors, formats)
    if foreign is not None:
        raise CheckpointError(
            f"{path}: its weights are quantised as {foreign}, which is not read here: take a bf16 or an fp8 file"
        )
    ignored = {name: match[0].rpartition(".")[2] for name in tensors if (match := _IGNORED.search(name))}
    if ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(ignored.values()).items()))
        logger.info("%s: %s not needed, since fp8 weights are multiplied out when they are read", path, kinds)
    kept = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    owners: dict[str, list[str]] = {}
    for name in kept:
        if (owner := _owner(name, kept)) is not None:
            owners.setdefault(owner, []).append(name)
    pairs: dict[str, StoredTensor] = {}
    for owner, scales in owners.items():
        if len(scales) > 1:
            raise CheckpointError(
                f"{path}: {kept[owner].key} has {len(scales)} scales, {listed(sorted(scales))}: one was expected"
            )
        pairs[owner] = kept.pop(scales[0])
    blocks = _Blocks(
        path, [config.get("quantization_config"), *(_without_config(header) for header in headers)], formats
    )
    blocks.learn((kept[owner], scale) for owner, scale in pairs.items())
    for owner, scale in pairs.items():
        kept[owner] = replace(kept[owner], scale=scale, blocks=blocks.of(kept[owner], scale))
    marks = [match["start"] for header in headers for key in header.tensors if (match := _MARK.match(key))]
    _refuse_unscaled(path, kept, formats, tuple(marks))
    return kept


def _owner(name: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """The parameter that a tensor of this name scales; None where it is none's scale."""
    match = _SCALE.match(name)
    if match is None:
        return None
    owner = match["parameter"] or f"{match['weight'] or match['bare']}weight"
    if owner not in tensors or owner == name or (match["bare"] and tensors[owner].dtype not in FLOAT8):
        return None
    return owner


def _refuse_unscaled(
    path: Any, tensors: Mapping[str, StoredTensor], formats: Mapping[str, Any], marks: tuple[str, ...]
) -> None:
    """Tells fp8 matrices that were stored as they are from those that lost their scale, which would be wrong by its size.

    Lost: where the file lists the weights that were scaled, those on the list; where it does not, those whose namesakes in
    other blocks have a scale, and all of a file that is marked as scaled and holds none.
    """
    bare = {name: t for name, t in tensors.items() if t.dtype in FLOAT8 and len(t.shape) > 1 and t.scale is None}
    named = [t.key for t in bare.values() if t.key in formats]
    if named:
        raise CheckpointError(
            f"{path}: says that {listed(named)} was stored as float8 with a scale, and the scale is not there "
            f"(expected {named[0]}_scale): download the file again, or take another"
        )
    kinds = {_kind(name) for name, t in tensors.items() if t.scale is not None}
    if not bare or any(t.key in formats for t in tensors.values()):
        return
    marked = [name for name, t in bare.items() if t.key.startswith(marks)] if marks and not kinds else []
    lost = [bare[name].key for name in bare if _kind(name) in kinds or name in marked]
    if lost:
        raise CheckpointError(
            f"{path}: is marked as scaled fp8, or scaled elsewhere, but {len(lost)} fp8 weights have no scale: {listed(lost)}"
        )
    if kinds:
        keys = [t.key for t in bare.values()]
        logger.warning("%s: %d fp8 weights have no scale and are taken as they are: %s", path, len(keys), listed(keys))


def _kind(name: str) -> str:
    """A name without its numbers, which the namesakes in all blocks share."""
    return re.sub(r"\d+", "*", name)


def _foreign_quantisation(tensors: Mapping[str, StoredTensor], formats: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The name of a quantisation that is not fp8 with scales; None where there is none."""
    for pattern, name in _FOREIGN_KEYS:
        if any(pattern.search(key) for key in tensors):
            return name
    for tensor in tensors.values():
        words = formats.get(tensor.key, {})
        announced = words.get("format")
        if isinstance(announced, str) and not _is_float8(announced):
            return announced
        changed = [str(word) for word, value in words.items() if value and _CHANGED.search(str(word))]
        if changed:
            return f"{announced} with {listed(changed)}"
    for name, tensor in tensors.items():
        if name.endswith(".weight") and len(tensor.shape) > 1 and tensor.dtype in _FOREIGN_DTYPES:
            return _FOREIGN_DTYPES[tensor.dtype]
        if _owner(name, tensors) is not None and tensor.dtype in ("F8_E8M0", "U8"):
            return "mxfp8"
    return None


def _is_float8(name: str) -> bool:
    return re.match(r"(?:torch\.)?(?:(?:float|fp|f)_?8|e4m3|e5m2)", name.lower()) is not None


def _without_config(header: Header) -> dict[str, Any]:
    return {key: value for key, value in header.metadata.items() if key != "config"}


def _announced_blocks(descriptions: list[Any]) -> tuple[tuple[int, int], ...]:
    """Block sizes, rows and columns, that descriptions name, wherever in them; one number stands for either side."""
    found: list[tuple[int, int]] = []

    def search(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                sizes = inner if isinstance(inner, list) else [inner]
                if not re.search(r"block_?size|group_?size", str(key)):
                    search(inner)
                elif len(sizes) in (1, 2) and all(type(size) is int and size > 0 for size in sizes):
                    found.append((sizes[0], sizes[-1]))
        elif isinstance(value, list):
            for inner in value:
                search(inner)

    search(descriptions)
    return tuple(dict.fromkeys(found))


class _Blocks:
    """Which numbers of a scale belong to which part of a weight.

    Args:
        path: of the model, for messages.
        descriptions: that may name block sizes.
        formats: of single weights, by key.
    """

    def __init__(self, path: Any, descriptions: list[Any], formats: Mapping[str, Any]) -> None:
        self._path, self._formats = path, formats
        self._announced = _announced_blocks(descriptions)
        self._lines: set[str] = set()

    def learn(self, pairs: Iterable[tuple[StoredTensor, StoredTensor]]) -> None:
        """Takes from the weights that are not square whether one number each belongs to the rows or to the columns."""
        for tensor, scale in pairs:
            fitting = _lines(tensor, scale)
            if len(fitting) == 1:
                self._lines.update(fitting)

    def of(self, tensor: StoredTensor, scale: StoredTensor) -> tuple[int, int]:
        """Rows and columns of a weight, taken as a matrix, that share one number of its scale.

        Raises:
            CheckpointError: the scale does not fit, or fits in several ways.
        """
        path = self._path
        rows, columns = _matrix(tensor.shape)
        shape = scale.shape
        sides: tuple[int, int] | None = None
        if math.prod(shape) == 1:
            sides = (1, 1)
        elif len(shape) == 1:
            sides = {"row": (rows, 1), "column": (1, columns), None: None}[self._line(tensor, scale)]
        elif len(shape) > 1 and math.prod(shape[2:]) == 1:
            sides = (shape[0], shape[1])
        elif len(shape) == 4 and shape[1] == shape[3] == 1:
            sides = (shape[0], shape[2])  # (row blocks, 1, column blocks, 1), ready to be broadcast
        if sides is None or scale.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: the scale {scale.key} {shape} ({scale.dtype}) does not fit {tensor.key} {tensor.shape}: "
                "expected one number, one per row, one per column, or one per block"
            )
        of_its_own = _announced_blocks([self._formats.get(tensor.key)])
        fitting: set[tuple[int, int]] = set()
        for sizes in (of_its_own, self._announced, _USUAL_BLOCKS):
            found = [(_block(rows, sides[0], row), _block(columns, sides[1], column)) for row, column in sizes]
            if fitting := {(row, column) for row, column in found if row is not None and column is not None}:
                break
        else:
            only = _only_block(rows, sides[0]), _only_block(columns, sides[1])
            if only[0] is not None and only[1] is not None:
                fitting = {(only[0], only[1])}
        if len(fitting) != 1:
            raise CheckpointError(
                f"{path}: the blocks of the scale {scale.key} {shape} over {tensor.key} {tensor.shape} cannot be told"
            )
        return fitting.pop()

    def _line(self, tensor: StoredTensor, scale: StoredTensor) -> str | None:
        """ "row" or "column": what each number of a scale in one dimension belongs to."""
        fitting = _lines(tensor, scale)
        if len(fitting) < 2:
            return next(iter(fitting), None)
        words = str(self._formats.get(tensor.key, {}).get("format", "")).lower()
        said = {line for line in fitting if line in words} or self._lines
        if len(said) != 1:
            raise CheckpointError(
                f"{self._path}: the scale {scale.key} {scale.shape} over {tensor.key} {tensor.shape} may hold one number per "
                "row (output channel) or one per column (input channel), and nothing in the file tells which"
            )
        return next(iter(said))


def _lines(tensor: StoredTensor, scale: StoredTensor) -> set[str]:
    """What the numbers of a scale in one dimension may belong to."""
    rows, columns = _matrix(tensor.shape)
    if len(scale.shape) != 1 or scale.shape[0] < 2:
        return set()
    return {line for line, length in (("row", rows), ("column", columns)) if length == scale.shape[0]}


def _block(length: int, count: int, size: int) -> int | None:
    """Length of the blocks when `count` of them cover a side and they are of this size, or one each; None where they are not."""
    if count in (1, length):
        return length if count == 1 else 1
    return size if -(-length // size) == count else None


def _only_block(length: int, count: int) -> int | None:
    """The only usual length of which `count` blocks cover a side; None where there is none, or several."""
    if count in (1, length):
        return length if count == 1 else 1
    powers = [2**power for power in range(1, length.bit_length()) if -(-length // 2**power) == count]
    exact = [length // count] if length % count == 0 else []
    sizes = set(powers + exact)
    return sizes.pop() if len(sizes) == 1 else None


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0] if shape else 1), math.prod(shape[1:])


def dequantised(
    value: torch.Tensor, scale: torch.Tensor | None, blocks: tuple[int, int] | None, dtype: torch.dtype
) -> torch.Tensor:
    """A stored weight in the dtype it runs in: scale times value in fp32, rounded once.

    Args:
        value: as stored.
        scale: as stored; None: the value alone.
        blocks: rows and columns that share a number of the scale.
        dtype: of the result.
    """
    if scale is None or blocks is None:
        return value.to(dtype) if value.is_floating_point() else value
    rows, columns = _matrix(tuple(value.shape))
    sides = -(-rows // blocks[0]), -(-columns // blocks[1])
    numbers = scale.to(torch.float32).reshape(sides)
    numbers = numbers.repeat_interleave(blocks[0], 0)[:rows] if sides[0] > 1 else numbers
    numbers = numbers.repeat_interleave(blocks[1], 1)[:, :columns] if sides[1] > 1 else numbers
    return (value.to(torch.float32).reshape(rows, columns) * numbers).reshape(value.shape).to(dtype)


def read_tensor(files: Mapping[Any, Any], stored: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    """One weight from the open files it and its scale lie in, ready to be computed with.

    Raises:
        CheckpointError: its scale holds what no scale can be.
    """
    value = files[stored.path].get_tensor(stored.key)
    if stored.scale is None:
        return dequantised(value, None, None, dtype)
    scale = files[stored.scale.path].get_tensor(stored.scale.key)
    _require_scale(stored, value, scale)
    return dequantised(value, scale, stored.blocks, dtype)


def _require_scale(stored: StoredTensor, value: torch.Tensor, scale: torch.Tensor) -> None:
    """Refuses numbers that are no scale: largest values by which weights were divided are positive and finite.

    A zero is one only where all it multiplies is zero, as in rows that were never trained.
    """
    numbers = scale.to(torch.float32)
    wrong = numbers[~(numbers.isfinite() & (numbers > 0))]  # also takes NaN
    zeros = wrong.numel() > 0 and bool((wrong == 0).all())
    if zeros:
        erased = dequantised(value, (numbers == 0).float(), stored.blocks, torch.float32)
        zeros = not bool(erased.any())
    if wrong.numel() and not zeros:
        raise CheckpointError(
            f"{stored.path}: the scale {stored.scale.key if stored.scale else ''} holds {float(wrong[0]):g} "
            f"({wrong.numel()} of its {numbers.numel()} numbers): expected positive finite numbers; download the file again"
        )
