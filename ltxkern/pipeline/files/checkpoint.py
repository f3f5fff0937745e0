"""Loads LTX-2.3 components from official single files, diffusers folders and hub ids, strictly, one at a time."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ltxkern.pipeline.files import official_config
from ltxkern.pipeline.files.headers import ITEM_BYTES, CheckpointError, Header, StoredTensor, listed, read_header
from ltxkern.pipeline.files.hub import local_path
from ltxkern.pipeline.files.lora_file import LoraWeights, load_lora
from ltxkern.pipeline.files.official_names import component_of, diffusers_name
from ltxkern.pipeline.model.components import BUILDABLE, COMPONENT_NAMES, VAE_PARTS, Components, build, component_dtype

__all__ = [
    "CheckpointError",
    "Header",
    "LoraWeights",
    "ModelFiles",
    "component_bytes",
    "component_config",
    "component_shapes",
    "find_model",
    "load_component",
    "load_components",
    "load_lora",
    "read_header",
]

_DIFFUSERS_FOLDERS = {"video_vae": "vae", "upsampler": "latent_upsampler"}


@dataclass(frozen=True)
class ModelFiles:
    """Where the components of a model lie; `checkpoint` is an official single file, `folder` a diffusers folder."""

    checkpoint: Path | None = None
    folder: Path | None = None
    upsampler: Path | None = None
    text_encoder: Path | None = None

    def with_parts(self, upsampler: str | Path | None, text_encoder: str | Path | None) -> "ModelFiles":
        """With parts from elsewhere in place of those that lie with the model; None changes nothing."""
        return ModelFiles(
            self.checkpoint,
            self.folder,
            self.upsampler if upsampler is None else local_path(upsampler),
            self.text_encoder if text_encoder is None else local_path(text_encoder),
        )


def find_model(
    path_or_id: str | Path, *, upsampler: str | Path | None = None, text_encoder: str | Path | None = None
) -> ModelFiles:
    """Finds out what a path or hub id holds, from names and headers alone.

    Args:
        path_or_id: an official single file, a diffusers folder (model_index.json), a folder that holds one official
            single file, or a hub id, downloaded where no such path exists: `owner/name` of either, or one file of it,
            `owner/name/file.safetensors`.
        upsampler: file, folder or hub id of the latent upsampler, where it does not lie with the model.
        text_encoder: folder or hub id of Gemma 3 with its tokenizer, where it does not lie with the model.

    Raises:
        CheckpointError: nothing usable is there, or the download fails.
    """
    path = local_path(path_or_id)
    found = _in_folder(path) if path.is_dir() else ModelFiles(checkpoint=path)
    return found.with_parts(upsampler, text_encoder)


def _in_folder(path: Path) -> ModelFiles:
    if (path / "model_index.json").is_file():
        upsampler = path / _DIFFUSERS_FOLDERS["upsampler"]
        return ModelFiles(folder=path, upsampler=upsampler if upsampler.is_dir() else None)
    checkpoints, upsamplers = [], []
    for file in sorted(path.glob("*.safetensors")):
        config = read_header(file).config
        if "transformer" in config:
            checkpoints.append(file)
        elif config.get("_class_name") == "LatentUpsampler" and config.get("spatial_upsample"):
            upsamplers.append(file)
    if len(checkpoints) != 1:
        names = ", ".join(file.name for file in checkpoints) or "none"
        raise CheckpointError(
            f"{path}: expected a model_index.json or exactly one official LTX-2.3 file, found {names}; name the file"
        )
    return ModelFiles(checkpoint=checkpoints[0], upsampler=upsamplers[0] if len(upsamplers) == 1 else None)


@dataclass(frozen=True)
class _Stored:
    """One component as it is stored: arguments of its class, and its tensors by diffusers name."""

    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    path: Path


def _official(path: Path, component: str) -> _Stored:
    header = read_header(path)
    upsampler = component == "upsampler"
    if upsampler:
        keys = list(header.tensors)
    else:
        keys = [key for key in header.tensors if component_of(key) == component]
    if not keys:
        raise CheckpointError(f"{path}: holds no tensors of the {component}")
    named = {diffusers_name(component, key): header.tensors[key] for key in keys}
    tensors = {name: stored for name, stored in named.items() if name is not None}
    section = (
        header.config
        if upsampler
        else header.config.get("transformer" if component == "connectors" else _section(component))
    )
    if not section:
        raise CheckpointError(f"{path}: its header has no configuration of the {component}")
    try:
        return _Stored(_official_config(component, section, tensors), tensors, path)
    except KeyError as error:
        raise CheckpointError(f"{path}: the configuration of the {component} lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _section(component: str) -> str:
    return {"video_vae": "vae"}.get(component, component)


def _official_config(
    component: str, section: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Mapping[str, Any]:
    if component == "connectors":
        return official_config.connectors_config(section, tensors["video_text_proj_in.weight"].shape[1])
    readers = {
        "transformer": official_config.transformer_config,
        "video_vae": official_config.video_vae_config,
        "audio_vae": official_config.audio_vae_config,
        "vocoder": official_config.vocoder_config,
        "upsampler": official_config.upsampler_config,
    }
    return readers[component](section)


def _diffusers(folder: Path) -> _Stored:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: expected a readable config.json ({error})") from error
    tensors: dict[str, StoredTensor] = {}
    for file in _shards(folder):
        tensors.update(read_header(file).tensors)
    return _Stored({key: value for key, value in config.items() if not key.startswith("_")}, tensors, folder)


def _shards(folder: Path) -> list[Path]:
    """The weight files of a diffusers component: those its index names, else the only one there."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointError(f"{folder}: expected one .safetensors file or an index of several, found {len(files)}")
    return files


