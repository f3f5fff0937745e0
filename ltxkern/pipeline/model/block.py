"""One LTX-2.3 transformer block: diffusers' parameters, a forward of several branches in which each attention may be left out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformerBlock
from torch import Tensor

from ltxkern.ops.qk_norm_rope import RotaryTables
from ltxkern.pipeline.model.attention import Keep, attend, attend_to_text, text_keys_and_values
from ltxkern.pipeline.model.fusions import feed_forward, gated_norm, gated_residual, modulate, norm_modulate

if TYPE_CHECKING:
    from ltxkern.pipeline.parallel.by_token import TokenShards

# Modulations of all blocks are made at once up to so many timesteps: with one for every token they are as large as the video.
_MOST_TIMESTEPS = 64


@dataclass(frozen=True)
class CrossStream:
    """What the attention between the modalities reads of one of them."""

    modulation: Tensor  # (B, N, 4 * D): scale, shift for a2v, scale, shift for v2a
    gate: Tensor  # (B, 1, D)
    rope: RotaryTables


@dataclass(frozen=True)
class Stream:
    """What every block of a forward reads of one modality."""

    contexts: tuple[Tensor, ...]  # (B, L, D) each: the texts of the branches, once each
    modulation: Tensor  # (B, N, 9 * D): shift, scale, gate of self-attention, feed-forward, text attention
    prompt_modulation: Tensor  # (B, 1, 2 * D): shift, scale
    rope: RotaryTables
    cross: CrossStream | None  # None where the other modality is absent
    rows: Tensor | None = None  # (B, T) int64 into B * N; None where N is 1 or T
    shards: "TokenShards | None" = None  # where its tokens are shared out over ranks

    def repeated(self, times: int) -> "Stream":
        """Of a batch with every item so many times, all items in turn; the texts stay."""
        if times == 1:
            return self
        rows = None if self.rows is None else self.rows.repeat(times, 1)

        def each(vectors: Tensor) -> Tensor:
            # Tables serve any batch, and so does the row of a single item.
            return vectors if rows is not None or vectors.shape[0] == 1 else vectors.repeat(times, 1, 1)

        cross = self.cross
        if cross is not None:
            cross = CrossStream(each(cross.modulation), each(cross.gate), _repeated(cross.rope, times))
        rope = _repeated(self.rope, times)
        return replace(self, modulation=each(self.modulation), rope=rope, cross=cross, rows=rows)


def _repeated(rope: RotaryTables, times: int) -> RotaryTables:
    if rope.rows is None:
        return RotaryTables(*(table.repeat(times, 1, 1, 1) if table.shape[0] > 1 else table for table in rope[:2]))
    return rope._replace(rows=rope.rows.repeat(times, 1, 1)) if rope.rows.shape[0] > 1 else rope


class Sums(NamedTuple):
    """`table (n, D) + vectors (B, N, n * D)` of one block; `sums (B, N, n, D)` where they are made already."""

    table: Tensor
    vectors: Tensor
    rows: Tensor | None
    sums: Tensor | None = None

    def parts(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Parts start..stop, each (B, N, D), or (B * N, D) for `rows` to point into."""
        if self.sums is not None:
            part = self.sums[:, :, start:stop]
        else:
            width = self.table.shape[1]
            vectors = self.vectors[..., start * width : stop * width].unflatten(-1, (stop - start, width))
            part = self.table[start:stop] + vectors
        return (part if self.rows is None else part.flatten(0, 1)).unbind(-2)


def sums_at_once(blocks: Sequence[Any], stream: Stream) -> bool:
    """Whether the modulations of all blocks may be made before the first: few timesteps, and no block that is elsewhere."""
    few = stream.modulation.shape[0] * stream.modulation.shape[1] <= _MOST_TIMESTEPS
    return few and all(block.scale_shift_table.device == stream.modulation.device for block in blocks)


class Modulation(NamedTuple):
    """Of one modality in one block."""

    own: Sums  # nine parts: shift, scale, gate of self-attention, feed-forward, text attention
    prompt: Sums  # shift, scale
    cross: Sums | None  # scale, shift for a2v, scale, shift for v2a
    gate: Sums | None


