"""The text phase of a run: prompts encoded once, kept on disk, the text encoder let go afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.model.text import PromptEmbeddings, encode_prompts
from ltxkern.pipeline.results.embedding_cache import EmbeddingCache, model_revision
from ltxkern.pipeline.run.denoising import Progress, report
from ltxkern.pipeline.sampling.finite import check_latent


class PromptEncoder:
    """Encodes prompts with a model's text encoder and connectors.

    Args:
        components: where tokenizer, text encoder and connectors come from.
        manager: moves them to the device and back.
        device: where to compute.
        cache: what was encoded before; None encodes anew.
        keep: keep the text encoder in memory after encoding; otherwise it is let go and read again when needed.
    """

    def __init__(
        self,
        components: Components,
        manager: TwoStageDeviceManager,
        device: torch.device,
        cache: EmbeddingCache | None = None,
        keep: bool = False,
    ) -> None:
        self._components = components
        self._manager = manager
        self._device = device
        self._cache = cache
        self._keep = keep

    def encode(self, texts: list[str], progress: Progress | None = None) -> list[PromptEmbeddings]:
        """One pair of contexts a text, from the cache where it is there.

        Raises:
            NonFiniteError: NaN or infinity in a context.
        """
        report(progress, "text", 0, 1)
        encoded = self._encode_now(texts) if self._cache is None else self._cache.get(texts, self._encode_now)
        for item in encoded:
            check_latent("text encoding", "video context", item.video)
            check_latent("text encoding", "audio context", item.audio)
        if not self._keep and self._components.reloadable("text_encoder"):
            self._components.release("text_encoder")
        report(progress, "text", 1, 1)
        return encoded

    def _encode_now(self, texts: list[str]) -> list[PromptEmbeddings]:
        parts = self._components
        with (
            self._manager.component("text_encoder", parts.text_encoder, once=not self._keep) as encoder,
            self._manager.component("connectors", parts.connectors) as connectors,
        ):
            dtype = next(connectors.parameters()).dtype
            return encode_prompts(parts.tokenizer, encoder, connectors, texts, device=self._device, dtype=dtype)


def embedding_cache(
    wanted: str | Path | bool, model: str | Path, text_encoder: str | Path | None, dtype: torch.dtype
) -> EmbeddingCache | None:
    """The cache of a model on disk: in the folder `wanted`, in the user's cache folder for True, None for False."""
    if wanted is False:
        return None
    files = [model] if text_encoder is None else [model, text_encoder]
    folder = None if wanted is True else wanted
    return EmbeddingCache(folder, model=str(Path(model).absolute()), revision=model_revision(*files), dtype=dtype)


def stack(items: Sequence[PromptEmbeddings]) -> PromptEmbeddings:
    """Contexts of several prompts along the batch."""
    return PromptEmbeddings(torch.cat([item.video for item in items]), torch.cat([item.audio for item in items]))


def contexts(
    name: str, value: PromptEmbeddings | Sequence[Tensor], batch: int, device: torch.device
) -> dict[str, Tensor]:
    """Both contexts on the device, one for all prompts repeated.

    Raises:
        ValueError: a shape that does not fit the batch; `name` is the parameter.
    """
    pair = value if isinstance(value, PromptEmbeddings) else PromptEmbeddings(*value)
    named = {"video_context": pair.video, "audio_context": pair.audio}
    for part, tensor in named.items():
        if tensor.dim() != 3 or tensor.shape[0] not in (1, batch):
            raise ValueError(f"{name}: {part} must be (1 or {batch}, tokens, width), got {tuple(tensor.shape)}")
    return {part: tensor.to(device).expand(batch, -1, -1) for part, tensor in named.items()}
