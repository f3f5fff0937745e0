"""The LTX-2.3 transformer on diffusers' modules, with the official cross-attention timesteps and per-item perturbations."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2PerturbedAttnProcessor, LTX2VideoTransformer3DModel
from torch import Tensor

from ltxkern.ops.qk_norm_rope import RotaryTables
from ltxkern.pipeline.model.block import BlockKeep, CrossStream, Keep, LTX2Block, Stream, modulate
from ltxkern.pipeline.model.inputs import (
    ModalityInput,
    ModalityTensors,
    Perturbation,
    check_branch,
    device_tensors,
    stack,
    timesteps,
)
from ltxkern.pipeline.model.rotary import rotary_tables
from ltxkern.pipeline.parallel.by_token import SequenceParallel, TokenShards
from ltxkern.pipeline.sampling.latents import to_denoised


class LTX2Transformer(LTX2VideoTransformer3DModel):
    """LTX-2.3 velocity model: diffusers' parameters and modules, the official conditioning.

    It differs from the parent in that the attention between modalities takes its scale and shift from the modality's
    own per-token timestep and its gate from the other modality's sigma; in that no text mask is used; and in that
    each item of a batch may have its own perturbation. A timestep is embedded once per distinct value.

    Source: Lightricks LTX-2, arXiv 2601.03233; official LTX-2.3 conditioning.
    """

    @functools.wraps(LTX2VideoTransformer3DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.prompt_modulation or self.config.use_prompt_embeddings or not self.config.use_prompt_adaln_single:
            raise ValueError(
                "this transformer is not LTX-2.3: expected cross_attn_mod=True, audio_cross_attn_mod=True, "
                "use_prompt_embeddings=False and use_prompt_adaln_single=True"
            )
        for block in self.transformer_blocks:
            # The parent builds its own blocks; ours has the same parameters and another forward.
            block.__class__ = LTX2Block
            block.attn1.set_processor(LTX2PerturbedAttnProcessor())
            block.audio_attn1.set_processor(LTX2PerturbedAttnProcessor())

    def forward(
        self,
        video: ModalityTensors | None,
        audio: ModalityTensors | None,
        perturbations: tuple[Perturbation, ...] = (Perturbation(),),
        shards: TokenShards | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Velocities (B, T, C) of the modalities that are given; the batch is split evenly over `perturbations`.

        With `shards`, video is this rank's tokens of a forward that several ranks share, and so is its velocity.
        """
        present = video if video is not None else audio
        if present is None:
            raise ValueError("video and audio are both None: expected at least one modality")
        video_stream = self._video_stream(video, audio, shards) if video is not None else None
        audio_stream = self._audio_stream(audio, video) if audio is not None else None
        x = self.proj_in(video.tokens) if video is not None else None
        y = self.audio_proj_in(audio.tokens) if audio is not None else None
        for index, block in enumerate(self.transformer_blocks):
            x, y = block(x, y, video_stream, audio_stream, _block_keep(index, perturbations, present.tokens))
        if video is not None and x is not None:
            table = self.scale_shift_table
            x = self._output(x, video, self.time_embed, table, self.norm_out, self.proj_out)
        if audio is not None and y is not None:
            table = self.audio_scale_shift_table
            y = self._output(y, audio, self.audio_time_embed, table, self.audio_norm_out, self.audio_proj_out)
        return x, y

    def _video_stream(
        self, video: ModalityTensors, audio: ModalityTensors | None, shards: TokenShards | None
    ) -> Stream:
        dtype = video.tokens.dtype
        cross = None
        if audio is not None:
            cross = CrossStream(
                modulation=_embed(self.av_cross_attn_video_scale_shift, video.timestep, dtype),
                gate=_embed(self.av_cross_attn_video_a2v_gate, self._gate_timestep(audio), dtype),
                rope=_tables(self.cross_attn_rope, video, cross_with=audio),
                rows=video.rows,
                shards=shards,
            )
        return Stream(
            context=video.context,
            modulation=_embed(self.time_embed, video.timestep, dtype),
            prompt_modulation=_embed(self.prompt_adaln, video.sigma[:, None], dtype),
            rope=_tables(self.rope, video),
            cross=cross,
            rows=video.rows,
            shards=shards,
        )

    def _audio_stream(self, audio: ModalityTensors, video: ModalityTensors | None) -> Stream:
        dtype = audio.tokens.dtype
        cross = None
        if video is not None:
            cross = CrossStream(
                modulation=_embed(self.av_cross_attn_audio_scale_shift, audio.timestep, dtype),
                gate=_embed(self.av_cross_attn_audio_v2a_gate, self._gate_timestep(video), dtype),
                rope=_tables(self.cross_attn_audio_rope, audio, cross_with=video),
                rows=audio.rows,
            )
        return Stream(
            context=audio.context,
            modulation=_embed(self.audio_time_embed, audio.timestep, dtype),
            prompt_modulation=_embed(self.audio_prompt_adaln, audio.sigma[:, None], dtype),
            rope=_tables(self.audio_rope, audio),
            cross=cross,
            rows=audio.rows,
        )

    def _gate_timestep(self, other: ModalityTensors) -> Tensor:
        """The gate of an attention into one modality is driven by the sigma of the other one; (B, 1)."""
        factor = self.config.cross_attn_timestep_scale_multiplier / self.config.timestep_scale_multiplier
        return other.sigma[:, None] * factor

    @staticmethod
    def _output(
        x: Tensor,
        item: ModalityTensors,
        embedder: Any,
        table: Tensor,
        norm: Any,
        projection: Any,
    ) -> Tensor:
        embedded = _timestep_embedding(embedder, item.timestep, x.dtype)
        sums = table[:, None, None] + embedded
        if item.rows is not None:
            sums = sums.flatten(1, 2)[:, item.rows]
        shift, scale = sums.unbind(0)
        return projection(modulate(norm(x), scale, shift))