def modulations(blocks: Sequence[Any], stream: Stream, modality: str) -> list[Modulation]:
    """Of every block, by one sum for all of them; of a single one by a sum where a part is asked for."""
    prefix = "" if modality == "video" else "audio_"

    def sums(name: str, vectors: Tensor, rows: Tensor | None, part: slice = slice(None)) -> list[Sums]:
        tables = [getattr(block, name)[part] for block in blocks]
        if len(tables) == 1:
            return [Sums(tables[0], vectors, rows)]
        together = torch.stack(tables)[:, None, None] + vectors.unflatten(-1, tables[0].shape)
        return [Sums(table, vectors, rows, each) for table, each in zip(tables, together.unbind(0), strict=True)]

    own = sums(f"{prefix}scale_shift_table", stream.modulation, stream.rows)
    prompt = sums(f"{prefix}prompt_scale_shift_table", stream.prompt_modulation, None)
    if stream.cross is None:
        return [Modulation(*each, None, None) for each in zip(own, prompt, strict=True)]
    name = f"{modality}_a2v_cross_attn_scale_shift_table"
    cross = sums(name, stream.cross.modulation, stream.rows, slice(4))
    gate = sums(name, stream.cross.gate, None, slice(4, 5))
    return [Modulation(*each) for each in zip(own, prompt, cross, gate, strict=True)]


class BlockKeep(NamedTuple):
    """Which attentions of a block run, one flag for every branch of a batch."""

    video_self: tuple[bool, ...] = (True,)
    audio_self: tuple[bool, ...] = (True,)
    a2v: tuple[bool, ...] = (True,)
    v2a: tuple[bool, ...] = (True,)


def _keep(flags: tuple[bool, ...], like: Tensor) -> Keep:
    """One Python bool where the branches agree; else (B, 1, 1) built on the device, so that nothing synchronises."""
    if all(flags) or not any(flags):
        return flags[0]
    items = like.shape[0] // len(flags)
    return torch.cat([like.new_full((items, 1, 1), float(flag)) for flag in flags])


def _kept(x: Tensor, flags: tuple[bool, ...]) -> Tensor:
    keep = _keep(flags, x)
    return x * keep if isinstance(keep, Tensor) else x


class Side(NamedTuple):
    """One modality of a lane in one block: `now` is None where the block makes its modulations, `following` where the next does."""

    stream: Stream
    now: Modulation | None
    following: Modulation | None

    @property
    def made(self) -> Modulation:
        """`now`, within the block."""
        assert self.now is not None
        return self.now


class Lane(NamedTuple):
    """Branches that go through a block in one batch; `texts` has the number of each one's text among those of its streams."""

    video: Side | None
    audio: Side | None
    keep: BlockKeep
    texts: tuple[int, ...]


class Flow(NamedTuple):
    """One modality between blocks: (B, T, D), and the modulated norm that begins the next block where it is made already."""

    x: Tensor
    normed: Tensor | None = None


class State(NamedTuple):
    """Both modalities of a batch between blocks; None where one is absent."""

    video: Flow | None
    audio: Flow | None


class _Modules(NamedTuple):
    """Of one modality in one block."""

    norm: Any
    attention: Any
    text_norm: Any
    text_attention: Any
    cross_norm: Any
    last_norm: Any
    network: Any


class _Pending(NamedTuple):
    """A residual stream, and a branch that is added to it together with the norm that comes next."""

    x: Tensor
    update: Tensor
    gate: Tensor


