"""One component as it is stored: in a file of its own, among others, or in a folder; its names, configuration and scales."""

import contextlib
import functools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxkern.pipeline.files import official_config
from ltxkern.pipeline.files.headers import (
    CheckpointError,
    Header,
    StoredTensor,
    listed,
    read_header,
    read_json,
    warn_once,
)
from ltxkern.pipeline.files.hub import FOLDERS, ModelFiles
from ltxkern.pipeline.files.official_names import component_of, diffusers_name, official_name
from ltxkern.pipeline.files.quantized import with_scales
from ltxkern.pipeline.model.components import CLASS_NAMES, PRODUCTION_CONFIGS
from ltxkern.pipeline.model.shapes import Shapes, expected_shapes

logger = logging.getLogger(__name__)

# What stands before the names in files that hold one component, as people have cut them out.
_STARTS = (
    "", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "first_stage_model.", "vae.", "audio_vae.",
    "vocoder.", "connectors.",
)  # fmt: skip
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

_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json$")
_WEIGHTS = re.compile(
    r"(?P<stem>[^.]+?)(?:\.(?P<variant>[\w-]+?))?(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?\.safetensors$"
)
_NOT_READ = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx")
_STEMS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True)
class Stored:
    """Arguments of a component's class, its tensors by diffusers name, and the file or folder to name in messages."""

    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    path: Path


def read_stored(files: ModelFiles, component: str) -> Stored:
    """Finds a component in a model's files, from headers and configurations alone.

    Raises:
        CheckpointError: it is not there, its description is broken, or its weights are quantised in a way that is not read.
    """
    own = files.own(component)
    if own is not None and own.is_dir():
        return _diffusers(own, component, files)
    if own is None and component == "upsampler":
        raise CheckpointError("upsampler: none lies with the model; name its file or folder (upsampler=...)")
    if own is None and files.folder is None and not files.shared:
        raise CheckpointError(f"{component}: expected an official file or a diffusers folder, got neither")
    if own is not None and not own.exists():
        raise CheckpointError(f"{own}: no such folder, and no {component} was named")
    return _single(files, component, own)


def _single(files: ModelFiles, component: str, own: Path | None) -> Stored:
    """A component in its own file, or among others in shared ones.

    What its own file lacks is taken from the others: the text projection of split downloads lies apart from the connectors.
    """
    others = [path for path in files.shared if path != own]
    paths = [own, *(others if component == "connectors" else ())] if own is not None else others
    tensors, used = _gathered(component, own, tuple(read_header(path) for path in paths))
    path = own or (used[0] if used else (files.checkpoint or files.shared[0]))
    if not tensors:
        where = "" if len(others) < 2 or own else f" (nor do {listed([other.name for other in others[1:]])})"
        raise CheckpointError(f"{path}: holds no tensors of the {component}{where}")
    headers = [read_header(file) for file in dict.fromkeys([*used, *others])]
    return Stored(_config_of(component, path, tensors, headers), tensors, path)


@functools.lru_cache(maxsize=16)
def _gathered(
    component: str, own: Path | None, headers: tuple[Header, ...]
) -> tuple[Mapping[str, StoredTensor], list[Path]]:
    """The tensors of a component with their scales, and the files they lie in; the same headers are gone through once."""
    tensors: dict[str, StoredTensor] = {}
    used = []
    for header in headers:
        found = _named(header, component, whole=header.path == own)
        if new := {name: tensor for name, tensor in found.items() if name not in tensors}:
            tensors.update(new)
            used.append(header)
        if tensors and component != "connectors":
            break
    files = [header.path for header in used]
    return with_scales(own or files[0], tensors, used, {}) if tensors else {}, files


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
        warn_once(logger, f"{path}: has no configuration of the {component} and is taken as the published LTX-2.3")
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


def _read_section(component: str, path: Path, section: Any, tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
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
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path}: the configuration of the {component} has a value of the wrong kind ({error})"
        ) from error


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

    keys = header.tensors if component == "upsampler" else header.components.get(component, ())
    yield official({key: key for key in keys})
    for start in _STARTS:
        if any(key.startswith(start) for key in header.tensors):
            bare = {key.removeprefix(start): key for key in header.tensors}
            yield {
                name: header.tensors[key]
                for name, key in bare.items()
                if name in _published_shapes(component)
                or component_of(official_name(component, name)) in (None, component)
            }
            full = {
                name: [f"{official_start}{name}" for official_start in _OFFICIAL_STARTS[component]] for name in bare
            }
            yield official(
                {
                    next((n for n in names if component_of(n) == component), names[0]): bare[name]
                    for name, names in full.items()
                }
            )


