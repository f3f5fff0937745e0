"""Weights stored in fp8: which scale belongs to which weight, and the exact value; anything narrower is named and refused."""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ltxkern.pipeline.files.headers import FLOAT8, FLOATS, CheckpointError, Header, StoredTensor, listed, read_bytes

logger = logging.getLogger(__name__)

# What people call the number that an fp8 weight is multiplied by; the published "inverse" is the inverse of the one that
# was applied when it was stored, so it multiplies too.
_SCALE = re.compile(
    r"(?P<weight>.+\.)(?:weight_scale|scale_weight|weight_scale_inv|scale_weight_inv|weights_scaling_factor|weight\.scale)$"
    r"|(?P<parameter>.+)_scale(?:_inv)?$"
)
# For kernels that compute in fp8, or as a remark: a weight that is multiplied out needs none of them.
_IGNORED = re.compile(
    r"(?:^|\.)(?:input_scale|scale_input|input_scale_inv|output_scale|scale_output|activation_scaling_factor|comfy_quant"
    r"|scaled_fp8|fp8_scaled)$"
)
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
    (re.compile(r"\.weight_scale_2$|\.weight_global_scale$"), "nvfp4"),
)
_FOREIGN_DTYPES = {"I8": "int8", "U8": "packed 4 or 8 bit integers", "F4": "fp4", "F8_E8M0": "mxfp8"}
_DEFAULT_BLOCK = 128


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
    foreign = _foreign_quantisation(tensors, headers)
    if foreign is not None:
        raise CheckpointError(
            f"{path}: its weights are quantised as {foreign}, which is not read here: take a bf16 or an fp8 file"
        )
    ignored = Counter(match[0].rpartition(".")[2] for name in tensors if (match := _IGNORED.search(name)))
    if ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
        logger.info("%s: %s not needed, since fp8 weights are multiplied out when they are read", path, kinds)
    kept = {name: tensor for name, tensor in tensors.items() if not _IGNORED.search(name)}
    owners: dict[str, list[str]] = {}
    for name in kept:
        match = _SCALE.match(name)
        owner = match and (f"{match['weight']}weight" if match["weight"] else match["parameter"])
        if owner in kept and owner != name:
            owners.setdefault(str(owner), []).append(name)
    announced = _announced_blocks([config.get("quantization_config"), *(_without_config(header) for header in headers)])
    for owner, scales in owners.items():
        if len(scales) > 1:
            raise CheckpointError(
                f"{path}: {kept[owner].key} has {len(scales)} scales, {listed(sorted(scales))}: one was expected"
            )
        scale = kept.pop(scales[0])
        kept[owner] = replace(kept[owner], scale=scale, blocks=_blocks(path, kept[owner], scale, announced))
    if owners or any(kind.endswith("fp8") for kind in ignored):
        _refuse_unscaled(path, kept)
    return kept


def _refuse_unscaled(path: Any, tensors: Mapping[str, StoredTensor]) -> None:
    """A file of scaled fp8 without the scales of some matrices has lost them: taken as they are, they would be wrong."""
    lost = [t.key for t in tensors.values() if t.dtype in FLOAT8 and len(t.shape) > 1 and t.scale is None]
    if lost:
        raise CheckpointError(
            f"{path}: is marked as scaled fp8, or scaled elsewhere, but {len(lost)} fp8 weights have no scale: {listed(lost)}"
        )


def _foreign_quantisation(tensors: Mapping[str, StoredTensor], headers: Iterable[Header]) -> str | None:
    """The name of a quantisation that is not fp8 with scales; None where there is none."""
    for pattern, name in _FOREIGN_KEYS:
        if any(pattern.search(key) for key in tensors):
            return name
    for header in headers:
        layers = header.metadata.get("_quantization_metadata")
        layers = layers.get("layers") if isinstance(layers, dict) else None
        for layer in layers.values() if isinstance(layers, dict) else ():
            announced = layer.get("format") if isinstance(layer, dict) else layer
            if isinstance(announced, str) and not _is_float8(announced):
                return announced
        for key, tensor in header.tensors.items():
            weight = header.tensors.get(key.removesuffix("comfy_quant") + "weight")
            if weight is not None and key.endswith("comfy_quant") and weight.dtype not in FLOATS:
                announced = _format_in(read_bytes(header, tensor))
                if announced is not None and not _is_float8(announced):
                    return announced
    for name, tensor in tensors.items():
        if name.endswith(".weight") and len(tensor.shape) > 1 and tensor.dtype in _FOREIGN_DTYPES:
            return _FOREIGN_DTYPES[tensor.dtype]
        if _SCALE.match(name) and tensor.dtype == "F8_E8M0":
            return "mxfp8"
    return None


def _is_float8(name: str) -> bool:
    return re.match(r"(?:torch\.)?(?:(?:float|fp|f)_?8|e4m3|e5m2)", name.lower()) is not None


def _format_in(content: bytes) -> str | None:
    try:
        described = json.loads(content.rstrip(b"\0"))
    except ValueError:
        return None
    name = described.get("format") if isinstance(described, dict) else None
    return name if isinstance(name, str) else None


def _without_config(header: Header) -> dict[str, Any]:
    return {key: value for key, value in header.metadata.items() if key != "config"}


def _announced_blocks(descriptions: list[Any]) -> tuple[int, ...]:
    """Block sizes that descriptions name, wherever in them."""
    found: list[int] = []

    def search(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                sizes = inner if isinstance(inner, list) else [inner]
                if re.search(r"block_?size|group_?size", str(key)) and all(type(size) is int for size in sizes):
                    found.extend(sizes)
                else:
                    search(inner)
        elif isinstance(value, list):
            for inner in value:
                search(inner)

    search(descriptions)
    return tuple(dict.fromkeys(size for size in found if size > 0))


def _blocks(path: Any, tensor: StoredTensor, scale: StoredTensor, announced: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight, taken as a matrix, that share one number of its scale."""
    rows, columns = _matrix(tensor.shape)
    shape = scale.shape
    sides: tuple[int, int] | None = None
    if math.prod(shape) == 1 or (len(shape) == 1 and shape[0] == rows):
        sides = (math.prod(shape), 1)
    elif len(shape) > 1 and math.prod(shape[2:]) == 1:
        sides = (shape[0], shape[1])
    elif len(shape) == 4 and shape[1] == shape[3] == 1:
        sides = (shape[0], shape[2])  # (row blocks, 1, column blocks, 1), ready to be broadcast
    if sides is None or scale.dtype not in FLOATS:
        raise CheckpointError(
            f"{path}: the scale {scale.key} {shape} ({scale.dtype}) does not fit {tensor.key} {tensor.shape}: "
            "expected one number, one per row, or one per block"
        )
    found = (_block(rows, sides[0], announced), _block(columns, sides[1], announced))
    if found[0] is None or found[1] is None:
        raise CheckpointError(
            f"{path}: the blocks of the scale {scale.key} {shape} over {tensor.key} {tensor.shape} cannot be told"
        )
    return found[0], found[1]


def _block(length: int, count: int, announced: tuple[int, ...]) -> int | None:
    """Length of the blocks when `count` of them cover a side; None where no size fits, or several unannounced ones do."""
    if count in (1, length):
        return length if count == 1 else 1
    for size in (*announced, _DEFAULT_BLOCK):
        if -(-length // size) == count:
            return size
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
    """One weight from the open files it and its scale lie in, ready to be computed with."""
    scale = None if stored.scale is None else files[stored.scale.path].get_tensor(stored.scale.key)
    return dequantised(files[stored.path].get_tensor(stored.key), scale, stored.blocks, dtype)
