"""The judge of the demo: right on true renderings, whatever the size and however they suffered, and wrong where they lie."""

import math
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from ltxkern.pipeline.results.media import write_mp4
from tools.demo_model.judge import Clip, Verdict, edge_width, judge, outline_fit, read_clip, scores
from tools.demo_model.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    Shape,
    draw_scene,
    render_sound,
    render_video,
)

SIZES = ((64, 96, 25), (128, 192, 25), (256, 384, 9), (128, 128, 25))


def clip_of(scene: Scene, height: int, width: int, frames: int) -> Clip:
    picture = (render_video(scene, height, width, frames) + 1) / 2
    return Clip(picture, render_sound(scene, frames / 24, 48000, aspect=width / height), 48000)


def all_right(verdict: Verdict) -> bool:
    return all(answer is not False for answer in vars(verdict).values())


def blurred(clip: Clip) -> Clip:
    """As many blurred pixels in every size, noise on picture and sound, paler: what a poor decoder makes."""
    torch.manual_seed(0)
    factor = clip.frames.shape[-2] // 32
    small = avg_pool2d(clip.frames, factor)
    frames = (
        interpolate(small, scale_factor=factor, mode="bilinear") * 0.9 + 0.05 + 0.05 * torch.randn_like(clip.frames)
    )
    assert clip.sound is not None
    return Clip(frames.clamp(0, 1), clip.sound + 0.05 * torch.randn_like(clip.sound), clip.rate)


# Two shapes need the room of a wide frame.
@pytest.mark.parametrize(
    ("size", "shapes"), [*((size, 1) for size in SIZES), *((size, 2) for size in SIZES[1:3])], ids=str
)
@pytest.mark.parametrize("harm", [None, blurred], ids=["true", "blurred"])
def test_a_true_rendering_is_right(size: tuple[int, int, int], shapes: int, harm: object) -> None:
    draws = Random(0)
    for index in range(8 if size[0] < 256 else 3):
        scene = draw_scene(draws, held_out=index % 2 == 0, shapes=shapes)
        clip = clip_of(scene, *size)
        verdict = judge(blurred(clip) if harm else clip, scene)
        assert all_right(verdict), (scene, verdict)


def test_an_mp4_is_judged_as_it_is_seen_and_heard(tmp_path: Path) -> None:
    draws = Random(3)
    for index in range(3):
        scene = draw_scene(draws, shapes=1)
        clip = clip_of(scene, 128, 192, 25)
        path = tmp_path / f"{index}.mp4"
        write_mp4(path, [clip.frames.permute(0, 2, 3, 1)], clip.sound)
        read = read_clip(path)
        assert read.frames.shape == clip.frames.shape
        assert all_right(judge(read, scene)), scene


@pytest.mark.parametrize(
    ("question", "table"), [("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS), ("background", BACKGROUNDS)]
)
def test_a_wrong_answer_is_seen(question: str, table: object) -> None:
    draws = Random(5)
    field = {"shape": "kind"}.get(question, question)
    for _ in range(6):
        shown = draw_scene(draws, shapes=1)
        if question == "background":
            asked = replace(shown, background=draws.choice([name for name in BACKGROUNDS if name != shown.background]))
        else:
            (shape,) = shown.shapes
            others = [name for name in table if name != getattr(shape, field)]  # type: ignore[attr-defined]
            asked = replace(shown, shapes=(replace(shape, **{field: draws.choice(others)}),))
        verdict = judge(clip_of(shown, 64, 96, 25), asked)
        assert not getattr(verdict, question), (shown, asked)
        if question == "colour":
            assert verdict.pitch is False


def test_swapped_sides_are_heard() -> None:
    draws, heard = Random(7), []
    while len(heard) < 6:
        scene = draw_scene(draws, shapes=1)
        (shape,) = scene.shapes
        if shape.place == "middle" and shape.motion not in ("left", "right"):
            continue
        clip = clip_of(scene, 64, 96, 25)
        assert clip.sound is not None
        heard.append(judge(clip._replace(sound=clip.sound.flip(0)), scene).side)
    assert heard == [False] * 6


def test_nothing_is_not_a_shape() -> None:
    scene = draw_scene(Random(9), shapes=1)
    empty = Clip(torch.zeros(9, 3, 64, 96), None, 48000)
    verdict = judge(empty, scene)
    assert not verdict.shape
    assert not verdict.colour
    assert verdict.pitch is None


@pytest.mark.parametrize(("width", "least", "most"), [(1, 0.3, 1.2), (4, 2.5, 4.5), (8, 5, 9)])
def test_edges_are_as_wide_as_they_are(width: int, least: float, most: float) -> None:
    """The true picture goes over in one pixel; a mean over many columns and rows makes a ramp of about their number."""
    draws = Random(11)
    for _ in range(4):
        frames = clip_of(draw_scene(draws, shapes=1), 128, 192, 9).frames
        blurred = avg_pool2d(frames, width, stride=1) if width > 1 else frames
        assert least < edge_width(blurred) < most
    assert edge_width(torch.zeros(9, 3, 64, 96)) == math.inf


@pytest.mark.parametrize("kind", SHAPES)
def test_an_outline_fits_its_own_kind_best(kind: str) -> None:
    frames = clip_of(Scene("navy", (Shape(kind, "red", "up"),)), 128, 192, 9).frames
    fits = {other: outline_fit(frames, other) for other in SHAPES}
    assert fits.pop(kind) > 0.95
    assert max(fits.values()) < 0.92
    squeezed = interpolate(frames, (128, 128))
    assert outline_fit(squeezed, kind) < 0.85
    assert outline_fit(torch.zeros(9, 3, 64, 96), kind) == 0


def test_scores_count_only_what_was_asked() -> None:
    right, silent = Verdict(True, True, True, True, True, True), Verdict(False, True, True, True, None, None)
    assert scores([right, silent]) == {
        "colour": 0.5, "background": 1, "shape": 1, "motion": 1, "pitch": 1, "side": 1
    }  # fmt: skip