def _diffusers(folder: Path, component: str, files: ModelFiles) -> Stored:
    """A component in a folder of its own, which may also be the whole pipeline's, or hold a bare single file."""
    if (folder / "model_index.json").is_file() and (folder / FOLDERS[component]).is_dir():
        folder = folder / FOLDERS[component]
    paths = [] if not folder.is_dir() else weight_files(folder, files.variant)
    if len(paths) == 1 and not (folder / "config.json").exists():
        described = "config" in read_header(paths[0]).metadata
        if (
            described or files.shared
        ):  # a bare file, in a folder or not, borrows the configuration of the model it stands beside
            return _single(ModelFiles() if described else files, component, paths[0])
    config = read_json(folder / "config.json")
    headers = [read_header(file) for file in paths]
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    tensors = with_scales(folder, tensors, headers, config)
    return Stored(_plain_config(component, folder / "config.json", config), tensors, folder)


def bare_tensors(path: Path, component: str) -> dict[str, StoredTensor]:
    """The tensors in a file or folder that was named for one component alone."""
    headers = [read_header(file) for file in ([path] if path.is_file() else weight_files(path))]
    named = {name: t for header in headers for name, t in _named(header, component, whole=True).items()}
    if not named:
        raise CheckpointError(f"{path}: holds no tensors of the {component}")
    return with_scales(path, named, headers, {})


def _plain_config(component: str, path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    name = config.get("_class_name")
    if name is not None and name not in CLASS_NAMES[component]:
        raise CheckpointError(f"{path}: describes a {name}, expected {' or '.join(CLASS_NAMES[component])}")
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "quantization_config"}


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of a component's folder.

    The plain ones where a variant lies beside them, those that an index names where there is one. A folder that holds nothing
    but one variant gives that; with `variant`, a folder that has none gives the plain ones.

    Raises:
        CheckpointError: none, several between which nothing decides, or an index that is broken.
    """
    found = _weight_sets(folder)
    variants = sorted({name for _, name in found if name})
    wanted = variant or ""
    if variant is not None and variant not in variants:
        if variants:
            raise CheckpointError(f"{folder}: has no variant {variant!r}: use {' or '.join(variants)}, or none")
        wanted = ""
    if not any(name == wanted for _, name in found):
        if len(variants) != 1:
            others = sorted(path.name for path in folder.glob("*") if path.suffix in _NOT_READ)
            what = f"found the variants {', '.join(variants)}: name one" if variants else "found 0"
            what += f" (files such as {others[0]} are not read)" if others and not variants else ""
            raise CheckpointError(f"{folder}: expected one .safetensors file or an index of several, {what}")
        wanted = variants[0]
        logger.info("%s: the only weights there are of variant %s", folder, wanted)
    sets = {stem: entry for (stem, name), entry in found.items() if name == wanted}
    stem = next((stem for stem in _STEMS if stem in sets), None) or (next(iter(sets)) if len(sets) == 1 else None)
    if stem is None:
        names = ", ".join(f"{name}.safetensors" for name in sorted(sets))
        raise CheckpointError(
            f"{folder}: expected one .safetensors file or an index of several, found {len(sets)} ({names})"
        )
    index, files = sets[stem]
    return _indexed(index) if index is not None else _complete(folder, files)


_Set = tuple[Path | None, list[Path]]


def _weight_sets(folder: Path) -> dict[tuple[str, str], _Set]:
    """Index and files of each set of weights in a folder, by stem and variant ("" for plain)."""
    found: dict[tuple[str, str], _Set] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        described, weights = _INDEX.match(path.name), _WEIGHTS.match(path.name)
        if described is not None:
            key = (described["stem"], described["variant"] or "")
            found[key] = (path, found.get(key, (None, []))[1])
        elif weights is not None:
            found.setdefault((weights["stem"], weights["variant"] or ""), (None, []))[1].append(path)
    # An index names its files as it likes: they are no sets of their own.
    named: set[Path] = set()
    for index, _ in found.values():
        with contextlib.suppress(CheckpointError):  # a broken one is refused where it is the one to be read
            named.update(_indexed(index) if index is not None else ())
    return {
        key: (index, files) for key, (index, files) in found.items() if index is not None or not named.issuperset(files)
    }


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map of tensors to files, got {str(weight_map)[:40]}")
    if not all(isinstance(name, str) and name for name in weight_map.values()):
        raise CheckpointError(f"{index}: expected file names in its weight_map")
    return sorted({index.parent / name for name in weight_map.values()})


def _complete(folder: Path, files: list[Path]) -> list[Path]:
    """Shards without an index, when none is missing; a single file as it is."""
    numbers = {
        int(match["number"]): int(match["count"])
        for file in files
        if (match := _WEIGHTS.match(file.name)) and match["number"]
    }
    whole = [file for file in files if "-of-" not in file.name]
    if whole:
        return whole[:1]
    count = max(numbers.values())
    if len({match["count"] for file in files if (match := _WEIGHTS.match(file.name))}) > 1:
        raise CheckpointError(
            f"{folder}: holds the numbered files of several downloads ({listed([file.name for file in files])}): "
            "keep those of one"
        )
    missing = [str(number) for number in range(1, count + 1) if number not in numbers]
    if missing:
        raise CheckpointError(f"{folder}: of {count} files, number {', '.join(missing)} is missing: download it")
    return files
