"""One LTX-2.3 transformer block: diffusers' parameters, a forward of several branches in which each attention may be left out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformerBlock
from torch import Tensor

from ltxkern.patching.products import feed_forward
from ltxkern.patching.separate import modulate
from ltxkern.pipeline.model.attention import attend, attend_to_text, kept_update, text_keys_and_values
from ltxkern.pipeline.model.fusions import (
    gated_norm,
    gated_norms,
    gated_residual,
    linear,
    norm_modulate,
    product_gelu,
    sound_beside_video,
)
from ltxkern.pipeline.model.inputs import Stream

# Modulations of all blocks are made at once up to so many timesteps: with one for every token they are as large as the video.
_MOST_TIMESTEPS = 64


class Sums(NamedTuple):
    """`table (n, D) + vectors (B, N, n * D)` of one block; `made` has all parts where they are made already."""

    table: Tensor
    vectors: Tensor
    rows: Tensor | None
    made: tuple[Tensor, ...] = ()

    def parts(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Parts start..stop, each (B, N, D), or (B * N, D) for `rows` to point into."""
        if self.made:
            return self.made[start:stop]
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


def modulations(blocks: Sequence[Any], stream: Stream, modality: str, *, at_once: bool = True) -> list[Modulation]:
    """Of every block: by one sum for all of them, or by a sum where a part is asked for."""
    prefix = "" if modality == "video" else "audio_"

    def sums(name: str, vectors: Tensor, rows: Tensor | None, part: slice = slice(None)) -> list[Sums]:
        tables = [getattr(block, name)[part] for block in blocks]
        if not at_once:
            return [Sums(table, vectors, rows) for table in tables]
        together = torch.stack(tables)[:, None, None] + vectors.unflatten(-1, tables[0].shape)
        every = (together if rows is None else together.flatten(1, 2)).unbind(0)
        return [Sums(table, vectors, rows, each.unbind(-2)) for table, each in zip(tables, every, strict=True)]

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

    @property
    def sides(self) -> tuple[Side | None, Side | None]:
        """Video and audio."""
        return self.video, self.audio


