"""Where a model lies: a path, or a repository of the Hugging Face hub that is downloaded as far as it is needed."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ltxkern.pipeline.files.headers import CheckpointError, listed

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.safetensors)")
_DIFFUSERS_LAYOUT = ["*.json", "*/*"]  # folders and what describes them; "*" also matches a slash


def local_path(path_or_id: str | Path) -> Path:
    """An existing path as it is; a hub id `owner/name` or `owner/name/file.safetensors` as its downloaded copy.

    Raises:
        CheckpointError: neither is there, the hub does not deliver, or the repository does not say which file is meant.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    one_file = None if path.is_absolute() else _HUB_FILE.fullmatch(str(path_or_id))
    if one_file is None and (not _HUB_ID.fullmatch(str(path_or_id)) or path.suffix == ".safetensors"):
        raise CheckpointError(f"{path_or_id}: no such file or folder")
    if one_file is not None:
        return _download(one_file[1], one_file[2])
    with _hub_errors(str(path_or_id)):
        return _hub_folder(str(path_or_id))


def local_lora(path_or_id: str | Path) -> Path:
    """The file of a LoRA: an existing file, the only one of a folder, or `owner/name[/file.safetensors]` of the hub.

    Of the hub, PEFT's `adapter_config.json` comes with the file where there is one; an earlier download serves offline.

    Raises:
        CheckpointError: as `local_path`, or several files that may be meant.
    """
    path = Path(path_or_id).expanduser()
    named = None if path.exists() or path.is_absolute() else _HUB_FILE.fullmatch(str(path_or_id))
    if not path.exists() and named is None and _HUB_ID.fullmatch(str(path_or_id)):
        named = _HUB_FILE.fullmatch(f"{path_or_id}/{_only_file(_hub_files(str(path_or_id)), str(path_or_id))}")
    if named is None:
        path = local_path(path_or_id)
        if path.is_dir():
            path /= _only_file([file.name for file in path.glob("*.safetensors")], str(path_or_id))
        return path
    path = local_path(named[0])
    with contextlib.suppress(CheckpointError):
        _download(named[1], str(Path(named[2]).with_name("adapter_config.json")))
    return path


def _only_file(names: Iterable[str], where: str) -> str:
    """The file that is meant: the only one there, or the one under the name that PEFT or diffusers gives it."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    usual = [name for name in found if name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")]
    for few in (found, usual):
        if len(few) == 1:
            return few[0]
    raise CheckpointError(f"{where}: expected one .safetensors file, found {listed(found) or 'none'}; name the file")


def _hub_files(repository: str) -> list[str]:
    """Names of the files of a repository; offline, of those that were downloaded before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    with _hub_errors(repository):
        try:
            return [file.filename for file in snapshot_download(repository, dry_run=True)]
        except DryRunError:
            folder = Path(snapshot_download(repository, allow_patterns=[]))
            return [str(file.relative_to(folder)) for file in folder.rglob("*.safetensors")]


def _download(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub_errors(f"{repository}/{name}"):
        return Path(hf_hub_download(repository, name))


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """What the hub raises, as one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    # LocalEntryNotFoundError and OfflineModeIsEnabled are OSErrors through FileNotFoundError and ConnectionError.
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name}: no such path here, and the hub did not deliver it ({reason})") from error


def _hub_folder(repository: str) -> Path:
    """The downloaded repository; a diffusers layout without the single files beside it, several of them alone not at all."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        sizes = {file.filename: file.file_size for file in snapshot_download(repository, dry_run=True)}
    except DryRunError:  # the hub cannot be asked: an earlier download serves, or this says why there is none
        folder = Path(snapshot_download(repository, allow_patterns=_DIFFUSERS_LAYOUT))
        return folder if (folder / "model_index.json").is_file() else Path(snapshot_download(repository))
    if "model_index.json" in sizes:
        return Path(snapshot_download(repository, allow_patterns=_DIFFUSERS_LAYOUT))
    single = sorted(name for name in sizes if "/" not in name and name.endswith(".safetensors"))
    if len(single) > 1 and "config.json" not in sizes:
        names = ", ".join(f"{name} ({(sizes[name] or 0) / 1e9:.1f} GB)" for name in single)
        raise CheckpointError(
            f"{repository} holds several files: name the one to load, for example {repository}/{single[0]}; "
            f"there are {names}"
        )
    return Path(snapshot_download(repository))
