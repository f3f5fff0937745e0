"""Where the components of a model lie: official file, diffusers folder, or parts downloaded one by one."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ltxkern.pipeline.files.headers import CheckpointError, read_header, read_json
from ltxkern.pipeline.files.hub import local_path
from ltxkern.pipeline.model.components import BUILDABLE

logger = logging.getLogger(__name__)

FOLDERS = {name: {"video_vae": "vae", "upsampler": "latent_upsampler"}.get(name, name) for name in BUILDABLE}
# Parts beside the upsampler and the text encoder, which are named on their own.
PARTS = tuple(name for name in BUILDABLE if name != "upsampler")
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json$")
_WEIGHTS = re.compile(
    r"(?P<stem>[^.]+?)(?:\.(?P<variant>[\w-]+?))?(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?\.safetensors$"
)
_NOT_READ = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx")
_STEMS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True)
class ModelFiles:
    """Where the components of a model lie.

    Args:
        checkpoint: an official single file.
        folder: a diffusers folder.
        upsampler, text_encoder: their file or folder.
        parts: files or folders of the other components that do not lie with the model, by component.
        variant: of the weights in a folder, such as "fp16"; None for the plain ones.
    """

    checkpoint: Path | None = None
    folder: Path | None = None
    upsampler: Path | None = None
    text_encoder: Path | None = None
    parts: Mapping[str, Path] = field(default_factory=dict)
    variant: str | None = None

    def with_parts(
        self, upsampler: str | Path | None, text_encoder: str | Path | None, **parts: str | Path | None
    ) -> ModelFiles:
        """With parts from elsewhere in place of those that lie with the model; None changes nothing."""
        require_parts(parts)
        given = {name: local_path(path) for name, path in parts.items() if path is not None}
        return replace(
            self,
            upsampler=self.upsampler if upsampler is None else local_path(upsampler),
            text_encoder=self.text_encoder if text_encoder is None else local_path(text_encoder),
            parts={**self.parts, **given},
        )

    def own(self, component: str) -> Path | None:
        """The component's own file or folder; None where it lies in a file with others, or nowhere."""
        if component == "upsampler":
            return self.upsampler
        if component in self.parts:
            return self.parts[component]
        return None if self.folder is None else self.folder / FOLDERS[component]

    @property
    def shared(self) -> list[Path]:
        """Single files that may hold several components: the checkpoint first, then the parts."""
        given = [self.checkpoint, *self.parts.values(), self.text_encoder]
        return list(dict.fromkeys(path for path in given if path is not None and path.is_file()))


def require_parts(names: Iterable[str]) -> None:
    """Refuses names that are no part of a model.

    Raises:
        TypeError: with the names there are.
    """
    if unknown := sorted(set(names) - set(PARTS)):
        raise TypeError(f"parts: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")


def find_model(
    path_or_id: str | Path,
    *,
    upsampler: str | Path | None = None,
    text_encoder: str | Path | None = None,
    variant: str | None = None,
    **parts: str | Path | None,
) -> ModelFiles:
    """Finds out what a path or hub id holds, from names and headers alone.

    Args:
        path_or_id: an official single file, a diffusers folder (model_index.json), a folder that holds one official
            single file, or a hub id, downloaded where no such path exists: `owner/name` of either, or one file of it,
            `owner/name/file.safetensors`.
        upsampler: file, folder or hub id of the latent upsampler, where it does not lie with the model.
        text_encoder: file, folder or hub id of Gemma 3, where it does not lie with the model.
        variant: of the weights in a diffusers folder, such as "fp16"; None for the plain ones.
        parts: file, folder or hub id of a component of `PARTS`, where it does not lie with the model.

    Raises:
        CheckpointError: nothing usable is there, or the download fails.
    """
    path = local_path(path_or_id)
    found = _in_folder(path) if path.is_dir() else ModelFiles(checkpoint=path)
    return replace(found, variant=variant).with_parts(upsampler, text_encoder, **parts)


def _in_folder(path: Path) -> ModelFiles:
    if (path / "model_index.json").is_file():
        read_json(path / "model_index.json")
        upsampler = path / FOLDERS["upsampler"]
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
    missing = [str(number) for number in range(1, count + 1) if number not in numbers]
    if missing:
        raise CheckpointError(f"{folder}: of {count} files, number {', '.join(missing)} is missing: download it")
    return files