def _stored(files: ModelFiles, component: str) -> _Stored:
    if component == "upsampler":
        if files.upsampler is None:
            raise CheckpointError("upsampler: none lies with the model; name its file or folder (upsampler=...)")
        return _diffusers(files.upsampler) if files.upsampler.is_dir() else _official(files.upsampler, component)
    if files.folder is not None:
        return _diffusers(files.folder / _DIFFUSERS_FOLDERS.get(component, component))
    if files.checkpoint is None:
        raise CheckpointError(f"{component}: expected an official file or a diffusers folder, got neither")
    return _official(files.checkpoint, component)


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
        dtype: dtype of the weights; the vocoder stays fp32.
        device: where the weights go.
        parts: halves of a VAE, of ("encoder", "decoder"); default both for video, the decoder for audio.

    Raises:
        CheckpointError: missing, unexpected or wrongly shaped keys, all listed with the file.
    """
    if component not in COMPONENT_NAMES:
        raise ValueError(f"component: expected one of {', '.join(COMPONENT_NAMES)}, got {component!r}")
    if not isinstance(files, ModelFiles):
        files = ModelFiles(upsampler=local_path(files)) if component == "upsampler" else find_model(files)
    if component in ("text_encoder", "tokenizer"):
        return _load_text(files, component, dtype, device)
    stored = _stored(files, component)
    if parts is None:
        parts = ("decoder",) if component == "audio_vae" else VAE_PARTS
    if component in ("video_vae", "audio_vae"):
        absent = tuple(f"{part}." for part in VAE_PARTS if part not in parts)
        wanted = {name: tensor for name, tensor in stored.tensors.items() if not name.startswith(absent)}
        stored = _Stored(stored.config, wanted, stored.path)
    try:
        module = build(component, stored.config, parts=parts)
    except ValueError as error:
        raise CheckpointError(f"{stored.path}: {error}") from error
    _check_names(component, module, stored)
    _fill(module, stored, component_dtype(component, dtype), device)
    return module


def _check_names(component: str, module: torch.nn.Module, stored: _Stored) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = []
    missing = sorted(set(expected) - set(stored.tensors))
    unexpected = [stored.tensors[name].key for name in sorted(set(stored.tensors) - set(expected))]
    wrong = [
        f"{tensor.key} (expected {expected[name]}, got {tensor.shape})"
        for name, tensor in sorted(stored.tensors.items())
        if name in expected and tensor.shape != expected[name]
    ]
    quantised = [
        f"{tensor.key} ({tensor.dtype})" for tensor in stored.tensors.values() if tensor.dtype not in ITEM_BYTES
    ]
    for kind, keys in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("wrong shape", wrong),
        ("unsupported dtype", quantised),
    ):
        if keys:
            problems.append(f"{len(keys)} {kind}: {listed(keys)}")
    if problems:
        raise CheckpointError(f"{stored.path} does not fit the {component}; " + "; ".join(problems))


def _fill(module: torch.nn.Module, stored: _Stored, dtype: torch.dtype, device: str | torch.device) -> None:
    """Reads each tensor once, straight to its device and dtype; the module takes it over without a copy."""
    by_file: dict[Path, list[tuple[str, StoredTensor]]] = {}
    for name, tensor in stored.tensors.items():
        by_file.setdefault(tensor.path, []).append((name, tensor))
    state = {}
    for path, entries in by_file.items():
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                for name, entry in entries:
                    tensor = file.get_tensor(entry.key)
                    state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        except SafetensorError as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
    module.load_state_dict(state, strict=True, assign=True)
    module.to(device)


def _load_text(files: ModelFiles, component: str, dtype: torch.dtype, device: str | torch.device) -> Any:
    # transformers is imported here: header-only uses of this file do without it.
    from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

    base = files.text_encoder or files.folder
    if base is None:
        raise CheckpointError(
            f"{component}: expected a folder with Gemma 3 and its tokenizer (text_encoder=...), got none"
        )
    folder = base / component if (base / component).is_dir() else base
    try:
        if component == "tokenizer":
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder, report = Gemma3ForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a readable {component} ({str(error).splitlines()[0]})") from error
    problems = {kind: sorted(map(str, report.get(f"{kind}_keys", ()))) for kind in ("missing", "mismatched")}
    if any(problems.values()):
        found = "; ".join(f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in problems.items() if keys)
        raise CheckpointError(f"{folder} does not fit the {component}; {found}")
    return encoder.eval().requires_grad_(False).to(device)


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
        path_or_id: "demo", what `find_model` takes, or what it returned.
        dtype: dtype of the weights (the vocoder stays fp32).
        device: where each component goes when it is loaded.
        names: components that may be loaded, the others are None; default all.
        upsampler, text_encoder: as for `find_model`.

    Raises:
        CheckpointError: nothing usable is there; on reading a component, that it does not fit.
    """
    allowed = set(COMPONENT_NAMES if names is None else names)
    if unknown := sorted(allowed - set(COMPONENT_NAMES)):
        raise ValueError(f"names: expected some of {', '.join(COMPONENT_NAMES)}, got {', '.join(unknown)}")
    if str(path_or_id) == "demo":
        from ltxkern.pipeline.files.demo import build_demo

        demo = build_demo(dtype=dtype, device=device)
        return Components(**{name: getattr(demo, name) for name in COMPONENT_NAMES if name in allowed})
    found = path_or_id if isinstance(path_or_id, ModelFiles) else find_model(path_or_id)
    files = found.with_parts(upsampler, text_encoder)
    return Components(source=_FileSource(files, frozenset(allowed), dtype, device))


