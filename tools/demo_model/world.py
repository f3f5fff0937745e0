"""The world of the demo model: coloured shapes that move and sound, drawn exactly at any size, frame rate and length.

A scene is a few words and numbers. From it come its picture (signed distances, so that edges are smooth at every size), its stereo
sound, and whether training may see it. Lengths are in units of the frame's height, x to the right and y down; times run from 0 to 1
over the clip.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor


class Colour(NamedTuple):
    """A colour of shapes: red, green, blue in 0 to 255, and the pitch of its sound in Hz.

    Pitches are multiples of 100 Hz: at 100 spectrogram rows a second a tone then has one phase in every row.
    """

    rgb: tuple[int, int, int]
    pitch: int


COLOURS = {
    "red": Colour((225, 25, 30), 300),
    "orange": Colour((255, 145, 0), 400),
    "yellow": Colour((255, 240, 40), 500),
    "green": Colour((20, 175, 45), 600),
    "cyan": Colour((40, 215, 235), 800),
    "blue": Colour((50, 90, 255), 1000),
    "purple": Colour((150, 40, 200), 1200),
    "pink": Colour((255, 120, 200), 1500),
}
# None of them is mid-gray: a decoder whose norms have no bias cannot tell gray from nothing.
BACKGROUNDS = {"black": (14, 14, 18), "white": (242, 242, 242), "navy": (25, 40, 110), "brown": (95, 55, 20)}
SHAPES = ("circle", "square", "triangle", "ring")
MOTIONS = ("left", "right", "up", "down", "bounce", "grow", "shrink", "still")
SIZES = {"small": 0.17, "medium": 0.22, "large": 0.27}
PLACES = {"left": 0.25, "middle": 0.5, "right": 0.75}
HORIZONTAL = ("left", "right")

HELD_OUT_DIVISOR = 8
TWO_SHAPES = 0.12
_MARGIN = 0.04
_HOPS = 2
_GROWTH = (0.45, 1.15)
_HARMONICS = (1.0, 0.3, 0.15)
_LOUDNESS = 0.35
_PAN_GAIN, _PAN_FLOOR = 1.4, 0.06


@dataclass(frozen=True)
class Shape:
    """One shape: words of the prompt, and what the prompt leaves open.

    kind, colour, motion, size, place: keys of the tables above; place says where a shape is that does not move sideways.
    scale: factor on its size; x, y: shift of its way, in heights.
    """

    kind: str
    colour: str
    motion: str
    size: str = "medium"
    place: str = "middle"
    scale: float = 1.0
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A background and one shape, or two of which the first is on the left and the second on the right."""

    background: str
    shapes: tuple[Shape, ...]

    @property
    def combinations(self) -> tuple[str, ...]:
        """Shape, colour, motion and background of each shape."""
        return tuple(f"{shape.kind}/{shape.colour}/{shape.motion}/{self.background}" for shape in self.shapes)

    @property
    def held_out(self) -> bool:
        """Whether training must not see it: a combination of shape, colour, motion and background is one of 156 of 1024.

        A checksum says which, so that they are spread unevenly: from 12 of green to 26 of yellow and of purple.
        """
        return any(zlib.crc32(words.encode()) % HELD_OUT_DIVISOR == 0 for words in self.combinations)


class Window(NamedTuple):
    """Part of a clip, in pixels and frames: first row, first column, rows, columns, first frame, frames."""

    top: int
    left: int
    height: int
    width: int
    start: int
    frames: int


def draw_scene(draws: Random, *, held_out: bool = False, shapes: int | None = None) -> Scene:
    """A random scene that training may see, or with `held_out` one that it may not.

    Args:
        draws: source of randomness.
        held_out: which part of the world.
        shapes: 1 or 2; None for mostly one.
    """
    while True:
        count = shapes or (2 if draws.random() < TWO_SHAPES else 1)
        scene = Scene(draws.choice(list(BACKGROUNDS)), tuple(_draw_shape(draws, count, i) for i in range(count)))
        if scene.held_out == held_out and len({shape.colour for shape in scene.shapes}) == count:
            return scene


def _draw_shape(draws: Random, count: int, index: int) -> Shape:
    # Two shapes keep to their halves of the frame.
    motion = draws.choice(MOTIONS if count == 1 else MOTIONS[2:])
    size = draws.choices(list(SIZES), (1, 3, 1))[0] if count == 1 else "small"
    place = ("left", "right")[index] if count == 2 else draws.choice(list(PLACES))
    if motion in HORIZONTAL:
        place = "middle"
    return Shape(
        draws.choice(SHAPES),
        draws.choice(list(COLOURS)),
        motion,
        size,
        place,
        draws.uniform(0.92, 1.08),
        draws.uniform(-0.04, 0.04),
        draws.uniform(-0.06, 0.06),
    )


class Track(NamedTuple):
    """Centre and radius of a shape over time, one value a frame, in heights."""

    x: Tensor
    y: Tensor
    radius: Tensor


