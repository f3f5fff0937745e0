"""Loads LTX-2.3 components from official single files, diffusers folders, split downloads and hub ids, strictly, one at a time."""

import contextlib
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ltxkern.pipeline.files import official_config
from ltxkern.pipeline.files.headers import FLOATS, CheckpointError, Header, StoredTensor, listed, read_header, read_json
from ltxkern.pipeline.files.lora_file import LoraWeights, load_lora
from ltxkern.pipeline.files.model_files import FOLDERS, ModelFiles, find_model, weight_files
from ltxkern.pipeline.files.official_names import component_of, diffusers_name, official_name
from ltxkern.pipeline.files.hub import local_path
from ltxkern.pipeline.files.quantized import read_tensor, with_scales
from ltxkern.pipeline.files.text_files import find_tokenizer, load_text_encoder, load_tokenizer, text_encoder_files
from ltxkern.pipeline.model.components import (
    BUILDABLE,
    CLASS_NAMES,
    COMPONENT_NAMES,
    PRODUCTION_CONFIGS,
    VAE_PARTS,
    Components,
    build,
    component_dtype,
)
from ltxkern.pipeline.model.shapes import Shapes, expected_shapes

logger = logging.getLogger(__name__)

__all__ = [
    "CheckpointError",
    "Header",
    "LoraWeights",
    "ModelFiles",
    "component_bytes",
    "component_config",
    "component_problem",
    "find_model",
    "load_component",
    "load_components",
    "load_lora",
    "read_header",
    "stored_tensors",
]

# What stands before the names in files that hold one component, as people have cut them out.
_STARTS = ("", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "first_stage_model.", "vae.", "audio_vae.", "vocoder.", "connectors.")  # fmt: skip
_OFFICIAL_STARTS = {
    "transformer": ("model.diffusion_model.",),
    "connectors": ("model.diffusion_model.", ""),
    "video_vae": ("vae.",),
    "audio_vae": ("audio_vae.",),
    "vocoder": ("vocoder.",),
    "upsampler": ("",),
}
_OFFICIAL_CLASSES = {
    "AVTransformer3DModel": ("transformer", "connectors"),
    "CausalVideoAutoencoder": ("video_vae",),
    "LatentUpsampler": ("upsampler",),
}


@dataclass(frozen=True)
class _Stored:
    """One component as it is stored: arguments of its class, and its tensors by diffusers name."""

    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    path: Path


def _stored(files: ModelFiles, component: str) -> _Stored:
    own = files.own(component)
    if own is not None and own.is_dir():
        return _diffusers(own, component, files.variant)
    if own is None and component == "upsampler":
        raise CheckpointError("upsampler: none lies with the model; name its file or folder (upsampler=...)")
    if own is None and files.folder is None and not files.shared:
        raise CheckpointError(f"{component}: expected an official file or a diffusers folder, got neither")
    if own is not None and not own.exists():
        raise CheckpointError(f"{own}: no such folder, and no {component} was named")
    return _single(files, component, own)


def _single(files: ModelFiles, component: str, own: Path | None) -> _Stored:
    """A component in its own file, or among others in shared ones.

    What its own file lacks is taken from the others: the text projection of split downloads lies apart from the connectors.
    """
    others = [path for path in files.shared if path != own]
    paths = [own, *(others if component == "connectors" else ())] if own is not None else others
    tensors: dict[str, StoredTensor] = {}
    used = []
    for path in paths:
        found = _named(read_header(path), component, whole=path == own)
        if new := {name: tensor for name, tensor in found.items() if name not in tensors}:
            tensors.update(new)
            used.append(path)
        if tensors and component != "connectors":
            break
    path = own or (used[0] if used else (files.checkpoint or files.shared[0]))
    if not tensors:
        where = "" if len(others) < 2 or own else f" (nor do {listed([other.name for other in others[1:]])})"
        raise CheckpointError(f"{path}: holds no tensors of the {component}{where}")
    headers = [read_header(file) for file in dict.fromkeys([*used, *others])]
    tensors = with_scales(path, tensors, headers[: len(used)], {})
    return _Stored(_config_of(component, path, tensors, headers), tensors, path)