class _Texts:
    """Keys and values of the texts of one modality in one block, made when a lane first asks for them."""

    def __init__(self, attention: Any) -> None:
        self._attention = attention
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, side: Side, texts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Of the branches of a lane, one after another."""
        for text in texts:
            if text not in self._made:
                shift, scale = side.made.prompt.parts(0, 2)
                context = modulate(side.stream.contexts[text], scale, shift)
                self._made[text] = text_keys_and_values(self._attention, context)
        if len(texts) == 1:
            return self._made[texts[0]]
        keys, values = zip(*(self._made[text] for text in texts), strict=True)
        return torch.cat(keys), torch.cat(values)


class LTX2Block(LTX2VideoTransformerBlock):
    """One block; either modality may be absent, and each attention may be left out for some branches of a lane."""

    def forward(self, states: Sequence[State], lanes: Sequence[Lane], trunk: Lane | None = None) -> list[State]:
        """The states behind the block, one for every lane.

        Args:
            states: before it, one for every lane; with `trunk` one alone.
            lanes: what the block reads of each.
            trunk: the state of one branch that all branches of all lanes have: what comes before the text is made once for them.
        """
        modules = self._video(), self._audio()
        texts = [_Texts(each.text_attention) for each in modules]
        lanes = [self._with_modulations(lane) for lane in lanes]
        if trunk is not None:
            trunk = self._with_modulations(trunk)
        if trunk is None:
            heads = [
                [
                    None if flow is None or side is None else _self_attention(module, flow, side, keep)
                    for module, flow, side, keep in zip(modules, state, lane[:2], lane.keep[:2], strict=True)
                ]
                for state, lane in zip(states, lanes, strict=True)
            ]
        else:
            shared = [
                [None] * len(lanes) if flow is None or side is None else _shared(module, flow, side, keeps)
                for module, flow, side, keeps in zip(
                    modules, states[0], trunk[:2], zip(*(lane.keep[:2] for lane in lanes), strict=True), strict=True
                )
            ]
            heads = [list(pair) for pair in zip(*shared, strict=True)]
        return [
            self._rest(
                lane,
                *(
                    None if head is None or side is None else _to_text(module, head, side, text.of(side, lane.texts))
                    for module, head, side, text in zip(modules, pair, lane[:2], texts, strict=True)
                ),
            )
            for lane, pair in zip(lanes, heads, strict=True)
        ]

    def _with_modulations(self, lane: Lane) -> Lane:
        """The lane with this block's own modulations, where the transformer has not made those of all blocks."""

        def side(side: Side | None, modality: str) -> Side | None:
            if side is None or side.now is not None:
                return side
            return side._replace(now=modulations([self], side.stream, modality)[0])

        return lane._replace(video=side(lane.video, "video"), audio=side(lane.audio, "audio"))

    def _video(self) -> _Modules:
        own, text = (self.norm1, self.attn1), (self.norm2, self.attn2)
        return _Modules(*own, *text, self.audio_to_video_norm, self.norm3, self.ff)

    def _audio(self) -> _Modules:
        own, text = (self.audio_norm1, self.audio_attn1), (self.audio_norm2, self.audio_attn2)
        return _Modules(*own, *text, self.video_to_audio_norm, self.audio_norm3, self.audio_ff)

    def _rest(self, lane: Lane, video: _Pending | None, audio: _Pending | None) -> State:
        """Behind the text: the attentions between the modalities, then feed-forward."""
        x: Tensor | _Pending | None = video
        y: Tensor | _Pending | None = audio
        if video is not None and audio is not None and lane.video is not None and lane.audio is not None:
            x, y = self._cross_attentions(lane, lane.video, lane.audio, video, audio)
        return State(
            None if x is None or lane.video is None else _feed_forward(self._video(), lane.video, x),
            None if y is None or lane.audio is None else _feed_forward(self._audio(), lane.audio, y),
        )

    def _cross_attentions(
        self, lane: Lane, video: Side, audio: Side, x: _Pending, y: _Pending
    ) -> tuple[Tensor | _Pending, Tensor | _Pending]:
        """Audio to video and video to audio, both from the states before either is added."""
        to_video, to_audio = any(lane.keep.a2v), any(lane.keep.v2a)
        # Rows 0, 1 of the tables (scale, shift) are for the attention into video, 2, 3 for that into audio.
        starts = [start for start, runs in ((0, to_video), (2, to_audio)) if runs]
        if not starts or video.stream.cross is None or audio.stream.cross is None:
            return x, y
        video_sum, seen = _cross_norms(self.audio_to_video_norm, video, x, starts)
        audio_sum, heard = _cross_norms(self.video_to_audio_norm, audio, y, starts)
        video_rope, audio_rope = video.stream.cross.rope, audio.stream.cross.rope
        results: list[Tensor | _Pending] = [video_sum, audio_sum]
        if to_video:
            update = attend(self.audio_to_video_attn, seen[0], heard[0], rope=video_rope, context_rope=audio_rope)
            results[0] = _Pending(video_sum, _kept(update, lane.keep.a2v), _cross_gate(video))
        if to_audio:
            update = attend(
                self.video_to_audio_attn,
                heard[2],
                seen[2],
                rope=audio_rope,
                context_rope=video_rope,
                shards=video.stream.shards,
            )
            results[1] = _Pending(audio_sum, _kept(update, lane.keep.v2a), _cross_gate(audio))
        return results[0], results[1]


