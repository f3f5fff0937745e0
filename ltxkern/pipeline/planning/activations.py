"""Peak activations of every part of a run, from shapes alone: the real modules run on the meta device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline.model.decode import denormalize, resolve_tiling, upsample_latent
from ltxkern.pipeline.model.tiling import frame_count
from ltxkern.pipeline.planning.meta_trace import peak_bytes
from ltxkern.pipeline.planning.weights import ModelSizes
from ltxkern.pipeline.run.request import GenerationRequest, Stage
from ltxkern.pipeline.run.stage import BranchForward, batched_runner
from ltxkern.pipeline.sampling.guidance import (
    CFGPolicy,
    GuidanceRequest,
    GuidedDenoiser,
    MultiModalPolicy,
    SingleBranchPolicy,
)
from ltxkern.pipeline.sampling.latents import Geometry, LatentState
from ltxkern.pipeline.sampling.res2s import res2s_sample

# Blocks of the transformer that are run: what one block needs is free again before the next.
_TRACED_BLOCKS = 2


@dataclass(frozen=True)
class Activations:
    """Bytes that one part of a run allocates at its peak beside weights: on the device, and for results on the host."""

    device: int
    host: int = 0


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def contexts(sizes: ModelSizes, batch: int) -> dict[str, Tensor]:
    """Contexts of a batch of prompts, on the meta device."""
    config = sizes.configs["transformer"]
    widths = {"video": config["cross_attention_dim"], "audio": config["audio_cross_attention_dim"]}
    return {
        f"{name}_context": _meta(batch, sizes.text_tokens, width, dtype=sizes.dtype) for name, width in widths.items()
    }


def text_activations(sizes: ModelSizes, texts: int) -> Activations:
    """Text encoding: all hidden states of all prompts at once, then one prompt at a time through the connectors.

    The text encoder itself is estimated: its hidden states twice (kept, and stacked) and one feed-forward of four times
    the width.
    """
    config = sizes.configs["connectors"]
    width, states = config["caption_channels"], config["text_proj_in_factor"]
    rows = texts * sizes.text_tokens * sizes.dtype.itemsize
    hidden = rows * width * states
    module = sizes.module("connectors")
    one = _meta(1, sizes.text_tokens, width, states, dtype=sizes.dtype)
    mask = _meta(1, sizes.text_tokens, dtype=torch.int64)
    encoder = hidden + max(hidden, 3 * 4 * width * rows)
    return Activations(max(encoder, hidden + peak_bytes(lambda: module(one, mask))))


def _traced_guidance(request: GenerationRequest) -> GuidanceRequest:
    """The request's guidance, with blocks to skip that the traced part of the transformer has."""
    guidance = request.guidance(Geometry())
    video, audio = (
        replace(scales, stg_blocks=(0,)) if scales is not None and scales.stg_blocks else scales
        for scales in (guidance.video, guidance.audio)
    )
    return GuidanceRequest(video, audio)


def stage_activations(sizes: ModelSizes, request: GenerationRequest, stage: Stage, first: bool) -> Activations:
    """One denoising stage: a step of the sampler with all guidance branches."""
    depth = min(_TRACED_BLOCKS, sizes.configs["transformer"]["num_layers"])
    transformer = sizes.module("transformer", num_layers=depth)
    context = contexts(sizes, request.batch)
    policy: CFGPolicy = SingleBranchPolicy.build(None, context)
    if first:
        policy = MultiModalPolicy.build(_traced_guidance(request), context, contexts(sizes, request.batch))

    def step() -> None:
        place: dict[str, Any] = {"fps": request.frame_rate, "dtype": sizes.dtype, "device": "meta"}
        ratios: dict[str, Any] = {
            "spatial_ratio": sizes.geometry.spatial_ratio,
            "temporal_ratio": sizes.geometry.temporal_ratio,
        }
        states = {
            "video": LatentState.create(stage.video, **place, **ratios),
            "audio": LatentState.create(stage.audio, **place),
        }
        latents = {name: state.latent for name, state in states.items()}
        denoiser = GuidedDenoiser(
            policy, BranchForward(transformer, states, False), runner=batched_runner(request.max_batch_size)
        )
        noise = {name: [torch.empty_like(x, dtype=torch.float64) for _ in range(2)] for name, x in latents.items()}
        res2s_sample(denoiser, latents, torch.tensor([0.9, 0.5]), noise=noise)

    return Activations(peak_bytes(step))


