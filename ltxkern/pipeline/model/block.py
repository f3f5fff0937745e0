"""One LTX-2.3 transformer block: diffusers' parameters, a forward in which each attention may be left out per item."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformerBlock
from torch import Tensor

from ltxkern.ops.gated_residual import gated_residual
from ltxkern.ops.qk_norm_rope import RotaryTables
from ltxkern.ops.rms_norm_modulate import gated_residual_rms_norm_modulate, rms_norm_modulate
from ltxkern.pipeline.model.attention import Keep, attend

if TYPE_CHECKING:
    from ltxkern.pipeline.parallel.by_token import TokenShards


@dataclass(frozen=True)
class CrossStream:
    """What the attention between the modalities reads of one of them."""

    modulation: Tensor  # (B, N, 4 * D): scale, shift for a2v, scale, shift for v2a
    gate: Tensor  # (B, 1, D)
    rope: RotaryTables
    rows: Tensor | None = None  # (B, T) int64 into B * N; None where N is 1 or T
    shards: "TokenShards | None" = None  # where its tokens are shared out over ranks


@dataclass(frozen=True)
class Stream:
    """What every block of a forward reads of one modality."""

    context: Tensor  # (B, L, D)
    modulation: Tensor  # (B, N, 9 * D): shift, scale, gate of self-attention, feed-forward, text attention
    prompt_modulation: Tensor  # (B, 1, 2 * D): shift, scale
    rope: RotaryTables
    cross: CrossStream | None  # None where the other modality is absent
    rows: Tensor | None = None  # (B, T) int64 into B * N; None where N is 1 or T
    shards: "TokenShards | None" = None  # where its tokens are shared out over ranks


@dataclass(frozen=True)
class BlockKeep:
    """Which attentions of a block run: True all items, False none, a (B, 1, 1) tensor of 0 and 1 some of them."""

    video_self: Keep = True
    audio_self: Keep = True
    a2v: Keep = True
    v2a: Keep = True


def _parts(table: Tensor, modulation: Tensor, start: int, stop: int, rows: Tensor | None) -> tuple[Tensor, ...]:
    """Parts start..stop of `table (n, D) + modulation (B, N, n * D)`: each (B, N, D), or (B * N, D) for `rows` to point into."""
    width = table.shape[1]
    part = modulation[..., start * width : stop * width].unflatten(-1, (stop - start, width))
    sums = table[start:stop] + part
    return (sums if rows is None else sums.flatten(0, 1)).unbind(-2)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x (1 + scale) + shift`."""
    return x * (1 + scale) + shift


def _kept(x: Tensor, keep: Keep) -> Tensor:
    return x * keep if isinstance(keep, Tensor) else x


