"""Reads safetensors headers and JSON descriptions without loading weights, and says what is wrong with a file that cannot serve."""

import functools
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxkern.pipeline.files.official_names import component_of

FLOAT8 = ("F8_E4M3", "F8_E5M2")
FLOATS = ("F64", "F32", "F16", "BF16", *FLOAT8)
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I64": 8, "I32": 4, "I16": 2,
    "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_SHOWN_KEYS = 8
_LONGEST_HEADER = 100_000_000  # the format allows no longer one
_LARGEST = 2**63 - 1  # dimension or offset
_MOST_NUMBERS = 66  # of a tensor: as many dimensions as torch has, and two offsets
_MOST_LAYERS = 1000
_LAYER_MARK = ".comfy_quant"
_LONGEST_MARK = 2**16  # bytes; a few words of JSON
# What people have under a model's name: how it begins, and what it is.
_OTHER_FILES = (
    (b"version https://git-lfs", "a git-LFS pointer in place of the file: run git lfs pull, or download it again"),
    (b"GGUF", "a GGUF file, which is not read here: take the safetensors file of the model"),
    (b"PK\x03\x04", "a zip archive (a pickled .pt or .ckpt?), which is not read here: take the safetensors file"),
    (b"\x80", "a pickle, which is not read here: take the safetensors file"),
)


class CheckpointError(ValueError):
    """A file that cannot serve: what is wrong, which keys, which file."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, key in it, safetensors dtype, shape; of a scaled one its scale, and the scale's blocks.

    blocks: rows and columns that share one number of the scale.
    """

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    scale: "StoredTensor | None" = None
    blocks: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file, those of its scale included."""
        own = math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 1)
        return own if self.scale is None else own + self.scale.nbytes


@dataclass(frozen=True, eq=False)
class Header:
    """The header of a safetensors file: tensors by key, and the metadata with JSON values decoded.

    Headers of the same words are one object, so that what follows from one can be kept by it.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, Any]
    offsets: Mapping[str, int]

    @functools.cached_property
    def components(self) -> Mapping[str, list[str]]:
        """Keys of an official file by the component they belong to."""
        found: dict[str, list[str]] = {}
        for key in self.tensors:
            if (component := component_of(key)) is not None:
                found.setdefault(component, []).append(key)
        return found

    @functools.cached_property
    def layer_formats(self) -> Mapping[str, Mapping[str, Any]]:
        """How the file says that single weights are quantised, by key: the metadata's list, and the JSON beside them."""
        listed_layers = self.metadata.get("_quantization_metadata")
        listed_layers = listed_layers.get("layers") if isinstance(listed_layers, dict) else None
        described: dict[str, Any] = {}
        start = ""
        for layer, words in (listed_layers if isinstance(listed_layers, dict) else {}).items():
            name = f"{layer.removesuffix('.weight')}.weight"
            if f"{start}{name}" not in self.tensors:  # the list may leave out what all keys start with
                start = next((key.removesuffix(name) for key in self.tensors if key.endswith(f".{name}")), start)
            if f"{start}{name}" in self.tensors:
                described[f"{start}{name}"] = words
        marks = [key for key, t in self.tensors.items() if key.endswith(_LAYER_MARK) and t.nbytes <= _LONGEST_MARK]
        for key, content in zip(marks, read_bytes(self, [self.tensors[key] for key in marks]), strict=True):
            if (weight := f"{key.removesuffix(_LAYER_MARK)}.weight") in self.tensors:
                described[weight] = decoded(content.rstrip(b"\0").decode(errors="replace"))
        return {
            key: words if isinstance(words, dict) else {"format": words}
            for key, words in described.items()
            if isinstance(words, dict | str)
        }

    @property
    def config(self) -> Mapping[str, Any]:
        """The official configuration, empty where the file carries none."""
        config = self.metadata.get("config", {})
        return config if isinstance(config, dict) else {}