@dataclass(frozen=True)
class _FileSource:
    """Components from files, for `Components`."""

    files: ModelFiles
    allowed: frozenset[str]
    dtype: torch.dtype
    device: str | torch.device

    def has(self, name: str) -> bool:
        if name in ("text_encoder", "tokenizer"):
            present = self.files.text_encoder is not None or self.files.folder is not None
        elif name == "upsampler":
            present = self.files.upsampler is not None
        else:
            present = True
        return present and name in self.allowed

    def load(self, name: str) -> Any:
        return load_component(self.files, name, dtype=self.dtype, device=self.device)

    def config(self, name: str) -> Mapping[str, Any]:
        return component_config(self.files, name)


def component_config(files: ModelFiles, component: str) -> Mapping[str, Any]:
    """Constructor arguments of a component's diffusers class, from the header or config.json; loads no weights."""
    return _stored(files, component).config


def component_shapes(files: ModelFiles, component: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a component's tensors by diffusers name, from headers alone."""
    return {name: tensor.shape for name, tensor in _stored(files, component).tensors.items()}


def component_bytes(files: ModelFiles, *, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Bytes of each component from headers alone.

    Args:
        files: what `find_model` returned.
        dtype: count every tensor in this dtype (fp32 for the vocoder); None counts it as it is stored.

    Returns:
        Bytes of the components that are there; of a VAE both halves, of Gemma the whole folder.
    """
    sizes = {}
    for component in BUILDABLE:
        if component == "upsampler" and files.upsampler is None:
            continue
        sizes[component] = _bytes(_stored(files, component).tensors.values(), component, dtype)
    base = files.text_encoder or files.folder
    if base is not None:
        folder = base / "text_encoder" if (base / "text_encoder").is_dir() else base
        tensors = [tensor for file in _shards(folder) for tensor in read_header(file).tensors.values()]
        sizes["text_encoder"] = _bytes(tensors, "text_encoder", dtype)
    return sizes


def _bytes(tensors: Iterable[StoredTensor], component: str, dtype: torch.dtype | None) -> int:
    if dtype is None:
        return sum(tensor.nbytes for tensor in tensors)
    return sum(math.prod(tensor.shape) for tensor in tensors) * component_dtype(component, dtype).itemsize
