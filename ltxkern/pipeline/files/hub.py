"""Where a model lies: a path, or a repository of the Hugging Face hub that is downloaded as far as it is needed."""

import re
from pathlib import Path

from ltxkern.pipeline.files.headers import CheckpointError

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
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if one_file is not None:
            return Path(hf_hub_download(one_file[1], one_file[2]))
        return _hub_folder(str(path_or_id))
    # LocalEntryNotFoundError and OfflineModeIsEnabled are OSErrors through FileNotFoundError and ConnectionError.
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path_or_id}: no such path here, and the hub did not deliver it ({reason})") from error


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