def _tables(embedding: Any, item: ModalityTensors, *, cross_with: ModalityTensors | None = None) -> RotaryTables:
    """RoPE tables of a modality; of the attention between two by time alone, and by coordinate where both have them."""
    if cross_with is None:
        return rotary_tables(embedding, item.positions, item.coordinates)
    coordinates = cross_with.coordinates and item.coordinates and item.coordinates.first_axis()
    return rotary_tables(embedding, item.positions[:, :1], coordinates)


def _sinusoid(timestep: Tensor, width: int) -> Tensor:
    """(N,) timesteps to fp32 (N, width): cosines, then sines, of timestep * 10000^(-k / (width / 2)).

    The frequencies are rounded once from fp64: fp32 `exp` differs by an ulp between processors, and timesteps near
    1000 make that visible (1e-5 in the velocity).
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) * -math.log(10000.0) / half
    angle = timestep[:, None].float() * exponent.double().exp().float()
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def _timestep_embedding(embedder: Any, timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T) timesteps to (B, T, D), before the modulation projection."""
    angles = _sinusoid(timestep.flatten(), embedder.emb.time_proj.num_channels)
    return embedder.emb.timestep_embedder(angles.to(dtype)).unflatten(0, timestep.shape)


def _embed(embedder: Any, timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T) timesteps to modulation vectors (B, T, n * D)."""
    return embedder.linear(embedder.silu(_timestep_embedding(embedder, timestep, dtype)))


def _block_keep(index: int, perturbations: tuple[Perturbation, ...], like: Tensor) -> BlockKeep:
    return BlockKeep(
        video_self=_keep([index not in p.skip_video_self_attn_blocks for p in perturbations], like),
        audio_self=_keep([index not in p.skip_audio_self_attn_blocks for p in perturbations], like),
        a2v=_keep([not p.disable_a2v_cross_attn for p in perturbations], like),
        v2a=_keep([not p.disable_v2a_cross_attn for p in perturbations], like),
    )


def _keep(flags: list[bool], like: Tensor) -> Keep:
    """One Python bool where the branches agree; else (B, 1, 1) built on the device, so that nothing synchronises."""
    if all(flags) or not any(flags):
        return flags[0]
    items = like.shape[0] // len(flags)
    return torch.cat([like.new_full((items, 1, 1), float(flag)) for flag in flags])


def _perturbation(transformer: LTX2Transformer, flags: Mapping[str, Any]) -> Perturbation:
    blocks = len(transformer.transformer_blocks)
    chosen = dict(flags)
    for name in ("skip_video_self_attn_blocks", "skip_audio_self_attn_blocks"):
        chosen[name] = tuple(chosen.get(name, ()))
        wrong = [index for index in chosen[name] if not 0 <= index < blocks]
        if wrong:
            raise ValueError(f"{name}: expected block indices 0 to {blocks - 1}, got {wrong}")
    return Perturbation(**chosen)


@torch.no_grad()
def predict_velocity_batched(
    transformer: LTX2Transformer, branches: Sequence[Mapping[str, Any]], sequence: SequenceParallel | None = None
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Velocities of several guidance branches from one forward over their concatenated batches.

    Args:
        transformer: the model.
        branches: keyword arguments of `predict_velocity`, one mapping per branch; `video` and `audio` included. All
            branches have the same modalities and shapes, and differ in context, sigma and perturbation.
        sequence: ranks over which the video tokens are shared out; every one of them makes the same call.

    Returns:
        One (video, audio) pair per branch, as `predict_velocity` gives it alone (equal up to GEMM rounding).
    """
    if not branches:
        return []
    pairs = []
    perturbations = []
    for branch in branches:
        flags = dict(branch)
        pair = (flags.pop("video", None), flags.pop("audio", None))
        check_branch(transformer.config, *pair)
        pairs.append(pair)
        perturbations.append(_perturbation(transformer, flags))
    scale = transformer.config.timestep_scale_multiplier
    stacked = []
    for name, items in (("video", [v for v, _ in pairs]), ("audio", [a for _, a in pairs])):
        given = [item for item in items if item is not None]
        if given and len(given) != len(items):
            raise ValueError(f"{name}: expected in every branch or in none, got it in {len(given)} of {len(items)}")
        if len({tuple(item.latent.shape) for item in given}) > 1:
            raise ValueError(f"{name}.latent: expected one shape, got {[tuple(i.latent.shape) for i in given]}")
        masked = len({item.mask is None for item in given}) > 1
        if masked:
            raise ValueError(f"{name}.mask: expected in every branch or in none")
        if len({item.levels for item in given}) > 1:
            raise ValueError(f"{name}.levels: expected the same in every branch, got {[i.levels for i in given]}")
        stacked.append(stack([device_tensors(item, scale) for item in given]) if given else None)
    run: Any = transformer if sequence is None else functools.partial(sequence.run, transformer)
    outputs = run(*stacked, tuple(perturbations))
    chunks = [[None] * len(branches) if out is None else out.chunk(len(branches)) for out in outputs]
    return list(zip(*chunks, strict=True))


