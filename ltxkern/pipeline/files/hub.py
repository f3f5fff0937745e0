"""Where a model's files lie: a path, or a hub repository, downloaded as far as it is needed; and which of them are meant."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from ltxkern.pipeline.files.headers import CheckpointError, listed, read_header, read_json, warn_once
from ltxkern.pipeline.model.components import BUILDABLE

logger = logging.getLogger(__name__)

_REPOSITORY = r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?"
_HUB_ID = re.compile(_REPOSITORY)
_HUB_FILE = re.compile(_REPOSITORY + r"/(?P<file>[\w./-]+\.safetensors)")
_DIFFUSERS_LAYOUT = ["*.json", "*/*"]  # folders and what describes them; "*" also matches a slash
FOLDERS = {name: {"video_vae": "vae", "upsampler": "latent_upsampler"}.get(name, name) for name in BUILDABLE}
# Parts beside the upsampler and the text encoder, which are named on their own.
PARTS = tuple(name for name in BUILDABLE if name != "upsampler")
_SNAPSHOTS = "snapshots"  # the folder of the hub's cache whose folders are named by commits
P = TypeVar("P", bound=PurePath)
_SUFFIXES = (".json", ".yaml", ".yml", ".toml")
# Names of configurations that do not say whose they are.
_SHARED = ("lora_config", "config", "training_config", "train_config")
# What a trainer adds to the name of each file that it stores on its way.
_STEP = re.compile(r"[-_. ]?(?:(?:steps?|epochs?)[-_. ]?\d+|\d{4,})$", re.IGNORECASE)


# The built-in models: one that was trained, whose files lie in the package, and one whose weights are drawn from a seed.
DEMO, RANDOM = "demo", "demo-random"


class DemoNames(NamedTuple):
    """Names of the trained demo's files in their folder."""

    checkpoint: str = "ltx-2.3-demo.safetensors"
    upsampler: str = "ltx-2.3-demo-spatial-upscaler-x2.safetensors"
    distilled_lora: str = "ltx-2.3-demo-distilled-lora.safetensors"
    text_encoder: str = "gemma"


DEMO_FOLDER, DEMO_NAMES = Path(__file__).parents[2] / "demo", DemoNames()


class Repository(NamedTuple):
    """A repository of the hub, at a revision (commit, tag or branch); None is what it has today."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @classmethod
    def of(cls, match: re.Match[str]) -> Repository:
        """As it was written."""
        return cls(match["name"], match["revision"])

    def download(self, file: str) -> Path:
        """One file.

        Raises:
            CheckpointError: the hub does not deliver it.
        """
        from huggingface_hub import hf_hub_download

        with _hub_errors(f"{self}/{file}"):
            return self._taken(Path(hf_hub_download(self.name, file, revision=self.revision)))

    def _taken(self, path: Path) -> Path:
        """A download, after a warning where the next one may be of other files."""
        if self.revision is None and _SNAPSHOTS in path.parts:
            commit = path.parts[path.parts.index(_SNAPSHOTS) + 1]
            warn_once(
                logger,
                f"{self}: what it has today is taken, which may change: {self}@{commit} always names these files",
            )
        return path

    def names(self) -> list[str]:
        """Names of its files; offline, of those that were downloaded before."""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HTTPError

        with _hub_errors(str(self)):
            try:
                return HfApi().list_repo_files(self.name, revision=self.revision)
            except (HTTPError, OSError):
                folder = Path(snapshot_download(self.name, revision=self.revision, allow_patterns=[]))
                return [file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")]

    def folder(self) -> Path:
        """It, downloaded; a diffusers layout without the single files beside it, several of them alone not at all."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import DryRunError

        def fetched(**wanted: Any) -> Path:
            return self._taken(Path(snapshot_download(self.name, revision=self.revision, **wanted)))

        try:
            found = snapshot_download(self.name, revision=self.revision, dry_run=True)
            sizes = {file.filename: file.file_size for file in found}
        except DryRunError:  # the hub cannot be asked: an earlier download serves, or this says why there is none
            earlier = fetched(allow_patterns=_DIFFUSERS_LAYOUT)
            return earlier if (earlier / "model_index.json").is_file() else fetched()
        if "model_index.json" in sizes:
            return fetched(allow_patterns=_DIFFUSERS_LAYOUT)
        single = sorted(name for name in sizes if "/" not in name and name.endswith(".safetensors"))
        if len(single) > 1 and "config.json" not in sizes:
            names = ", ".join(f"{name} ({(sizes[name] or 0) / 1e9:.1f} GB)" for name in single)
            raise CheckpointError(
                f"{self} holds several files: name the one to load, for example {self}/{single[0]}; there are {names}"
            )
        return fetched()