def _config_of(
    component: str, path: Path, tensors: Mapping[str, StoredTensor], headers: Sequence[Header]
) -> Mapping[str, Any]:
    """Arguments of a component's class: from its file's header, a config.json beside it, another file of the model.

    A file without any, whose names and shapes are those of the published model, is that.
    """
    for header in headers:
        section = _section(component, header)
        if section:
            return _read_section(component, header.path, section, tensors)
    beside = path.parent / "config.json"
    if beside.is_file() and (config := read_json(beside)).get("_class_name") in CLASS_NAMES[component]:
        return _plain_config(component, beside, config)
    if {name: tensor.shape for name, tensor in tensors.items()} == _published_shapes(component):
        logger.warning("%s: has no configuration of the %s and is taken as the published LTX-2.3", path, component)
        return PRODUCTION_CONFIGS[component]
    raise CheckpointError(f"{path}: its header has no configuration of the {component}")


@functools.cache
def _published_shapes(component: str) -> Shapes:
    return expected_shapes(component, PRODUCTION_CONFIGS[component])


def _section(component: str, header: Header) -> Any:
    """The part of an official configuration that describes a component; a file of one component may hold it bare."""
    if component in _OFFICIAL_CLASSES.get(str(header.config.get("_class_name")), ()):
        return header.config
    return header.config.get({"connectors": "transformer", "video_vae": "vae"}.get(component, component))


def _read_section(
    component: str, path: Path, section: Any, tensors: Mapping[str, StoredTensor]
) -> Mapping[str, Any]:
    readers = {
        "transformer": official_config.transformer_config,
        "video_vae": official_config.video_vae_config,
        "audio_vae": official_config.audio_vae_config,
        "vocoder": official_config.vocoder_config,
        "upsampler": official_config.upsampler_config,
    }
    try:
        if component != "connectors":
            return readers[component](section)
        projection = tensors.get("video_text_proj_in.weight")
        if projection is None:
            raise ValueError("holds no text projection (text_embedding_projection.video_aggregate_embed.weight)")
        return official_config.connectors_config(section, projection.shape[-1])
    except KeyError as error:
        raise CheckpointError(f"{path}: the configuration of the {component} lacks {error}") from error
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _named(header: Header, component: str, *, whole: bool) -> dict[str, StoredTensor]:
    """The tensors of a component in a file by diffusers name.

    whole: the file was named for this component alone: then its names may be official or diffusers', with any start or none.
    """
    readings = _readings(header, component)
    best = next(readings)
    if whole and not _published_shapes(component).keys() <= best.keys():
        best = max([best, *readings], key=lambda reading: len(reading.keys() & _published_shapes(component).keys()))
    return best


def _readings(header: Header, component: str) -> Iterator[dict[str, StoredTensor]]:
    def official(keys: Mapping[str, str]) -> dict[str, StoredTensor]:
        """From the full official name of each key."""
        named = {
            diffusers_name(component, full): header.tensors[key]
            for full, key in keys.items()
            if component == "upsampler" or component_of(full) == component
        }
        return {name: tensor for name, tensor in named.items() if name is not None}

    yield official({key: key for key in header.tensors})
    for start in _STARTS:
        bare = {key.removeprefix(start): key for key in header.tensors if key.startswith(start)}
        if bare:
            yield {
                name: header.tensors[key]
                for name, key in bare.items()
                if name in _published_shapes(component) or component_of(official_name(component, name)) in (None, component)
            }
            for official_start in _OFFICIAL_STARTS[component]:
                yield official({official_start + name: key for name, key in bare.items()})