def upsample_activations(sizes: ModelSizes, stage: Stage, *, unified: bool) -> Activations:
    """The latent upsampler."""
    upsampler, latent = sizes.module("upsampler"), _meta(*stage.video.dims(), dtype=sizes.dtype)
    # Without a VAE latents are taken as they are.
    vae = sizes.module("video_vae") if "video_vae" in sizes.configs else None
    return Activations(
        peak_bytes(
            lambda: upsampler(latent) if vae is None else upsample_latent(upsampler, vae, latent), cpu_kernels=unified
        )
    )


def audio_activations(sizes: ModelSizes, stage: Stage, *, unified: bool) -> Activations:
    """Audio decoding: VAE, vocoder in fp32, bandwidth extension."""
    vae, vocoder = sizes.module("audio_vae"), sizes.module("vocoder")
    latent = _meta(1, *stage.audio.dims()[1:], dtype=sizes.dtype)
    return Activations(peak_bytes(lambda: vocoder(vae.decoder(latent).float()), cpu_kernels=unified))


def video_activations(sizes: ModelSizes, request: GenerationRequest, stage: Stage, *, unified: bool) -> Activations:
    """Tiled video decoding: the largest tile, the group of frames it is added to, and the frames on the host.

    Args:
        unified: device and host are one memory.
    """
    vae = sizes.module("video_vae")
    latent = _meta(1, *stage.video.dims()[1:], dtype=sizes.dtype)
    layout = resolve_tiling(vae, latent)

    def longest(axis: str) -> int:
        return max(interval.end - interval.start for interval in getattr(layout, axis))

    tile = latent[:, :, : longest("time"), : longest("height"), : longest("width")]
    ratio, side, item = sizes.geometry.temporal_ratio, sizes.geometry.spatial_ratio, sizes.dtype.itemsize
    pixels = 3 * request.height * request.width * item
    groups = [frame_count(time, ratio) * pixels for time in layout.time]
    tile_frames = (tile.shape[2] - 1) * ratio + 1
    tile_values = 3 * tile_frames * tile.shape[3] * tile.shape[4] * side * side
    decoding = peak_bytes(lambda: vae.decoder(denormalize(tile, vae)), cpu_kernels=unified)
    if layout.tiles > 1:
        # The decoded tile and its fp32 product with the masks stand side by side.
        decoding = max(decoding, tile_values * (item + 4))
    # Checking for NaN takes a copy of absolute values and two masks.
    check = max(groups) * (item + 2) // item
    video = request.num_frames * pixels * request.batch
    overlap = max(0, sum(groups) - request.num_frames * pixels)
    if not unified:
        device = max(groups) + overlap + max(decoding if layout.tiles > 1 else decoding - max(groups), check)
        return Activations(device, 2 * video)
    held = (request.batch - 1) * request.num_frames * pixels
    kept = [sum(groups[: index + 1]) for index in range(len(groups))]
    during = max(kept) + overlap + (max(decoding, check) if layout.tiles > 1 else max(check, decoding - groups[0]))
    return Activations(max(held + during, kept[-1] + held + video))


def encode_activations(sizes: ModelSizes, height: int, width: int, *, unified: bool) -> Activations:
    """Encoding one conditioning picture."""
    vae = sizes.module("video_vae")
    pixels = _meta(1, 3, 1, height, width, dtype=sizes.dtype)
    return Activations(peak_bytes(lambda: vae.encoder(pixels), cpu_kernels=unified))


def latent_bytes(sizes: ModelSizes, request: GenerationRequest) -> int:
    """Latents and contexts that are kept through a run: two contexts, three video and two audio latents."""
    stages = request.stages(sizes.geometry)
    values = sum(2 * math.prod(stage.video.dims()) + math.prod(stage.audio.dims()) for stage in stages)
    return values * sizes.dtype.itemsize + 2 * sum(t.nbytes for t in contexts(sizes, request.batch).values())