def read_header(path: str | Path) -> Header:
    """Reads the header of a safetensors file and checks that the file is complete; loads no weights.

    Raises:
        CheckpointError: the file is missing, is not a safetensors file, or does not end where its last tensor does.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            # Other files may give a length that fits: the first bytes of GGUF read as 14 GB.
            if length > min(size - 8, _LONGEST_HEADER) or size < 8:
                what = _other_file(path)
                reason = f"but {what}" if what else f"or cut off in its header ({size} bytes)"
                raise CheckpointError(f"{path}: not a safetensors file, {reason}")
            return _header(path, size, file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


@functools.lru_cache(maxsize=64)
def _header(path: Path, size: int, written: bytes) -> Header:
    """What is written in a header; the same words are understood once, however often they are asked for."""
    length = len(written)
    try:
        content = json.loads(written, object_pairs_hook=_without_twins)
        metadata = content.pop("__metadata__", None) or {}
        tensors, offsets, spans = {}, {}, []
        for key, info in sorted(content.items()):
            tensor = StoredTensor(path, key, info["dtype"], tuple(info["shape"]))
            first, last = info["data_offsets"]
            if wrong := _misplaced(tensor, first, last):
                raise CheckpointError(f"{path}: damaged, {wrong}; download it again")
            tensors[key], offsets[key] = tensor, 8 + length + first
            spans.append((first, last, key))
        words = {key: decoded(value) for key, value in metadata.items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        what = _other_file(path)
        said = (
            f" (its header is not readable: {error})"
            if isinstance(error, _TwinsError)
            else " (its header is not readable)"
        )
        raise CheckpointError(f"{path}: not a safetensors file" + (f", but {what}" if what else said)) from error
    end = 0
    for first, last, key in sorted(spans):
        if first != end:
            how = (
                f"overlaps what lies before it by {end - first} bytes"
                if first < end
                else f"follows a hole of {first - end} bytes"
            )
            raise CheckpointError(f"{path}: damaged, {key} {how}; download it again")
        end = last
    end += 8 + length
    if size < end:
        raise CheckpointError(f"{path}: truncated, expected {end} bytes, got {size}; download it again")
    if size > end:
        raise CheckpointError(f"{path}: damaged, {size - end} bytes follow its last tensor; download it again")
    return Header(path, tensors, words, offsets)


class _TwinsError(ValueError):
    """A key that is there twice."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose last value would win unseen where a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwinsError(f"{next(name for name in names if names.count(name) > 1)[:80]} is there twice")
    return found


def _misplaced(tensor: StoredTensor, first: Any, last: Any) -> str:
    """What is wrong with a tensor's shape or with where it lies; empty where nothing is."""
    numbers = (*tensor.shape, first, last)
    if len(numbers) > _MOST_NUMBERS or not all(type(number) is int and 0 <= number <= _LARGEST for number in numbers):
        return f"{tensor.key} {tensor.shape[:_MOST_NUMBERS]} at bytes {first} to {last}"
    if not isinstance(tensor.dtype, str):
        return f"{tensor.key} of dtype {tensor.dtype!r}"
    # A kind of number that is not known here has a bit at least.
    known, bits = tensor.dtype in ITEM_BYTES, 8 * (last - first)
    if first > last or (8 * tensor.nbytes != bits if known else math.prod(tensor.shape) > bits):
        return f"{tensor.key} {tensor.shape} in {last - first} bytes"
    return ""


def identity(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of change of files, and of those within folders, by whole name."""
    found = {}
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                status = file.stat()
                found[str(file.absolute())] = [status.st_size, status.st_mtime_ns]
    return found


def require_unchanged(before: Mapping[str, list[int]], paths: Iterable[Path]) -> None:
    """Refuses files that are not what they were: parts of two models would be put together.

    Raises:
        CheckpointError: with their names.
    """
    now = identity(paths)
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed:
        raise CheckpointError(f"{listed(changed)}: changed since the model was opened: open it again")


def read_bytes(header: Header, tensors: Iterable[StoredTensor]) -> list[bytes]:
    """The raw bytes of small tensors of a file."""
    found = []
    with header.path.open("rb") as file:
        for tensor in tensors:
            file.seek(header.offsets[tensor.key])
            found.append(file.read(tensor.nbytes))
    return found


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON description.

    Raises:
        CheckpointError: no such file, not JSON, not an object; with the file's name and what it is instead.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file (expected a readable {path.name})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        what = _other_file(path)
        reason = f"it is {what}" if what else str(error).splitlines()[0]
        raise CheckpointError(f"{path}: expected a readable {path.name} ({reason})") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: expected a readable {path.name} (it is nested too deeply)") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def require_counts(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses a configuration whose list of layers alone would take minutes to write down.

    Raises:
        CheckpointError: with the entry.
    """
    for name, value in config.items():
        counts = value if isinstance(value, list | tuple) else [value]
        if "layers" in name and any(isinstance(count, int) and count > _MOST_LAYERS for count in counts):
            raise CheckpointError(f"{path}: expected at most {_MOST_LAYERS} {name} in its configuration, got {value}")


def _other_file(path: Path) -> str:
    """What a file is that is not what its name says; empty where it cannot be told."""
    with path.open("rb") as file:
        start = file.read(2048)
    if not start.strip():
        return "empty: download it again"
    for beginning, what in _OTHER_FILES:
        if start.startswith(beginning):
            return what
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")) or b"<html" in text:
        return "an HTML page in place of the file (a download that asked for a login?): download it again"
    is_short_text = path.stat().st_size == len(start) and not text.startswith((b"{", b"["))
    if is_short_text and text.isascii() and text.replace(b"\n", b"").decode().isprintable():
        return f"a text that begins {start.decode().strip().splitlines()[0][:60]!r}"
    return ""


def decoded(value: str) -> Any:
    """The value that a text is the JSON of; the text itself where it is none."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


@functools.cache
def warn_once(logger: logging.Logger, sentence: str) -> None:
    """Warns of a file, which is described several times on its way; each sentence is said once."""
    logger.warning("%s", sentence)


def listed(keys: list[str]) -> str:
    """The first keys, and how many more there are."""
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return ", ".join(keys[:_SHOWN_KEYS]) + more