def local_path(path_or_id: str | Path) -> Path:
    """An existing path as it is; a hub id `owner/name[@revision][/file.safetensors]` as its downloaded copy.

    Raises:
        CheckpointError: neither is there, the hub does not deliver, or the repository does not say which file is meant.
    """
    path = Path(os.path.expanduser(path_or_id))
    if path.exists():
        return path
    one_file = None if path.is_absolute() else _HUB_FILE.fullmatch(str(path_or_id))
    if one_file is not None:
        return Repository.of(one_file).download(one_file["file"])
    whole = _HUB_ID.fullmatch(str(path_or_id))
    if whole is None or path.suffix == ".safetensors":
        raise CheckpointError(f"{path_or_id}: no such file or folder")
    with _hub_errors(str(path_or_id)):
        return Repository.of(whole).folder()


def configurations(file: P) -> list[P]:
    """Where a configuration of a LoRA file may lie, those of the file alone first."""
    own = [f"{stem}{suffix}" for stem in (file.stem, _training(file)) for suffix in _SUFFIXES if stem]
    names = [*own, "adapter_config.json", *(f"{stem}{suffix}" for stem in _SHARED for suffix in _SUFFIXES)]
    found = [file.with_name(name) for name in dict.fromkeys(names)]
    # As the official trainer leaves them.
    return [*found, file.parent.parent / "training_config.yaml"] if file.parent.name == "checkpoints" else found


def may_be_of_another(configuration: PurePath, file: PurePath, others: Iterable[PurePath]) -> bool:
    """Whether the name of a configuration beside a LoRA file does not say that it belongs to it.

    others: weight files of other trainings there. PEFT's configuration is that of PEFT's file where there is one.
    """
    if configuration.name == "adapter_config.json":
        return any(other.name == "adapter_model.safetensors" for other in others)
    return configuration.stem in _SHARED and configuration.stem != file.stem


def of_other_trainings(file: PurePath, files: Iterable[PurePath]) -> list[PurePath]:
    """Those weight files of a folder that no configuration describes together with a LoRA file."""
    return sorted(one for one in files if one.suffix == ".safetensors" and _training(one) != _training(file))


def _training(file: PurePath) -> str:
    """What the files of one training have in common in their names."""
    return _STEP.sub("", file.stem)


def local_lora(path_or_id: str | Path) -> Path:
    """The file of a LoRA: an existing file, the only one of a folder, or `owner/name[@revision][/file.safetensors]` of the hub.

    Of the hub, the configurations that `configurations` lists come with the file where there are any; an earlier
    download serves offline.

    Raises:
        CheckpointError: as `local_path`, several files that may be meant, or a configuration that the hub does not deliver.
    """
    path = Path(os.path.expanduser(path_or_id))
    named = None if path.exists() or path.is_absolute() else _HUB_FILE.fullmatch(str(path_or_id))
    whole = None if path.exists() or named is not None else _HUB_ID.fullmatch(str(path_or_id))
    if whole is not None:
        only = _only_file(Repository.of(whole).names(), str(path_or_id))
        named = _HUB_FILE.fullmatch(f"{path_or_id}/{only}")
    if named is None:
        path = local_path(path_or_id)
        if path.is_dir():
            path /= _only_file([file.name for file in path.glob("*.safetensors")], str(path_or_id))
        return path
    path = local_path(named[0])
    _fetch_configurations(Repository.of(named), PurePosixPath(named["file"]), path)
    return path


