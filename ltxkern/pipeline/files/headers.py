"""Reads safetensors headers without loading weights, and says what is wrong with a file that cannot serve."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SHOWN_KEYS = 8


class CheckpointError(ValueError):
    """A file that cannot serve: what is wrong, which keys, which file."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, key in it, safetensors dtype, shape."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: tensors by key, and the metadata with JSON values decoded."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        """The official configuration, empty where the file carries none."""
        config = self.metadata.get("config", {})
        return config if isinstance(config, dict) else {}


def read_header(path: str | Path) -> Header:
    """Reads the header of a safetensors file and checks that the file is complete; loads no weights.

    Raises:
        CheckpointError: the file is missing, is not a safetensors file, or ends before its last tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if length > size - 8:
                raise CheckpointError(f"{path}: not a safetensors file, or cut off in its header ({size} bytes)")
            content = json.loads(file.read(length))
        metadata = content.pop("__metadata__", {})
        end = 8 + length + max((info["data_offsets"][1] for info in content.values()), default=0)
        tensors = {
            key: StoredTensor(path, key, info["dtype"], tuple(info["shape"])) for key, info in sorted(content.items())
        }
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file (its header is not readable)") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if size < end:
        raise CheckpointError(f"{path}: truncated, expected {end} bytes, got {size}; download it again")
    return Header(path, tensors, {key: _decoded(value) for key, value in metadata.items()})


def _decoded(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def listed(keys: list[str]) -> str:
    """The first keys, and how many more there are."""
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return ", ".join(keys[:_SHOWN_KEYS]) + more