def predict_velocity(
    transformer: LTX2Transformer,
    video: ModalityInput | None,
    audio: ModalityInput | None,
    *,
    skip_video_self_attn_blocks: Iterable[int] = (),
    skip_audio_self_attn_blocks: Iterable[int] = (),
    disable_a2v_cross_attn: bool = False,
    disable_v2a_cross_attn: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Velocity of each modality, v = (x_sigma - x0) / sigma.

    Args:
        transformer: the model.
        video, audio: inputs; None leaves that modality out.
        skip_video_self_attn_blocks, skip_audio_self_attn_blocks: blocks whose self-attention hands on its values.
        disable_a2v_cross_attn, disable_v2a_cross_attn: leave out the attention into video, into audio, in all blocks.

    Returns:
        (video, audio) velocities (B, T, C) in the model dtype, None where the modality is absent.

    Raises:
        ValueError: shapes that do not fit, or a block index out of range.

    Numerical contract: rounded; equal to the official model within fp32 rounding (5e-6 on the golden cases).
    """
    branch = {
        "video": video,
        "audio": audio,
        "skip_video_self_attn_blocks": skip_video_self_attn_blocks,
        "skip_audio_self_attn_blocks": skip_audio_self_attn_blocks,
        "disable_a2v_cross_attn": disable_a2v_cross_attn,
        "disable_v2a_cross_attn": disable_v2a_cross_attn,
    }
    return predict_velocity_batched(transformer, [branch])[0]


@torch.no_grad()
def predict_x0_batched(
    transformer: LTX2Transformer, branches: Sequence[Mapping[str, Any]], sequence: SequenceParallel | None = None
) -> list[dict[str, Tensor]]:
    """Denoised predictions of several branches from one forward; arguments as `predict_velocity_batched`."""
    results = []
    for branch, velocities in zip(branches, predict_velocity_batched(transformer, branches, sequence), strict=True):
        items = {"video": (branch.get("video"), velocities[0]), "audio": (branch.get("audio"), velocities[1])}
        results.append(
            {name: _to_x0(item, v) for name, (item, v) in items.items() if item is not None and v is not None}
        )
    return results


def _to_x0(item: ModalityInput, velocity: Tensor) -> Tensor:
    return to_denoised(item.latent, velocity, timesteps(item, item.mask))


def predict_x0(
    transformer: LTX2Transformer, video: ModalityInput | None, audio: ModalityInput | None, **perturbation: Any
) -> dict[str, Tensor]:
    """Denoised prediction x0 = latent - velocity * mask * sigma, in fp32 from the model dtype, cast back to it.

    Args: as `predict_velocity`.

    Returns:
        {"video": (B, T, C), "audio": (B, T, C)} without the modalities that were None. A token with mask 0 comes
        back as its latent.
    """
    return predict_x0_batched(transformer, [{"video": video, "audio": audio, **perturbation}])[0]
