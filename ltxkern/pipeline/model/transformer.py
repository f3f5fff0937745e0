"""The LTX-2.3 transformer on diffusers' modules, with the official cross-attention timesteps and per-item perturbations."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2PerturbedAttnProcessor, LTX2VideoTransformer3DModel
from torch import Tensor

from ltxkern.ops.checks import ACTIVATION_DTYPES
from ltxkern.ops.gated_residual import gated_residual
from ltxkern.ops.qk_norm_rope import RotaryTables
from ltxkern.pipeline.model.block import (
    BlockKeep,
    Lane,
    LTX2Block,
    Residual,
    Side,
    State,
    modulations,
    sums_at_once,
)
from ltxkern.pipeline.model.fusions import layer_norm_modulate, linear, settled_policy
from ltxkern.pipeline.model.inputs import (
    Batch,
    CrossStream,
    KeptTables,
    ModalityInput,
    ModalityTensors,
    Perturbation,
    Stream,
    check_branch,
    column,
    device_tensors,
    shared_tensors,
    shares_all_but_text,
    stack,
    timesteps,
)
from ltxkern.pipeline.parallel.by_token import SequenceParallel, TokenShards
from ltxkern.pipeline.sampling.latents import to_denoised
from ltxkern.pipeline.sampling.state import MODALITIES


class _Names(NamedTuple):
    """The parent's modules and tables of one modality."""

    time: str
    prompt: str
    cross: str
    gate: str
    rope: str
    cross_rope: str
    table: str
    last_norm: str
    projection: str


def _names(modality: str, prefix: str, into: str) -> _Names:
    return _Names(
        time=f"{prefix}time_embed",
        prompt=f"{prefix}prompt_adaln",
        cross=f"av_cross_attn_{modality}_scale_shift",
        gate=f"av_cross_attn_{modality}_{into}_gate",
        rope=f"{prefix}rope",
        cross_rope=f"cross_attn_{prefix}rope",
        table=f"{prefix}scale_shift_table",
        last_norm=f"{prefix}norm_out",
        projection=f"{prefix}proj_out",
    )


