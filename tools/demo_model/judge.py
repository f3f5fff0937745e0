"""Says of a decoded video and its sound what is to be seen and heard: colour, background, shape, motion, pitch, side."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tools.demo_model.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Scene,
    distance,
    pan,
    track,
)

_MOVED, _GROWN = 0.1, 0.45
_SIDE = 0.25
_LEAST_SHARE = 0.004


class Clip(NamedTuple):
    """A decoded video: frames (F, 3, H, W) in [0, 1], sound (2, N) or None, samples a second."""

    frames: Tensor
    sound: Tensor | None
    rate: int


@dataclass(frozen=True)
class Verdict:
    """Which parts of a scene a clip shows rightly; None where that was not asked (no sound, another shape's)."""

    colour: bool
    background: bool
    shape: bool
    motion: bool
    pitch: bool | None
    side: bool | None


def read_clip(path: str | Path) -> Clip:
    """Decodes an mp4."""
    import av

    frames, samples, rate = [], [], 48000
    with av.open(str(path)) as container:
        for frame in container.decode(*container.streams.video[:1], *container.streams.audio[:1]):
            if isinstance(frame, av.VideoFrame):
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            elif isinstance(frame, av.AudioFrame):
                rate = frame.sample_rate
                samples.append(torch.from_numpy(frame.to_ndarray()).float())
    sound = torch.cat(samples, dim=1) if samples else None
    return Clip(torch.stack(frames).permute(0, 3, 1, 2).float() / 255, sound, rate)


def judge(clip: Clip, scene: Scene) -> Verdict:
    """Compares what a clip shows with a scene; of two shapes both must be right, and each is looked for in its half."""
    frames = clip.frames
    if len(scene.shapes) == 1:
        halves = [frames]
    else:
        middle = frames.shape[-1] // 2
        halves = [frames[..., :middle], frames[..., middle:]]
    seen = [_see(half) for half in halves]
    background = all(sight.background == scene.background for sight in seen)
    pairs = list(zip(seen, scene.shapes, strict=True))
    aspect = frames.shape[-1] / frames.shape[-2]
    return Verdict(
        colour=all(sight.colour == shape.colour for sight, shape in pairs),
        background=background,
        shape=all(sight.shape == shape.kind for sight, shape in pairs),
        motion=all(sight.motion == shape.motion for sight, shape in pairs),
        pitch=None if clip.sound is None else hears_pitch(clip, scene),
        side=None if clip.sound is None or len(pairs) == 2 else hears_side(clip, scene, aspect),
    )


def scores(verdicts: list[Verdict]) -> dict[str, float]:
    """Share of right answers of each question, over the verdicts that answer it."""
    table = {}
    for field in fields(Verdict):
        answers = [value for verdict in verdicts if (value := getattr(verdict, field.name)) is not None]
        table[field.name] = sum(answers) / len(answers) if answers else math.nan
    return table


class Sight(NamedTuple):
    """What a clip shows, in words of the world; "none" where nothing stands out from the background."""

    background: str
    colour: str
    shape: str
    motion: str


class _Standing(NamedTuple):
    """What stands out from the background: colour of the ground (3), and of pixels well inside shapes (3, N)."""

    ground: Tensor
    inside: Tensor

    def cover(self, frames: Tensor) -> Tensor:
        """How far each pixel's colour has gone from the ground's to the shapes', (F, H, W)."""
        axis = self.inside.median(dim=1).values - self.ground
        away = (frames - self.ground.view(1, 3, 1, 1)) * axis.view(1, 3, 1, 1)
        return away.sum(1) / axis.square().sum()


def _standing(frames: Tensor) -> _Standing | None:
    """None where nothing stands out."""
    ground = _ground(frames)
    away = (frames - ground.view(1, 3, 1, 1)).square().sum(1).sqrt()
    # Well inside a shape its colour is furthest from the background; the edge is half of the way.
    strong = away > 0.6 * away.flatten().topk(max(1, away.numel() // 200)).values.min()
    if away.max() < 0.15 or strong.float().mean() < _LEAST_SHARE:
        return None
    return _Standing(ground, frames.movedim(1, 0)[:, strong])


def _ground(frames: Tensor) -> Tensor:
    border = torch.cat([frames[..., :2, :].flatten(2), frames[..., -2:, :].flatten(2)], dim=2)
    return border.movedim(1, 0).flatten(1).median(dim=1).values


def edge_width(frames: Tensor) -> float:
    """Pixels across an edge of a shape, from a tenth of its colour to nine tenths; infinite where nothing stands out."""
    frames = frames[::6]
    found = _standing(frames)
    if found is None:
        return math.inf
    cover = found.cover(frames)
    inside = cover > 0.5
    # Steps between neighbours, along rows and columns, count a line of length 1 in direction t as |cos t| + |sin t| on average.
    steps = sum(int((inside.diff(dim=axis)).sum()) for axis in (1, 2))
    return float(((cover > 0.1) & (cover < 0.9)).sum()) / (math.pi / 4 * steps) if steps else math.inf


def outline_fit(frames: Tensor, kind: str) -> float:
    """How well a shape of this kind covers what stands out, wherever it is: intersection over union, 1 for a perfect outline."""
    found = _standing(frames)
    if found is None:
        return 0.0
    mask = found.cover(frames) > 0.5
    return _overlaps(mask, _outlines(mask)).get(kind, 0.0)


def _see(frames: Tensor) -> Sight:
    found = _standing(frames)
    background = _nearest(_ground(frames)[None] if found is None else found.ground[None], BACKGROUNDS)[0]
    if found is None:
        return Sight(background, "none", "none", "none")
    colours = _nearest(found.inside.T, {name: colour.rgb for name, colour in COLOURS.items()})
    mask = found.cover(frames) > 0.5
    outlines = _outlines(mask)
    overlap = _overlaps(mask, outlines)
    shape = max(overlap, key=lambda kind: overlap[kind], default="none")
    return Sight(background, max(COLOURS, key=colours.count), shape, _motion(outlines))


def _nearest(pixels: Tensor, palette: dict[str, tuple[int, int, int]]) -> list[str]:
    """The name of the nearest colour of each pixel (N, 3) in [0, 1]; of many pixels a sample."""
    names = list(palette)
    pixels = pixels[:: max(1, len(pixels) // 4096)]
    table = torch.tensor([palette[name] for name in names]) / 255
    return [names[index] for index in torch.cdist(pixels.contiguous(), table).argmin(1).tolist()]


class Outlines(NamedTuple):
    """Centre of mass and area of the shape in each frame, in heights; area 0 where there is none."""

    x: Tensor
    y: Tensor
    area: Tensor

    def radius(self, kind: str) -> Tensor:
        """Of a shape of this kind with this area."""
        return (self.area / _UNIT_AREA[kind]).sqrt()


def see_outlines(frames: Tensor) -> Outlines | None:
    """Of what stands out in frames (F, 3, H, W) in [0, 1]; None where nothing does."""
    found = _standing(frames)
    return None if found is None else _outlines(found.cover(frames) > 0.5)


def _outlines(mask: Tensor) -> Outlines:
    height = mask.shape[-2]
    weight = mask.float()
    total = weight.sum((1, 2))
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(mask.shape[-1]) + 0.5) / height
    some = total.clamp(min=1)
    return Outlines((weight.sum(1) @ columns) / some, (weight.sum(2) @ rows) / some, total / height**2)


def _motion(outlines: Outlines) -> str:
    there = outlines.area > _LEAST_SHARE / 2
    if there.sum() < 4:
        return "none"
    x, y, area = (value[there] for value in outlines)
    edge = max(1, len(x) // 8)
    across = float(x[-edge:].mean() - x[:edge].mean())
    down = float(y[-edge:].mean() - y[:edge].mean())
    grown = math.log(float(area[-edge:].mean() / area[:edge].mean()))
    height = float(y.max() - y.min())
    if height > 0.12 and abs(down) < 0.4 * height and abs(across) < height:
        return "bounce"
    if abs(grown) > _GROWN and abs(across) < 2 * _MOVED and abs(down) < 2 * _MOVED:
        return "grow" if grown > 0 else "shrink"
    if max(abs(across), abs(down)) < _MOVED:
        return "still"
    if abs(across) > abs(down):
        return "right" if across > 0 else "left"
    return "down" if down > 0 else "up"


def _overlaps(mask: Tensor, outlines: Outlines) -> dict[str, float]:
    """How well a drawing of each kind, of the same area and centre, covers the mask: intersection over union, over some frames."""
    _, height, width = mask.shape
    rows = ((torch.arange(height) + 0.5) / height)[None, :, None]
    columns = ((torch.arange(width) + 0.5) / height)[None, None, :]
    chosen = (outlines.area > _LEAST_SHARE / 2).nonzero().flatten()
    if not len(chosen):
        return {}
    chosen = chosen[:: max(1, len(chosen) // 8)]
    x, y = (value[chosen].view(-1, 1, 1) for value in outlines[:2])
    seen = mask[chosen]
    overlap = {}
    for kind in SHAPES:
        drawn = distance(kind, columns - x, rows - y, outlines.radius(kind)[chosen].view(-1, 1, 1)) < 0
        overlap[kind] = float(((drawn & seen).sum((1, 2)) / (drawn | seen).sum((1, 2)).clamp(min=1)).mean())
    return overlap


def _unit_area(kind: str) -> float:
    line = torch.linspace(-2, 2, 801)
    return float((distance(kind, line[None], line[:, None], torch.ones(())) < 0).float().mean()) * 16


_UNIT_AREA = {kind: _unit_area(kind) for kind in SHAPES}


def hears_pitch(clip: Clip, scene: Scene) -> bool:
    """Whether the loudest tones are those of the scene's colours."""
    assert clip.sound is not None
    spectrum = torch.fft.rfft(clip.sound * torch.hann_window(clip.sound.shape[1])).abs().square().sum(0)
    bins = clip.sound.shape[1] / clip.rate
    energy = {}
    for name, colour in COLOURS.items():
        low, high = round((colour.pitch - 20) * bins), round((colour.pitch + 20) * bins)
        energy[name] = float(spectrum[low : high + 1].sum())
    loudest = sorted(energy, key=lambda name: -energy[name])[: len(scene.shapes)]
    return set(loudest) == {shape.colour for shape in scene.shapes}


def _balance(sound: Tensor) -> float:
    """Right minus left over their sum, of energies."""
    left, right = sound.square().sum(1).tolist()
    return (right - left) / (right + left) if right + left > 0 else 0.0


def hears_side(clip: Clip, scene: Scene, aspect: float) -> bool:
    """Whether the sound comes from the side of the first shape in the first and in the last third."""
    shape = scene.shapes[0]
    assert clip.sound is not None
    third = clip.sound.shape[1] // 3
    for sound, time in ((clip.sound[:, :third], 1 / 6), (clip.sound[:, -third:], 5 / 6)):
        expected = float(pan(track(shape, torch.tensor([time]), aspect).x, aspect)[0])
        heard = _balance(sound)
        if abs(expected) > _SIDE and heard * expected < _SIDE / 2 * abs(expected):
            return False
        if abs(expected) <= _SIDE and abs(heard) > 2.4 * _SIDE:
            return False
    return True