def _diffusers(folder: Path, component: str, variant: str | None) -> _Stored:
    """A component in a folder of its own, which may also be the whole pipeline's, or hold a bare single file."""
    if (folder / "model_index.json").is_file() and (folder / FOLDERS[component]).is_dir():
        folder = folder / FOLDERS[component]
    paths = [] if not folder.is_dir() else weight_files(folder, variant)
    if len(paths) == 1 and not (folder / "config.json").exists() and "config" in read_header(paths[0]).metadata:
        return _single(ModelFiles(), component, paths[0])
    config = read_json(folder / "config.json")
    headers = [read_header(file) for file in paths]
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    tensors = with_scales(folder, tensors, headers, config)
    return _Stored(_plain_config(component, folder / "config.json", config), tensors, folder)


def _plain_config(component: str, path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    name = config.get("_class_name")
    if name is not None and name not in CLASS_NAMES[component]:
        raise CheckpointError(f"{path}: describes a {name}, expected {' or '.join(CLASS_NAMES[component])}")
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "quantization_config"}


def stored_tensors(files: ModelFiles | str | Path, component: str) -> Mapping[str, StoredTensor]:
    """Where each tensor of a component lies, by diffusers name; what `files` may be, `load_component` says."""
    return _stored(_as_files(files, component), component).tensors


def _as_files(files: ModelFiles | str | Path, component: str) -> ModelFiles:
    if isinstance(files, ModelFiles):
        return files
    if component == "upsampler":
        return ModelFiles(upsampler=local_path(files))
    path = Path(files).expanduser()
    if path.is_dir() and not (path / "model_index.json").is_file() and (path / "config.json").is_file():
        return ModelFiles(parts={component: path})
    return find_model(files)


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
            find_tokenizer(files.text_encoder, files.folder, text_encoder_files(files.text_encoder, files.folder, files.variant).rows)
        elif component == "text_encoder":
            text = text_encoder_files(files.text_encoder, files.folder, files.variant)
            text.check()
            text.check_connectors(component_config(files, "connectors"))
        else:
            stored = _stored(files, component)
            shapes = _half_of(component, _expected(component, stored), None)
            _check_names(component, shapes, _half_of(component, stored.tensors, None), stored.path)
    except CheckpointError as error:
        return str(error)
    return None


def _expected(component: str, stored: _Stored) -> Shapes:
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
        text = text_encoder_files(files.text_encoder, files.folder, files.variant)
        if component == "tokenizer":
            return load_tokenizer(find_tokenizer(files.text_encoder, files.folder, text.rows), text.rows)
        text.check()
        with opened(text.tensors.values(), device) as handles:
            return load_text_encoder(text, handles, dtype).to(device)
    stored = _stored(files, component)
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
def opened(
    tensors: Iterable[StoredTensor], device: str | torch.device = "cpu"
) -> Iterator[dict[Path, Any]]:
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
        return is_present(self.files, name) and name in self.allowed

    def load(self, name: str) -> Any:
        return load_component(self.files, name, dtype=self.dtype, device=self.device)

    def config(self, name: str) -> Mapping[str, Any]:
        return component_config(self.files, name)


def is_present(files: ModelFiles, component: str) -> bool:
    """Whether there is a place to read a component from; what lies there is said by `component_problem`."""
    if component in ("text_encoder", "tokenizer"):
        return files.text_encoder is not None or files.folder is not None
    return files.own(component) is not None or (component != "upsampler" and bool(files.shared))


def component_config(files: ModelFiles, component: str) -> Mapping[str, Any]:
    """Constructor arguments of a component's diffusers class, from the header or config.json; loads no weights."""
    return _stored(files, component).config


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
            sizes[component] = _bytes(_stored(files, component).tensors.values(), component, dtype)
    if is_present(files, "text_encoder"):
        text = text_encoder_files(files.text_encoder, files.folder, files.variant)
        sizes["text_encoder"] = _bytes(text.tensors.values(), "text_encoder", dtype)
    return sizes


def _bytes(tensors: Iterable[StoredTensor], component: str, dtype: torch.dtype | None) -> int:
    if dtype is None:
        return sum(tensor.nbytes for tensor in tensors)
    return sum(math.prod(tensor.shape) for tensor in tensors) * component_dtype(component, dtype).itemsize