_NAMES = {"video": _names("video", "", "a2v"), "audio": _names("audio", "audio_", "v2a")}


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
        self._rope_tables = KeptTables()

    def forward(
        self,
        video: ModalityTensors | None,
        audio: ModalityTensors | None,
        batches: tuple[Batch, ...] = (Batch(),),
        shards: TokenShards | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Velocities (B, T, C) of the modalities that are given, of the branches of all batches one after another.

        The batches go through every block side by side, so that what they share is made once and a block's weights are read once.
        With `shards`, video is this rank's tokens of a forward that several ranks share, and so is its velocity.
        """
        if video is None and audio is None:
            raise ValueError("video and audio are both None: expected at least one modality")
        streams = (
            None if video is None else self._stream("video", video, audio, shards),
            None if audio is None else self._stream("audio", audio, video, None),
        )
        blocks = self.transformer_blocks
        # By how often a batch has every token: once for each of its branches.
        repeated = {1} | {len(batch.texts) for batch in batches}
        videos, audios = (
            {times: _sides(blocks, stream, name, times) for times in repeated}
            for stream, name in zip(streams, MODALITIES, strict=True)
        )

        def lane(index: int, batch: Batch) -> Lane:
            times = len(batch.texts)
            return Lane(videos[times][index], audios[times][index], _block_keep(index, batch), batch.texts)

        states = [
            State(
                None if video is None else Residual(linear(self.proj_in, video.tokens)),
                None if audio is None else Residual(linear(self.audio_proj_in, audio.tokens)),
            )
        ]
        apart = len(batches) == len(batches[0].texts) == 1
        for index, block in enumerate(blocks):
            # What all branches begin with goes into the first block once.
            trunk = None if apart or index else lane(0, Batch())
            states = block(states, [lane(index, batch) for batch in batches], trunk)
        ends = zip(*((state.video, state.audio) for state in states), strict=True)
        every = zip(MODALITIES, (video, audio), streams, ends, strict=True)
        velocity, sound = (self._output(*each) for each in every)
        return velocity, sound

    def _stream(
        self, modality: str, item: ModalityTensors, other: ModalityTensors | None, shards: TokenShards | None
    ) -> Stream:
        """What the blocks read of a modality beside another; its timesteps are embedded together."""
        names, dtype = _NAMES[modality], item.tokens.dtype
        levels = [item.timestep, item.sigma[:, None]]
        if other is not None:
            levels.append(self._gate_timestep(other))
        time_embed = getattr(self, names.time)
        angles = _sinusoids(levels, time_embed.emb.time_proj.num_channels, dtype)
        cross = None
        if other is not None:
            cross = CrossStream(
                modulation=_embed(getattr(self, names.cross), angles[0]),
                gate=_embed(getattr(self, names.gate), angles[2]),
                rope=self._tables(names.cross_rope, item, cross_with=other),
            )
        embedded = time_embed.emb.timestep_embedder(angles[0])
        return Stream(
            contexts=item.contexts,
            embedded=embedded,
            modulation=linear(time_embed.linear, time_embed.silu(embedded)),
            prompt_modulation=_embed(getattr(self, names.prompt), angles[1]),
            rope=self._tables(names.rope, item),
            cross=cross,
            rows=item.rows,
            shards=shards,
        )

    def _gate_timestep(self, other: ModalityTensors) -> Tensor:
        """The gate of an attention into one modality is driven by the sigma of the other one; (B, 1)."""
        factor = self.config.cross_attn_timestep_scale_multiplier / self.config.timestep_scale_multiplier
        return other.sigma[:, None] * factor

    def _tables(self, name: str, item: ModalityTensors, *, cross_with: ModalityTensors | None = None) -> RotaryTables:
        """RoPE tables of a modality by one of the model's embeddings; of the attention between two by time alone.

        They are by coordinate where the coordinates are known (between two, of both), and kept for the next forward with these.
        """
        embedding, coordinates = getattr(self, name), item.coordinates
        if cross_with is None:
            return self._rope_tables.of(name, embedding, item.positions, coordinates, alone=False)
        known = coordinates if cross_with.coordinates is not None else None
        return self._rope_tables.of(name, embedding, item.positions[:, :1], known, alone=True)

    def _output(
        self, modality: str, item: ModalityTensors | None, stream: Stream | None, residuals: Sequence[Residual | None]
    ) -> Tensor | None:
        """Velocities of a modality from what its residual streams hold behind the last block."""
        if item is None or stream is None:
            return None
        names = _NAMES[modality]
        norm, projection = getattr(self, names.last_norm), getattr(self, names.projection)
        sums = getattr(self, names.table)[:, None, None] + stream.embedded
        if item.rows is not None:
            sums = sums.flatten(1, 2)[:, item.rows]
        outputs = []
        for residual in residuals:
            assert residual is not None
            times = residual.x.shape[0] // item.tokens.shape[0]
            shift, scale = (sums if times == 1 or sums.shape[1] == 1 else sums.repeat(1, times, 1, 1)).unbind(0)
            outputs.append(linear(projection, layer_norm_modulate(norm, residual.x, scale, shift)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _sides(blocks: Sequence[Any], stream: Stream | None, modality: str, times: int) -> list[Side | None]:
    """What each block reads of a modality in a batch that has every token so many times."""
    if stream is None:
        return [None] * len(blocks)
    repeated = stream.repeated(times)
    every = modulations(blocks, repeated, modality) if sums_at_once(blocks, repeated) else [None] * len(blocks)
    return [Side(repeated, now, following) for now, following in zip(every, [*every[1:], None], strict=True)]


def _sinusoid(timestep: Tensor, width: int) -> Tensor:
    """(N,) timesteps to fp32 (N, width): cosines, then sines, of timestep * 10000^(-k / (width / 2)).

    The frequencies are rounded once from fp64: fp32 `exp` differs by an ulp between processors, and timesteps near
    1000 make that visible (1e-5 in the velocity).
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) * -math.log(10000.0) / half
    angle = timestep[:, None].float() * exponent.double().exp().float()
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def _sinusoids(timesteps: Sequence[Tensor], width: int, dtype: torch.dtype) -> Sequence[Tensor]:
    """`_sinusoid` of several (B, T) at once, each (B, T, width) in the dtype of the model."""
    every = _sinusoid(torch.cat([each.flatten() for each in timesteps]), width).to(dtype)
    parts = every.split([each.numel() for each in timesteps])
    return [part.unflatten(0, each.shape) for part, each in zip(parts, timesteps, strict=True)]


