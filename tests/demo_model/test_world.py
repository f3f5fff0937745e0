"""The demo's world: one picture at every size and length, sound on the right side, prompts that name what they mean."""

from random import Random

import pytest
import torch

from tools.demo_model import prompts
from tools.demo_model.world import (
    COLOURS,
    HORIZONTAL,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    Shape,
    Window,
    distance,
    draw_scene,
    render_sound,
    render_video,
    track,
)


def scene(kind: str = "circle", colour: str = "red", motion: str = "right", **more: object) -> Scene:
    return Scene("black", (Shape(kind, colour, motion, **more),))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SHAPES)
def test_a_larger_picture_holds_the_same_scene(kind: str) -> None:
    small = render_video(scene(kind), 64, 96, 5)
    large = render_video(scene(kind), 256, 384, 5)
    averaged = torch.nn.functional.avg_pool2d(large, 4)
    assert (small - averaged).abs().mean() < 4e-3
    assert (small - averaged).abs().max() < 0.6


@pytest.mark.parametrize("kind", SHAPES)
def test_the_origin_is_the_centre_of_mass(kind: str) -> None:
    line = torch.linspace(-2, 2, 401)
    inside = (distance(kind, line[None], line[:, None], torch.ones(())) < 0).float()
    assert inside.sum() > 0
    assert abs(float((inside.sum(0) @ line) / inside.sum())) < 0.02
    assert abs(float((inside.sum(1) @ line) / inside.sum())) < 0.02


def test_longer_clips_pass_the_same_places() -> None:
    short, long = render_video(scene(), 64, 96, 9), render_video(scene(), 64, 96, 17)
    assert torch.equal(short, long[::2])


def test_a_window_is_a_part_of_the_clip() -> None:
    whole = render_video(scene("ring", motion="bounce"), 64, 96, 9)
    part = render_video(scene("ring", motion="bounce"), 64, 96, 9, Window(8, 20, 32, 48, 3, 4))
    torch.testing.assert_close(part, whole[3:7, :, 8:40, 20:68])


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_shapes_stay_in_the_frame(motion: str, size: str) -> None:
    time = torch.linspace(0, 1, 49)
    for place in ("left", "middle", "right"):
        way = track(Shape("circle", "red", motion, size, place, 1.08, 0.04, 0.06), time, 1.5)
        assert (way.x - way.radius).min() > 0
        assert (way.x + way.radius).max() < 1.5
        assert (way.y - way.radius).min() > 0
        assert (way.y + way.radius).max() < 1


def test_the_sound_follows_the_shape() -> None:
    sound = render_sound(scene(motion="right"), 2.0, 16000)
    left, right = sound[:, :8000].square().sum(1)
    assert left > 5 * right
    left, right = sound[:, -8000:].square().sum(1)
    assert right > 5 * left
    assert sound.abs().max() < 1


def test_tones_have_one_phase_in_every_spectrogram_row() -> None:
    for colour in COLOURS.values():
        assert colour.pitch % 100 == 0
    sound = render_sound(scene(motion="still", place="left"), 1.0, 16000)
    torch.testing.assert_close(sound[:, :160], sound[:, 160:320], atol=1e-5, rtol=0)


def test_training_and_test_share_no_combination() -> None:
    draws = Random(0)
    seen, kept = ({_combinations(draw_scene(draws, held_out=part)) for _ in range(400)} for part in (False, True))
    assert len(seen) > 200
    assert not {single for scene in seen for single in scene} & {
        one for scene in kept for one in scene if len(scene) == 1
    }


def _combinations(scene: Scene) -> tuple[tuple[str, ...], ...]:
    return tuple((shape.kind, shape.colour, shape.motion, scene.background) for shape in scene.shapes)


def test_prompts_name_the_scene_in_known_words() -> None:
    draws, words = Random(1), set(prompts.vocabulary())
    texts = set()
    for _ in range(200):
        drawn = draw_scene(draws)
        text = prompts.write_prompt(drawn, draws)
        texts.add(text)
        assert set(text.replace(",", " ").split()) <= words
        for shape in drawn.shapes:
            assert any(word in text.split() for word in prompts.COLOUR_WORDS[shape.colour])
            assert any(word in text.replace(",", " ").split() for word in prompts.SHAPE_WORDS[shape.kind])
    assert len(texts) == 200


def test_the_plain_prompt() -> None:
    two = Scene(
        "navy", (Shape("ring", "orange", "up", "small", "left"), Shape("square", "blue", "still", "small", "right"))
    )
    assert prompts.plain_prompt(two) == (
        "a small orange ring moves up and a small blue square stays still on a navy background"
    )
    assert prompts.plain_prompt(scene()) == "a red circle moves right on a black background"


def test_no_word_means_two_things() -> None:
    tables = (prompts.COLOUR_WORDS, prompts.SHAPE_WORDS, prompts.BACKGROUND_WORDS, prompts.SIZE_WORDS)
    words = [word for table in tables for synonyms in table.values() for word in synonyms if word]
    assert len(words) == len(set(words))
    assert set(HORIZONTAL) <= set(MOTIONS)