@dataclass(eq=False)
class Residual:
    """One modality of a lane on its way through the blocks. A tensor is let go of as soon as nobody reads it again.

    Attributes:
        x: (B, T, D).
        normed: its modulated norm, for whoever reads it next.
        branch: an update and its gate, to be added together with the next norm.
    """

    x: Tensor
    normed: Tensor | None = None
    branch: tuple[Tensor, Tensor] | None = None

    def take(self) -> Tensor:
        """The norm, which is the caller's from now on."""
        normed, self.normed = self.normed, None
        assert normed is not None
        return normed

    def norm(self, scale: Tensor, shift: Tensor, eps: float, rows: Tensor | None) -> None:
        """Add what is to be added, and make the modulated norm of the sum, in one pass."""
        if self.branch is None:
            self.normed = norm_modulate(self.x, scale, shift, eps, rows)
        else:
            self.x, self.normed = gated_norm(self.x, *self.branch, scale, shift, eps, rows)
        self.branch = None

    def norms(self, modulation: tuple[Tensor, ...], eps: float, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add what is to be added; the norms of the sum by two modulations, which are the caller's."""
        assert self.branch is not None
        self.x, *normed = gated_norms(self.x, *self.branch, modulation, eps, rows)
        self.branch = None
        return normed[0], normed[1]

    def settle(self, rows: Tensor | None) -> None:
        """Add what is to be added."""
        if self.branch is not None:
            self.x = gated_residual(self.x, *self.branch, rows)
        self.branch = None


class State(NamedTuple):
    """Both modalities of a lane; None where one is absent."""

    video: Residual | None
    audio: Residual | None


class _Modules(NamedTuple):
    """Of one modality in one block."""

    norm: Any
    attention: Any
    text_norm: Any
    text_attention: Any
    cross_norm: Any
    last_norm: Any
    network: Any


# diffusers' names of them.
_VIDEO = _Modules("norm1", "attn1", "norm2", "attn2", "audio_to_video_norm", "norm3", "ff")
_AUDIO = _Modules(
    *("audio_norm1", "audio_attn1", "audio_norm2", "audio_attn2"), "video_to_audio_norm", "audio_norm3", "audio_ff"
)


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
        """The states behind the block, one for every lane; those that are given are used up.

        Args:
            states: before it, one for every lane; with `trunk` one alone.
            lanes: what the block reads of each.
            trunk: the state of one branch that all branches of all lanes have: what comes before the text is made once for them.
        """
        modules = self._video(), self._audio()
        lanes = [self._with_modulations(lane) for lane in lanes]
        if trunk is not None:
            states = _shared(modules, states[0], self._with_modulations(trunk), lanes)
        texts = [_Texts(each.text_attention) for each in modules]
        for state, lane in zip(states, lanes, strict=True):

            def begin(at: int, residual: Residual, side: Side, lane: Lane = lane) -> None:
                if trunk is None:
                    _self_attention(modules[at], residual, side, lane.keep[at])
                _text_attention(modules[at], residual, side, texts[at].of(side, lane.texts))

            _both(state, lane, begin)
            if (
                state.video is not None
                and state.audio is not None
                and lane.video is not None
                and lane.audio is not None
            ):
                self._cross_attentions(lane.keep, state.video, state.audio, lane.video, lane.audio)
            _both(state, lane, lambda at, residual, side: _feed_forward(modules[at], residual, side))
        return list(states)

    def _with_modulations(self, lane: Lane) -> Lane:
        """The lane with this block's own modulations, where the transformer has not made those of all blocks."""

        def side(side: Side | None, modality: str) -> Side | None:
            if side is None or side.now is not None:
                return side
            return side._replace(now=modulations([self], side.stream, modality, at_once=False)[0])

        return lane._replace(video=side(lane.video, "video"), audio=side(lane.audio, "audio"))

    def _video(self) -> _Modules:
        return _Modules(*map(self._modules.__getitem__, _VIDEO))

    def _audio(self) -> _Modules:
        return _Modules(*map(self._modules.__getitem__, _AUDIO))

    def _cross_attentions(self, keep: BlockKeep, x: Residual, y: Residual, video: Side, audio: Side) -> None:
        """Audio to video and video to audio, both from the states before either is added."""
        to_video, to_audio = any(keep.a2v), any(keep.v2a)
        # Rows 0, 1 of the tables (scale, shift) are for the attention into video, 2, 3 for that into audio.
        starts = [start for start, runs in ((0, to_video), (2, to_audio)) if runs]
        if not starts or video.stream.cross is None or audio.stream.cross is None:
            return
        seen = _cross_norms(self.audio_to_video_norm, x, video, starts)
        heard = _cross_norms(self.video_to_audio_norm, y, audio, starts)
        video_rope, audio_rope = video.stream.cross.rope, audio.stream.cross.rope
        if to_video:
            update = attend(
                self.audio_to_video_attn, seen.pop(0), heard.pop(0), rope=video_rope, context_rope=audio_rope
            )
            x.branch = kept_update(update, keep.a2v), _cross_gate(video)
        if to_audio:
            update = attend(
                self.video_to_audio_attn,
                heard.pop(2),
                seen.pop(2),
                rope=audio_rope,
                context_rope=video_rope,
                shards=video.stream.shards,
            )
            y.branch = kept_update(update, keep.v2a), _cross_gate(audio)


def _both(state: State, lane: Lane, work: Callable[[int, Residual, Side], None]) -> None:
    """`work` on the modalities that are there: number, residual stream, side; on sound beside video where both are."""
    there = [
        (at, residual, side)
        for at, (residual, side) in enumerate(zip(state, lane.sides, strict=True))
        if residual is not None and side is not None
    ]
    if len(there) == 1:
        work(*there[0])
    elif there:
        sound = there[1][1]

        def of_sound() -> Any:
            work(*there[1])
            return sound.x, sound.normed, sound.branch

        # What sound reads stays until both are done: other streams may take freed memory at once.
        held = (sound.x, sound.normed, sound.branch)
        sound_beside_video(of_sound, lambda: work(*there[0]))
        del held


def _self_attention(modules: _Modules, residual: Residual, side: Side, flags: tuple[bool, ...]) -> None:
    """Self-attention, and the norm that asks the text."""
    stream, own = side.stream, side.made.own
    shift, scale, gate = own.parts(0, 3)
    if residual.normed is None:
        residual.norm(scale, shift, modules.norm.eps, stream.rows)
    update = attend(modules.attention, residual.take(), rope=stream.rope, keep=flags, shards=stream.shards)
    residual.branch = update, gate
    del update
    shift, scale, _ = own.parts(6, 9)
    residual.norm(scale, shift, modules.text_norm.eps, stream.rows)


def _shared(modules: Sequence[_Modules], start: State, trunk: Lane, lanes: Sequence[Lane]) -> list[State]:
    """Every lane behind its self-attentions, all branches having one state before: these run once, and once left out."""
    columns: list[list[Residual | None]] = []
    for at, module in enumerate(modules):
        first, side, made = start[at], trunk.sides[at], {}
        if first is None or side is None:
            columns.append([None] * len(lanes))
            continue
        for flag in sorted({flag for lane in lanes for flag in lane.keep[at]}):
            made[flag] = Residual(first.x)
            _self_attention(module, made[flag], side, (flag,))
        each = [[made[flag] for flag in lane.keep[at]] for lane in lanes]
        columns.append([_joined(residuals) for residuals in each])
    return [State(video, audio) for video, audio in zip(*columns, strict=True)]


def _joined(residuals: Sequence[Residual]) -> Residual:
    """Of branches, those of a lane."""
    if len(residuals) == 1:
        return Residual(residuals[0].x, residuals[0].normed)
    return Residual(
        torch.cat([each.x for each in residuals]),
        torch.cat([each.normed for each in residuals if each.normed is not None]),
    )


def _text_attention(modules: _Modules, residual: Residual, side: Side, text: tuple[Tensor, Tensor]) -> None:
    (gate,) = side.made.own.parts(8, 9)
    residual.branch = attend_to_text(modules.text_attention, residual.take(), *text), gate


def _cross_norms(norm: Any, residual: Residual, side: Side, starts: Sequence[int]) -> dict[int, Tensor]:
    """The norms modulated by rows start, start + 1 (scale, shift) of the table."""
    assert side.made.cross is not None
    if len(starts) == 2:
        both = residual.norms(side.made.cross.parts(0, 4), norm.eps, side.stream.rows)
        return dict(zip(starts, both, strict=True))
    scale, shift = side.made.cross.parts(starts[0], starts[0] + 2)
    residual.norm(scale, shift, norm.eps, side.stream.rows)
    return {starts[0]: residual.take()}


def _cross_gate(side: Side) -> Tensor:
    assert side.made.gate is not None
    (gate,) = side.made.gate.parts(0, 1)
    # One a sample, but with an index it is a table as the others are.
    return gate if side.stream.rows is None else gate.expand(-1, side.stream.modulation.shape[1], -1).flatten(0, 1)


def _feed_forward(modules: _Modules, residual: Residual, side: Side) -> None:
    """Feed-forward, and the norm that begins the next block where its modulation is known."""
    shift, scale, gate = side.made.own.parts(3, 6)
    residual.norm(scale, shift, modules.last_norm.eps, side.stream.rows)
    residual.branch = feed_forward(modules.network, residual.take(), product_gelu, linear), gate
    if side.following is None:
        residual.settle(side.stream.rows)
    else:
        shift, scale, _ = side.following.own.parts(0, 3)
        residual.norm(scale, shift, modules.norm.eps, side.stream.rows)