def _embed(embedder: Any, angles: Tensor) -> Tensor:
    """Angles (B, T, W) to modulation vectors (B, T, n * D)."""
    return linear(embedder.linear, embedder.silu(embedder.emb.timestep_embedder(angles)))


def _block_keep(index: int, batch: Batch) -> BlockKeep:
    each = batch.perturbations
    return BlockKeep(
        video_self=tuple(index not in p.skip_video_self_attn_blocks for p in each),
        audio_self=tuple(index not in p.skip_audio_self_attn_blocks for p in each),
        a2v=tuple(not p.disable_a2v_cross_attn for p in each),
        v2a=tuple(not p.disable_v2a_cross_attn for p in each),
    )


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
@settled_policy()
def predict_velocity_batched(
    transformer: LTX2Transformer,
    branches: Sequence[Mapping[str, Any]],
    sequence: SequenceParallel | None = None,
    most: int | None = None,
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Velocities of several guidance branches from one forward.

    Args:
        transformer: the model.
        branches: keyword arguments of `predict_velocity`, one mapping per branch; `video` and `audio` included. All
            branches have the same modalities and shapes, and differ in context, sigma and perturbation.
        sequence: ranks over which the video tokens are shared out; every one of them makes the same call.
        most: branches of one batch; None for all of them. Batches of branches with the very same tokens and sigma go through the
            blocks side by side in one forward, others one after the other in forwards of their own.

    Returns:
        One (video, audio) pair per branch, as `predict_velocity` gives it alone: bit for bit with `most` 1, else equal up to
        GEMM rounding.
    """
    pairs = []
    perturbations = []
    for branch in branches:
        flags = dict(branch)
        pair = (flags.pop("video", None), flags.pop("audio", None))
        check_branch(transformer.config, *pair)
        pairs.append(pair)
        perturbations.append(_perturbation(transformer, flags))
    columns = [column(name, items) for name, items in zip(MODALITIES, zip(*pairs, strict=True), strict=False)]
    most = most or max(1, len(branches))
    chunks = [slice(start, start + most) for start in range(0, len(branches), most)]
    run: Any = transformer if sequence is None else functools.partial(sequence.run, transformer)
    scale = transformer.config.timestep_scale_multiplier
    if len(branches) > 1 and all(shares_all_but_text(items) for items in columns if items):
        numbers, tensors = shared_tensors(columns, scale)
        batches = tuple(Batch(tuple(perturbations[chunk]), numbers[chunk]) for chunk in chunks)
        return _split(run(*tensors, batches), len(branches))
    outputs = []
    for chunk in chunks:
        tensors = [
            stack([device_tensors(item, scale) for item in items[chunk]]) if items else None for items in columns
        ]
        batch = Batch(tuple(perturbations[chunk]))
        outputs += _split(run(*tensors, (batch,)), len(batch.perturbations))
    return outputs


def _split(outputs: Sequence[Tensor | None], count: int) -> list[tuple[Tensor | None, Tensor | None]]:
    """Outputs of so many branches, one pair each."""
    chunks = [[None] * count if out is None else out.chunk(count) for out in outputs]
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
    transformer: LTX2Transformer,
    branches: Sequence[Mapping[str, Any]],
    sequence: SequenceParallel | None = None,
    most: int | None = None,
) -> list[dict[str, Tensor]]:
    """Denoised predictions of several branches from one forward; arguments as `predict_velocity_batched`."""
    found = predict_velocity_batched(transformer, branches, sequence, most)
    # Branches of one evaluation have the same of these.
    steps: dict[tuple[Any, ...], Tensor] = {}
    results = []
    for branch, velocities in zip(branches, found, strict=True):
        items = zip(MODALITIES, (branch.get(name) for name in MODALITIES), velocities, strict=True)
        results.append({name: _to_x0(item, v, steps) for name, item, v in items if item is not None and v is not None})
    return results


def _to_x0(item: ModalityInput, velocity: Tensor, steps: dict[tuple[Any, ...], Tensor]) -> Tensor:
    key = (id(item.mask), item.sigma, len(item.latent))
    if key not in steps:
        steps[key] = timesteps(replace(item, sigma=-item.sigma), item.mask).float()
    if velocity.dtype != item.latent.dtype or velocity.dtype not in ACTIVATION_DTYPES:
        return to_denoised(item.latent, velocity, -steps[key])
    return gated_residual(item.latent, velocity, steps[key])  # its bits, in one pass


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