def track(shape: Shape, time: Tensor, aspect: float) -> Track:
    """Where a shape is.

    Args:
        shape: the shape.
        time: times from 0 to 1, any shape.
        aspect: width of the frame over its height; in a frame that is taller than wide, lengths shrink with it.
    """
    unit = min(1.0, aspect)
    radius = SIZES[shape.size] * shape.scale * unit
    edge = radius * (max(_GROWTH) if shape.motion in ("grow", "shrink") else 1) + _MARGIN * unit
    x = torch.full_like(time, min(max(PLACES[shape.place] * aspect + shape.x * unit, edge), aspect - edge))
    y = torch.full_like(time, min(max(0.5 + shape.y * unit, edge), 1 - edge))
    size = torch.full_like(time, radius)
    low, high = 1 - edge, edge
    if shape.motion == "right":
        x = edge + (aspect - 2 * edge) * time
    elif shape.motion == "left":
        x = aspect - edge - (aspect - 2 * edge) * time
    elif shape.motion == "down":
        y = high + (low - high) * time
    elif shape.motion == "up":
        y = low - (low - high) * time
    elif shape.motion == "bounce":
        y = low - (low - high) * (_HOPS * math.pi * time).sin().abs()
    elif shape.motion in ("grow", "shrink"):
        start, end = _GROWTH if shape.motion == "grow" else _GROWTH[::-1]
        size = radius * (start + (end - start) * time)
    return Track(x, y, size)


def distance(kind: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to a shape's edge, negative inside; its centre of mass is the origin."""
    if kind == "circle":
        return torch.hypot(x, y) - radius
    if kind == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * radius
    if kind == "triangle":
        # Distance of each side from the centre of mass; one side lies below.
        side = 0.62 * radius
        slope = x.abs() * (math.sqrt(3) / 2) - y * 0.5
        return torch.maximum(slope, y) - side
    return (torch.hypot(x, y) - 0.76 * radius).abs() - 0.29 * radius


def render_video(scene: Scene, height: int, width: int, num_frames: int, window: Window | None = None) -> Tensor:
    """The picture of a scene, (F, 3, H, W) in [-1, 1].

    Args:
        scene: what to draw.
        height, width, num_frames: of the whole clip.
        window: the part that is wanted; None for all.
    """
    part = window or Window(0, 0, height, width, 0, num_frames)
    time = (part.start + torch.arange(part.frames)) / max(num_frames - 1, 1)
    rows = ((part.top + torch.arange(part.height) + 0.5) / height)[None, :, None]
    columns = ((part.left + torch.arange(part.width) + 0.5) / height)[None, None, :]
    frames = _pixels(BACKGROUNDS[scene.background]).view(1, 3, 1, 1).repeat(part.frames, 1, part.height, part.width)
    for shape in scene.shapes:
        way = track(shape, time, width / height)
        x, y, radius = (value[:, None, None] for value in way)
        # Half a pixel on either side of the edge is mixed.
        cover = (0.5 - distance(shape.kind, columns - x, rows - y, radius) * height).clamp(0, 1)[:, None]
        frames = frames.lerp(_pixels(COLOURS[shape.colour].rgb).view(1, 3, 1, 1), cover)
    return frames


def _pixels(rgb: tuple[int, int, int]) -> Tensor:
    return torch.tensor(rgb, dtype=torch.float32) / 127.5 - 1


def render_sound(scene: Scene, seconds: float, rate: int, *, aspect: float = 1.5) -> Tensor:
    """The sound of a scene, (2, N) in [-1, 1]: pitch by colour, loudness by motion, sides by the horizontal place.

    Args:
        scene: what sounds.
        seconds: length.
        rate: samples a second.
        aspect: of the picture; a shape at its edge sounds from one side alone.
    """
    count = round(seconds * rate)
    instant = torch.arange(count, dtype=torch.float64) / rate
    time = (instant / seconds).float()
    sound = torch.zeros(2, count)
    for shape in scene.shapes:
        pitch = COLOURS[shape.colour].pitch
        tone = sum(
            strength * torch.sin(2 * math.pi * pitch * (index + 1) * instant)
            for index, strength in enumerate(_HARMONICS)
        )
        assert isinstance(tone, Tensor)
        tone = tone.float() * loudness(shape.motion, time) * (_LOUDNESS / len(scene.shapes))
        side = pan(track(shape, time, aspect).x, aspect)
        sides = torch.stack([1 - side, 1 + side]) / 2
        sound += tone * sides.clamp(min=_PAN_FLOOR**2).sqrt()
    return sound


def pan(x: Tensor, aspect: float) -> Tensor:
    """Side of the sound of a shape at x: -1 left, 1 right; it moves faster than the picture, so that it is heard."""
    return (_PAN_GAIN * (2 * x / aspect - 1)).clamp(-1, 1)


def loudness(motion: str, time: Tensor) -> Tensor:
    """Envelope of a motion's sound, in (0, 1]."""
    if motion == "up":
        return 0.3 + 0.7 * time
    if motion == "down":
        return 1 - 0.7 * time
    if motion == "bounce":
        # Struck whenever the shape leaves the ground.
        return 0.15 + 0.85 * torch.exp(-4 * (time * _HOPS).remainder(1))
    if motion == "grow":
        return 0.15 + 0.85 * time**2
    if motion == "shrink":
        return 0.15 + 0.85 * (1 - time) ** 2
    if motion == "still":
        return torch.full_like(time, 0.7)
    return torch.ones_like(time)