def _fetch_configurations(repository: Repository, file: PurePosixPath, path: Path) -> None:
    """Downloads what may tell alpha and rank of a LoRA file to where it lies; warns where that cannot be known."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError

    usual = str(file.with_name("adapter_config.json"))
    try:
        there = set(HfApi().list_repo_files(repository.name, revision=repository.revision))
    except (HTTPError, OSError) as error:
        if (
            not any(map(Path.exists, configurations(path)))
            and try_to_load_from_cache(repository.name, usual, revision=repository.revision) is None
        ):
            logger.warning(
                "%s/%s: whether a configuration that tells its alpha lies beside it is not known, the hub cannot be asked (%s)",
                repository,
                file,
                _first_line(error),
            )
        return
    others = of_other_trainings(file, (name for name in map(PurePosixPath, there) if name.parent == file.parent))
    for name in configurations(file):
        if str(name) in there and not (others and may_be_of_another(name, file, others)):
            repository.download(str(name))
    if usual not in there:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        with _hub_errors(f"{repository}/{usual}"), contextlib.suppress(EntryNotFoundError):
            hf_hub_download(
                repository.name, usual, revision=repository.revision
            )  # notes in the cache that there is none


def _only_file(names: Iterable[str], where: str) -> str:
    """The file that is meant: the only one there, or the one under the name that PEFT or diffusers gives it."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    usual = [name for name in found if name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")]
    for few in (found, usual):
        if len(few) == 1:
            return few[0]
    raise CheckpointError(f"{where}: expected one .safetensors file, found {listed(found) or 'none'}; name the file")


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """What the hub raises, as one sentence."""
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    # LocalEntryNotFoundError and OfflineModeIsEnabled are OSErrors through FileNotFoundError and ConnectionError.
    except (HTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name}: no such path here, and the hub did not deliver it ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@dataclass(frozen=True)
class ModelFiles:
    """Where the components of a model lie.

    Args:
        checkpoint: an official single file.
        folder: a diffusers folder.
        upsampler, text_encoder: their file or folder.
        distilled_lora: the file that goes with the model; only the demo brings one.
        parts: files or folders of the other components that do not lie with the model, by component.
        variant: of the weights in a folder, such as "fp16"; None for the plain ones.
    """

    checkpoint: Path | None = None
    folder: Path | None = None
    upsampler: Path | None = None
    text_encoder: Path | None = None
    distilled_lora: Path | None = None
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
        path_or_id: "demo" (the trained model of the package), an official single file, a diffusers folder
            (model_index.json), a folder that holds one official single file, or a hub id, downloaded where no such path
            exists: `owner/name` of either, or one file of it,
            `owner/name/file.safetensors`.
        upsampler: file, folder or hub id of the latent upsampler, where it does not lie with the model.
        text_encoder: file, folder or hub id of Gemma 3, where it does not lie with the model.
        variant: of the weights in a diffusers folder, such as "fp16"; None for the plain ones.
        parts: file, folder or hub id of a component of `PARTS`, where it does not lie with the model.

    Raises:
        CheckpointError: nothing usable is there, or the download fails.
    """
    if str(path_or_id) == DEMO:
        found = demo_files()
    else:
        path = local_path(path_or_id)
        found = _in_folder(path) if path.is_dir() else ModelFiles(checkpoint=path)
    return replace(found, variant=variant).with_parts(upsampler, text_encoder, **parts)


def demo_files(folder: Path | None = None) -> ModelFiles:
    """The trained demo.

    Args:
        folder: of its files, such as one that a training exports to; None for the package's own.

    Raises:
        CheckpointError: files are missing.
    """
    folder = folder or DEMO_FOLDER
    if missing := [name for name in DEMO_NAMES if not (folder / name).exists()]:
        raise CheckpointError(
            f"{folder} lacks {listed(missing)} of the demo model: install ltxkern again, or use {RANDOM}, whose weights are random"
        )
    return ModelFiles(**{part: folder / name for part, name in DEMO_NAMES._asdict().items()})


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