class LTX2Block(LTX2VideoTransformerBlock):
    """One block; either modality may be absent, and each attention may be left out for some items of the batch."""

    def forward(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        video_stream: Stream | None,
        audio_stream: Stream | None,
        keep: BlockKeep,
    ) -> tuple[Tensor | None, Tensor | None]:
        if video is not None and video_stream is not None:
            video = self._video_attentions(video, video_stream, keep.video_self)
        if audio is not None and audio_stream is not None:
            audio = self._audio_attentions(audio, audio_stream, keep.audio_self)
        if video is not None and audio is not None:
            video_cross, audio_cross = (stream.cross if stream else None for stream in (video_stream, audio_stream))
            if video_cross is not None and audio_cross is not None:
                video, audio = self._cross_attentions(video, audio, video_cross, audio_cross, keep)
        if video is not None and video_stream is not None:
            video = _feed_forward(self.ff, self.norm3, video, self.scale_shift_table, video_stream)
        if audio is not None and audio_stream is not None:
            audio = _feed_forward(self.audio_ff, self.audio_norm3, audio, self.audio_scale_shift_table, audio_stream)
        return video, audio

    def _video_attentions(self, x: Tensor, stream: Stream, keep: Keep) -> Tensor:
        tables = (self.scale_shift_table, self.prompt_scale_shift_table)
        return _attentions(x, stream, keep, tables, (self.norm1, self.attn1), (self.norm2, self.attn2))

    def _audio_attentions(self, x: Tensor, stream: Stream, keep: Keep) -> Tensor:
        tables = (self.audio_scale_shift_table, self.audio_prompt_scale_shift_table)
        own, text = (self.audio_norm1, self.audio_attn1), (self.audio_norm2, self.audio_attn2)
        return _attentions(x, stream, keep, tables, own, text)

    def _cross_attentions(
        self, video: Tensor, audio: Tensor, video_cross: CrossStream, audio_cross: CrossStream, keep: BlockKeep
    ) -> tuple[Tensor, Tensor]:
        """Audio to video and video to audio, both from the states before either is added."""
        video_table = self.video_a2v_cross_attn_scale_shift_table
        audio_table = self.audio_a2v_cross_attn_scale_shift_table

        def inputs(start: int) -> tuple[Tensor, Tensor]:
            """Both states modulated by rows start, start + 1 (scale, shift) of their tables."""
            first = _modulated(self.audio_to_video_norm, video, video_table, video_cross, start)
            return first, _modulated(self.video_to_audio_norm, audio, audio_table, audio_cross, start)

        updates: dict[str, Tensor] = {}
        if keep.a2v is not False:
            queries, context = inputs(0)
            update = attend(
                self.audio_to_video_attn, queries, context, rope=video_cross.rope, context_rope=audio_cross.rope
            )
            updates["video"] = _kept(update, keep.a2v)
        if keep.v2a is not False:
            context, queries = inputs(2)
            update = attend(
                self.video_to_audio_attn,
                queries,
                context,
                rope=audio_cross.rope,
                context_rope=video_cross.rope,
                shards=video_cross.shards,
            )
            updates["audio"] = _kept(update, keep.v2a)
        if "video" in updates:
            video = gated_residual(video, updates["video"], video_table[4] + video_cross.gate)
        if "audio" in updates:
            audio = gated_residual(audio, updates["audio"], audio_table[4] + audio_cross.gate)
        return video, audio


def _modulated(norm: Any, x: Tensor, table: Tensor, cross: CrossStream, start: int) -> Tensor:
    scale, shift = _parts(table, cross.modulation, start, start + 2, cross.rows)
    return rms_norm_modulate(x, scale, shift, eps=norm.eps, rows=cross.rows)


def _attentions(
    x: Tensor,
    stream: Stream,
    keep: Keep,
    tables: tuple[Tensor, Tensor],
    own: tuple[Any, Any],
    text: tuple[Any, Any],
) -> Tensor:
    """Self-attention, then attention to the text; the residual between them is fused with the text norm."""
    shift, scale, gate = _parts(tables[0], stream.modulation, 0, 3, stream.rows)
    normed = rms_norm_modulate(x, scale, shift, eps=own[0].eps, rows=stream.rows)
    update = attend(own[1], normed, rope=stream.rope, keep=keep, shards=stream.shards)
    text_shift, text_scale, text_gate = _parts(tables[0], stream.modulation, 6, 9, stream.rows)
    x, queries = gated_residual_rms_norm_modulate(
        x, update, gate, text_scale, text_shift, eps=text[0].eps, rows=stream.rows
    )
    context_shift, context_scale = _parts(tables[1], stream.prompt_modulation, 0, 2, None)
    update = attend(text[1], queries, modulate(stream.context, context_scale, context_shift))
    return gated_residual(x, update, text_gate, rows=stream.rows)


def _feed_forward(network: Any, norm: Any, x: Tensor, table: Tensor, stream: Stream) -> Tensor:
    shift, scale, gate = _parts(table, stream.modulation, 3, 6, stream.rows)
    normed = rms_norm_modulate(x, scale, shift, eps=norm.eps, rows=stream.rows)
    return gated_residual(x, network(normed), gate, rows=stream.rows)