def _self_attention(modules: _Modules, flow: Flow, side: Side, flags: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
    """The residual stream behind self-attention, and the queries to the text."""
    stream, own = side.stream, side.made.own
    shift, scale, gate = own.parts(0, 3)
    normed = flow.normed
    if normed is None:
        normed = norm_modulate(flow.x, scale, shift, modules.norm.eps, stream.rows)
    update = attend(modules.attention, normed, rope=stream.rope, keep=_keep(flags, normed), shards=stream.shards)
    shift, scale, _ = own.parts(6, 9)
    return gated_norm(flow.x, update, gate, scale, shift, modules.text_norm.eps, stream.rows)


def _shared(
    modules: _Modules, flow: Flow, side: Side, keeps: Sequence[tuple[bool, ...]]
) -> list[tuple[Tensor, Tensor]]:
    """`_self_attention` for the branches of every lane, which begin with one state: once with attention, once without."""
    wanted = {flag for flags in keeps for flag in flags}
    made = {flag: _self_attention(modules, flow, side, (flag,)) for flag in sorted(wanted)}
    heads = []
    for flags in keeps:
        each = [made[flag] for flag in flags]
        x, queries = each[0] if len(each) == 1 else map(torch.cat, zip(*each, strict=True))
        heads.append((x, queries))
    return heads


def _to_text(modules: _Modules, head: tuple[Tensor, Tensor], side: Side, text: tuple[Tensor, Tensor]) -> _Pending:
    x, queries = head
    (gate,) = side.made.own.parts(8, 9)
    return _Pending(x, attend_to_text(modules.text_attention, queries, *text), gate)


def _normed(norm: Any, side: Side, x: Tensor | _Pending, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream with what was to be added, and its modulated norm."""
    if isinstance(x, Tensor):
        return x, norm_modulate(x, scale, shift, norm.eps, side.stream.rows)
    return gated_norm(*x, scale, shift, norm.eps, side.stream.rows)


def _cross_norms(norm: Any, side: Side, x: _Pending, starts: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The residual stream, and its norms modulated by rows start, start + 1 (scale, shift) of the table."""
    assert side.made.cross is not None
    whole: Tensor | _Pending = x
    norms = {}
    for start in starts:
        whole, norms[start] = _normed(norm, side, whole, *side.made.cross.parts(start, start + 2))
    assert isinstance(whole, Tensor)
    return whole, norms


def _cross_gate(side: Side) -> Tensor:
    assert side.made.gate is not None
    assert side.made.cross is not None
    (gate,) = side.made.gate.parts(0, 1)
    if side.stream.rows is None:
        return gate
    # One a sample, but with an index it is a table as the others are.
    return gate.expand(-1, side.made.cross.vectors.shape[1], -1).flatten(0, 1)


def _feed_forward(modules: _Modules, side: Side, x: Tensor | _Pending) -> Flow:
    shift, scale, gate = side.made.own.parts(3, 6)
    x, normed = _normed(modules.last_norm, side, x, scale, shift)
    update = feed_forward(modules.network, normed)
    if side.following is None:
        return Flow(gated_residual(x, update, gate, side.stream.rows))
    shift, scale, _ = side.following.own.parts(0, 3)
    return Flow(*gated_norm(x, update, gate, scale, shift, modules.norm.eps, side.stream.rows))
