"""Prompt embeddings on disk, found by what they were made from: text, text model and its revision."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ltxkern.pipeline.model.text import PromptEmbeddings
from ltxkern.pipeline.results.atomic import replacing_file
from ltxkern.whole_files import cache_folder

logger = logging.getLogger(__name__)

# Raised whenever the way from text to embedding changes, so that old entries are not found any more.
_FORMAT = "1"


def default_folder() -> Path:
    """Of the user's cache folder."""
    return cache_folder() / "embeddings"


def model_revision(*files: str | Path) -> str:
    """What tells one version of model files from another without reading them: names, sizes, times of change.

    Args:
        files: files, or folders whose files count.
    """
    digest = hashlib.sha256()
    for path in map(Path, files):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                status = file.stat()
                digest.update(f"{file.absolute()}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class EmbeddingCache:
    """Keeps embeddings in one file per prompt; a file that cannot be read is made again.

    Args:
        folder: made when something is first written; None: `default_folder`.
        model: name or path of the text model and the connectors.
        revision: of their weights, e.g. from `model_revision`.
        dtype: of the embeddings.
    """

    def __init__(
        self, folder: str | Path | None = None, *, model: str, revision: str, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self._folder = Path(os.path.expanduser(folder)) if folder is not None else default_folder()
        self._model = model
        self._revision = revision
        self._dtype = dtype

    def path(self, prompt: str) -> Path:
        """Where the embedding of a prompt lies, or would lie."""
        origin = json.dumps([_FORMAT, prompt, self._model, self._revision, str(self._dtype)])
        return self._folder / f"{hashlib.sha256(origin.encode()).hexdigest()}.safetensors"

    def load(self, prompt: str) -> PromptEmbeddings | None:
        """The embedding of a prompt, or None where there is none that can be used; a corrupt file is removed."""
        path = self.path(prompt)
        try:
            with safe_open(str(path), framework="pt") as file:
                digest = (file.metadata() or {}).get("digest")
                # Copies: a matrix product may round otherwise for an operand that lies where the header of a file ends.
                found = PromptEmbeddings(file.get_tensor("video").clone(), file.get_tensor("audio").clone())
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            self._discard(path, str(error))
            return None
        if digest != _digest(found):
            self._discard(path, "its content does not have the digest it was written with")
            return None
        return found

    def _discard(self, path: Path, reason: str) -> None:
        logger.warning("%s cannot be used and is made again: %s", path, reason)
        path.unlink(missing_ok=True)

    def store(self, prompt: str, embeddings: PromptEmbeddings) -> None:
        """Writes an embedding: under a temporary name first, so that no reader sees half a file.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = PromptEmbeddings(embeddings.video.detach().cpu(), embeddings.audio.detach().cpu())
        with replacing_file(self.path(prompt)) as temporary:
            tensors = {"video": kept.video.contiguous().clone(), "audio": kept.audio.contiguous().clone()}
            # Not save_file, whose errors do not say that the disk is full.
            temporary.write_bytes(save(tensors, metadata={"digest": _digest(kept)}))

    def get(
        self, prompts: Sequence[str], encode: Callable[[list[str]], Sequence[PromptEmbeddings]]
    ) -> list[PromptEmbeddings]:
        """Embeddings of the prompts, in order, on the host; only those not on disk are encoded, each once.

        Args:
            prompts: texts.
            encode: called with the missing ones, in one call, or not at all: then no text encoder need be loaded.
        """
        found = {prompt: self.load(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, embeddings in found.items() if embeddings is None]
        if missing:
            for prompt, made in zip(missing, encode(missing), strict=True):
                found[prompt] = made
                try:
                    self.store(prompt, made)
                except OSError as error:
                    logger.warning("the embedding of a prompt was not kept: %s", error)
        return [embeddings for prompt in prompts if (embeddings := found[prompt]) is not None]


def _digest(embeddings: PromptEmbeddings) -> str:
    digest = hashlib.sha256()
    for tensor in (embeddings.video, embeddings.audio):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
