"""Loads LTX-2.3 components from official single files, diffusers folders, split downloads and hub ids, strictly, one at a time."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ltxkern.pipeline.files.headers import (
    FLOATS,
    CheckpointError,
    Header,
    StoredTensor,
    identity,
    listed,
    read_header,
    require_counts,
    require_unchanged,
)
from ltxkern.pipeline.files.hub import RANDOM, ModelFiles, find_model, local_path
from ltxkern.pipeline.files.lora_file import LoraWeights, load_lora
from ltxkern.pipeline.files.quantized import read_tensor
from ltxkern.pipeline.files.stored import Stored, bare_tensors, read_stored
from ltxkern.pipeline.files.text_files import (
    TextFiles,
    find_tokenizer,
    load_text_encoder,
    load_tokenizer,
    text_encoder_files,
)
from ltxkern.pipeline.model.components import (
    BUILDABLE,
    COMPONENT_NAMES,
    VAE_PARTS,
    Components,
    build,
    component_dtype,
)
from ltxkern.pipeline.model.shapes import Shapes, expected_shapes

__all__ = [
    "CheckpointError",
    "Header",
    "LoraWeights",
    "ModelFiles",
    "component_bytes",
    "component_config",
    "component_problem",
    "component_shapes",
    "find_model",
    "load_component",
    "load_components",
    "load_lora",
    "read_header",
    "stored_tensors",
]


def stored_tensors(files: ModelFiles | str | Path, component: str) -> Mapping[str, StoredTensor]:
    """Where each tensor of a component lies, by diffusers name.

    Args:
        files: of a model, a diffusers folder, or the component's own file or folder, which needs no configuration.
        component: one of `BUILDABLE`.
    """
    if not isinstance(files, ModelFiles):
        path = local_path(files)
        if not (path / "model_index.json").is_file():
            return bare_tensors(path, component)
        files = find_model(path)
    return read_stored(files, component).tensors


def _as_files(files: ModelFiles | str | Path, component: str) -> ModelFiles:
    if isinstance(files, ModelFiles):
        return files
    if component == "upsampler":
        return ModelFiles(upsampler=local_path(files))
    path = Path(os.path.expanduser(files))
    if path.is_dir() and not (path / "model_index.json").is_file() and (path / "config.json").is_file():
        return ModelFiles(parts={component: path})
    return find_model(files)


def _text(files: ModelFiles) -> TextFiles:
    return text_encoder_files(files.text_encoder, files.folder, files.variant)


def _half_of(component: str, tensors: Mapping[str, Any], parts: tuple[str, ...] | None) -> dict[str, Any]:
    """Names without those of the halves of a VAE that nobody reads."""
    if component not in ("video_vae", "audio_vae"):
        return dict(tensors)
    kept = _parts_of(component, parts)
    absent = tuple(f"{part}." for part in VAE_PARTS if part not in kept)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(absent)}


def _parts_of(component: str, parts: tuple[str, ...] | None) -> tuple[str, ...]:
    if parts is not None:
        return parts
    return ("decoder",) if component == "audio_vae" else VAE_PARTS


def component_problem(files: ModelFiles, component: str) -> str | None:
    """Why a component cannot be loaded, as headers and configurations tell; None where nothing speaks against it."""
    try:
        if component == "tokenizer":
            find_tokenizer(files.text_encoder, files.folder, lambda: _text(files).rows)
        elif component == "text_encoder":
            text = _text(files)
            text.check()
            text.check_connectors(component_config(files, "connectors"))
        else:
            stored = read_stored(files, component)
            shapes = _half_of(component, _expected(component, stored), None)
            _check_names(component, shapes, _half_of(component, stored.tensors, None), stored.path)
    except CheckpointError as error:
        return str(error)
    return None


def _expected(component: str, stored: Stored) -> Shapes:
    require_counts(stored.path, stored.config)
    try:
        return expected_shapes(component, stored.config)
    except ValueError as error:
        raise CheckpointError(f"{stored.path}: {error}") from error


def load_component(
    files: ModelFiles | str | Path,
    component: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    parts: tuple[str, ...] | None = None,
) -> Any:
    """Loads one component: built without memory, every tensor read once, names and shapes checked first.

    Args:
        files: what `find_model` returned, or anything it takes; for "upsampler" a path may be its file itself.
        component: one of `COMPONENT_NAMES`.
        dtype: dtype of the weights; the vocoder stays fp32. Weights in fp8 are scale times value in fp32, rounded once.
        device: where the weights go.
        parts: halves of a VAE, of ("encoder", "decoder"); default both for video, the decoder for audio.

    Raises:
        CheckpointError: missing, unexpected or wrongly shaped keys, all listed with the file.
    """
    if component not in COMPONENT_NAMES:
        raise ValueError(f"component: expected one of {', '.join(COMPONENT_NAMES)}, got {component!r}")
    files = _as_files(files, component)
    if component in ("text_encoder", "tokenizer"):
        if component == "tokenizer":
            place = find_tokenizer(files.text_encoder, files.folder, lambda: _text(files).rows)
            return load_tokenizer(place, _text(files).rows)
        text = _text(files)
        text.check()
        with opened(text.tensors.values(), device) as handles:
            return load_text_encoder(text, handles, dtype).to(device)
    stored = read_stored(files, component)
    _expected(component, stored)  # a configuration that no class takes is said in our words
    tensors = _half_of(component, stored.tensors, parts)
    try:
        module = build(component, stored.config, parts=_parts_of(component, parts))
    except ValueError as error:
        raise CheckpointError(f"{stored.path}: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check_names(component, shapes, tensors, stored.path)
    dtype = component_dtype(component, dtype)
    with opened(tensors.values(), device) as handles:
        state = {name: read_tensor(handles, tensor, dtype) for name, tensor in tensors.items()}
    # The module takes the tensors over without a copy.
    module.load_state_dict(state, strict=True, assign=True)
    return module.to(device)


@contextlib.contextmanager
def opened(tensors: Iterable[StoredTensor], device: str | torch.device = "cpu") -> Iterator[dict[Path, Any]]:
    """The files that tensors and their scales lie in, open, by path.

    Raises:
        CheckpointError: a file cannot be read, now or within the block.
    """
    tensors = list(tensors)
    paths = dict.fromkeys(tensor.path for tensor in [*tensors, *(t.scale for t in tensors if t.scale is not None)])
    try:
        with contextlib.ExitStack() as stack:
            yield {
                path: stack.enter_context(safe_open(str(path), framework="pt", device=str(device))) for path in paths
            }
    except SafetensorError as error:
        raise CheckpointError(f"{listed([str(path) for path in paths])}: cannot be read ({error})") from error


def _check_names(component: str, expected: Shapes, tensors: Mapping[str, StoredTensor], path: Path) -> None:
    missing = sorted(set(expected) - set(tensors))
    unexpected = [tensors[name].key for name in sorted(set(tensors) - set(expected))]
    wrong = [
        f"{tensor.key} (expected {expected[name]}, got {tensor.shape})"
        for name, tensor in sorted(tensors.items())
        if name in expected and tensor.shape != expected[name]
    ]
    unread = [f"{tensor.key} ({tensor.dtype})" for tensor in tensors.values() if tensor.dtype not in FLOATS]
    kinds = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong, "unsupported dtype": unread}
    problems = [f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in kinds.items() if keys]
    if problems:
        raise CheckpointError(f"{path} does not fit the {component}; " + "; ".join(problems))


def load_components(
    path_or_id: str | Path | ModelFiles,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    names: Iterable[str] | None = None,
    upsampler: str | Path | None = None,
    text_encoder: str | Path | None = None,
) -> Components:
    """The components of a model, each loaded when it is first read and then kept.

    Args:
        path_or_id: "demo-random" (drawn from a seed), what `find_model` takes, or what it returned.
        dtype: dtype of the weights (the vocoder stays fp32).
        device: where each component goes when it is loaded.
        names: components that may be loaded, the others are None; default all.
        upsampler, text_encoder: as for `find_model`.

    Raises:
        CheckpointError: nothing usable is there; on reading a component, that it does not fit or that its file has changed.
    """
    allowed = set(COMPONENT_NAMES if names is None else names)
    if unknown := sorted(allowed - set(COMPONENT_NAMES)):
        raise ValueError(f"names: expected some of {', '.join(COMPONENT_NAMES)}, got {', '.join(unknown)}")
    if str(path_or_id) == RANDOM:
        from ltxkern.pipeline.files.demo import build_demo

        demo = build_demo(dtype=dtype, device=device)
        found = Components(**{name: getattr(demo, name) for name in COMPONENT_NAMES if name in allowed})
        found.built_in = RANDOM
        return found
    model = path_or_id if isinstance(path_or_id, ModelFiles) else find_model(path_or_id)
    files = model.with_parts(upsampler, text_encoder)
    there = [name for name in allowed if is_present(files, name)]
    before = identity(dict.fromkeys(path for name in there for path in component_paths(files, name)))
    return Components(source=_FileSource(files, frozenset(allowed), dtype, device, before))


@dataclass(frozen=True)
class _FileSource:
    """Components from files, for `Components`."""

    files: ModelFiles
    allowed: frozenset[str]
    dtype: torch.dtype
    device: str | torch.device
    before: Mapping[str, list[int]]

    def has(self, name: str) -> bool:
        return is_present(self.files, name) and name in self.allowed

    def load(self, name: str) -> Any:
        require_unchanged(self.before, self.paths(name))
        return load_component(self.files, name, dtype=self.dtype, device=self.device)

    def config(self, name: str) -> Mapping[str, Any]:
        return component_config(self.files, name)

    def paths(self, name: str) -> list[Path]:
        return component_paths(self.files, name)


def is_present(files: ModelFiles, component: str) -> bool:
    """Whether there is a place to read a component from; what lies there is said by `component_problem`."""
    if component in ("text_encoder", "tokenizer"):
        return files.text_encoder is not None or files.folder is not None
    return files.own(component) is not None or (component != "upsampler" and bool(files.shared))


def component_paths(files: ModelFiles, component: str) -> list[Path]:
    """Files and folders that a component is read from: its own, or those it may share with others."""
    if component in ("text_encoder", "tokenizer"):
        own = files.text_encoder or files.folder
    else:
        own = files.own(component)
    return files.shared if own is None else [own]


def component_config(files: ModelFiles, component: str) -> Mapping[str, Any]:
    """Constructor arguments of a component's diffusers class, from the header or config.json; loads no weights."""
    return read_stored(files, component).config


def component_shapes(files: ModelFiles, component: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a component's tensors by diffusers name, from headers alone."""
    return {name: tensor.shape for name, tensor in read_stored(files, component).tensors.items()}


def component_bytes(files: ModelFiles, *, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Bytes of each component from headers alone.

    Args:
        files: what `find_model` returned.
        dtype: count every tensor in this dtype (fp32 for the vocoder); None counts it as it is stored.

    Returns:
        Bytes of the components that are there; of a VAE both halves, of Gemma the text model.
    """
    sizes = {}
    for component in BUILDABLE:
        if is_present(files, component):
            sizes[component] = _bytes(read_stored(files, component).tensors.values(), component, dtype)
    if is_present(files, "text_encoder"):
        sizes["text_encoder"] = _bytes(_text(files).tensors.values(), "text_encoder", dtype)
    return sizes


def _bytes(tensors: Iterable[StoredTensor], component: str, dtype: torch.dtype | None) -> int:
    if dtype is None:
        return sum(tensor.nbytes for tensor in tensors)
    return sum(math.prod(tensor.shape) for tensor in tensors) * component_dtype(component, dtype).itemsize
