"""The text part of a run: prompts encoded once, kept on disk, the text encoder let go afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ltxkern.pipeline.files.found import FoundModel
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.model.text import PromptEmbeddings, encode_prompts
from ltxkern.pipeline.results.embedding_cache import EmbeddingCache, model_revision
from ltxkern.pipeline.run.device_memory import vacate, with_room
from ltxkern.pipeline.run.health import explained
from ltxkern.pipeline.run.progress import Report, report
from ltxkern.pipeline.run.request import GenerationRequest
from ltxkern.pipeline.sampling.finite import check_latents
from ltxkern.pipeline.sampling.guidance import CFGPolicy, GuidanceRequest, MultiModalPolicy, SingleBranchPolicy
from ltxkern.pipeline.work.kept import KeptWork


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

    def policies(
        self,
        request: GenerationRequest,
        guidance: GuidanceRequest,
        policy: type[CFGPolicy],
        embeddings: PromptEmbeddings | Sequence[Tensor] | None = None,
        negative: PromptEmbeddings | Sequence[Tensor] | None = None,
        progress: Report | None = None,
        work: KeptWork | None = None,
    ) -> list[CFGPolicy]:
        """Guidance of stage 1 and the single branch of stage 2, with their contexts on the device.

        Raises:
            ValueError: embeddings of a shape that does not fit, or negative ones that are needed and neither given nor encoded.
        """
        # Which branches somebody's own policy runs is only known once it is built.
        unknown = not issubclass(policy, MultiModalPolicy)
        wants_negative = unknown or any(scales.cfg != 1 for scales in guidance.present.values())
        if embeddings is None:
            texts = request.prompts() + (request.negative_prompts() if wants_negative and negative is None else [])
            encoded = self._kept(work or KeptWork(), texts, progress)
            embeddings = _stack(encoded[: request.batch])
            if len(encoded) > request.batch:
                negative = _stack(encoded[request.batch :])
        if wants_negative and negative is None and not unknown:
            raise ValueError(
                "negative_embeddings are needed where a cfg scale is not 1: give them, or set both cfg scales to 1"
            )
        positive = self._contexts("embeddings", embeddings, request.batch)
        opposite = None if negative is None else self._contexts("negative_embeddings", negative, request.batch)
        return [policy.build(guidance, positive, opposite), SingleBranchPolicy.build(None, positive)]

    def _kept(self, work: KeptWork, texts: list[str], progress: Report | None) -> list[PromptEmbeddings]:
        """`encode`, or what an earlier process encoded, in the dtype of today."""

        def make() -> dict[str, Tensor]:
            found = self.encode(texts, progress)
            return {f"{part}-{i:05d}": getattr(one, part) for i, one in enumerate(found) for part in ("video", "audio")}

        held, dtype = work.once("text", make), self._components.dtype("connectors")
        pairs = [[held[f"{part}-{i:05d}"] for part in ("video", "audio")] for i in range(len(texts))]
        return [PromptEmbeddings(*(one if dtype is None else one.to(dtype) for one in pair)) for pair in pairs]

    def encode(self, texts: list[str], progress: Report | None = None) -> list[PromptEmbeddings]:
        """One pair of contexts a text, from the cache where it is there.

        Raises:
            NonFiniteError: NaN or infinity in a context.
        """
        report(progress, "text", 0, 1)
        encoded = self._encode_now(texts) if self._cache is None else self._cache.get(texts, self._encode_now)
        with explained("text", self._components, ["text_encoder", "connectors"]):
            contexts = {f"video context {i}": item.video for i, item in enumerate(encoded, 1)}
            contexts |= {f"audio context {i}": item.audio for i, item in enumerate(encoded, 1)}
            check_latents("text encoding", contexts)
        if not self._keep and self._components.reloadable("text_encoder"):
            self._components.release("text_encoder")
        report(progress, "text", 1, 1)
        return encoded

    def _encode_now(self, texts: list[str]) -> list[PromptEmbeddings]:
        return with_room("text encoding", lambda: self._encoded(texts), lambda: vacate(self._manager))

    def _encoded(self, texts: list[str]) -> list[PromptEmbeddings]:
        parts = self._components
        tokenizer = parts.tokenizer  # first: a fault of its small files shows before the encoder's gigabytes are read
        with (
            self._manager.component("text_encoder", parts.text_encoder, once=not self._keep) as encoder,
            self._manager.component("connectors", parts.connectors) as connectors,
        ):
            dtype = next(connectors.parameters()).dtype
            return encode_prompts(tokenizer, encoder, connectors, texts, device=self._device, dtype=dtype)

    def _contexts(self, name: str, value: PromptEmbeddings | Sequence[Tensor], batch: int) -> dict[str, Tensor]:
        """Both contexts on the device, one for all prompts repeated; `name` is the parameter."""
        pair = value if isinstance(value, PromptEmbeddings) else PromptEmbeddings(*value)
        named = {"video_context": pair.video, "audio_context": pair.audio}
        for part, tensor in named.items():
            if tensor.dim() != 3 or tensor.shape[0] not in (1, batch):
                raise ValueError(f"{name}: {part} must be (1 or {batch}, tokens, width), got {tuple(tensor.shape)}")
        return {part: tensor.to(self._device).expand(batch, -1, -1) for part, tensor in named.items()}


def open_embedding_cache(wanted: str | Path | bool, model: FoundModel, dtype: torch.dtype) -> EmbeddingCache | None:
    """The cache of a model on disk: in the folder `wanted`, in the user's cache folder for True, None for False.

    The demos and a model from the hub have none.
    """
    if wanted is False or model.path is None:
        return None
    parts = [] if model.own is None else model.own.parts.values()
    files = [model.path, *parts, *([] if model.text_encoder is None else [model.text_encoder])]
    folder = None if wanted is True else wanted
    name = str(model.path.absolute()) + (f" {model.variant}" if model.variant else "")
    return EmbeddingCache(folder, model=name, revision=model_revision(*files), dtype=dtype)


def _stack(items: Sequence[PromptEmbeddings]) -> PromptEmbeddings:
    """Contexts of several prompts along the batch."""
    return PromptEmbeddings(torch.cat([item.video for item in items]), torch.cat([item.audio for item in items]))
