"""The demo's world: one picture at every size and length, sound on the right side, prompts that name what they mean."""

import json
import re
from itertools import product
from random import Random

import pytest
import torch

from ltxkern.pipeline.files.hub import DEMO_FOLDER
from ltxkern.pipeline.run.request import DEFAULT_NEGATIVE_PROMPT
from tools.demo_model import prompts
from tools.demo_model.export import TEXT
from tools.demo_model.text import tokenizer, with_filler
from tools.demo_model.world import (
    BACKGROUNDS,
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
@pytest.mark.parametrize("aspect", [0.4, 0.5, 2 / 3, 1.0, 1.5, 2.4])
def test_shapes_stay_in_the_frame_and_move_as_told(motion: str, size: str, aspect: float) -> None:
    time = torch.linspace(0, 1, 49)
    for place in ("left", "middle", "right"):
        way = track(Shape("circle", "red", motion, size, place, 1.08, 0.04, 0.06), time, aspect)
        assert (way.x - way.radius).min() > 0
        assert (way.x + way.radius).max() < aspect
        assert (way.y - way.radius).min() > 0
        assert (way.y + way.radius).max() < 1
        gone = {"right": way.x, "left": -way.x, "down": way.y, "up": -way.y, "grow": way.radius, "shrink": -way.radius}
        for name, values in gone.items():
            assert (values[-1] - values[0] > 0.05 * min(1, aspect)) == (name == motion)


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


def test_a_checksum_keeps_156_of_1024_combinations_from_training() -> None:
    combinations = list(product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS))
    kept = [colour for kind, colour, motion, ground in combinations if _one(kind, colour, motion, ground).held_out]
    assert (len(kept), len(combinations)) == (156, 1024)
    assert (kept.count("green"), kept.count("yellow"), kept.count("purple")) == (12, 26, 26)


def _one(kind: str, colour: str, motion: str, background: str) -> Scene:
    return Scene(background, (Shape(kind, colour, motion),))


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


def test_other_words_are_read_as_known_ones() -> None:
    """They change no sentence of the grammar, nor the negative prompt, and the package has them."""
    draws, read, known = Random(2), tokenizer(), set(prompts.vocabulary())
    normalise = read.backend_tokenizer.normalizer.normalize_str
    sentences = [prompts.write_prompt(draw_scene(draws), draws) for _ in range(2000)]
    sentences += [with_filler(text, draws) for text in sentences if " up and down" not in text]
    for text in (*sentences, DEFAULT_NEGATIVE_PROMPT):
        assert normalise(text).split() == re.sub("[^a-z]+", " ", text.lower()).split()
    assert set(prompts.READ_AS) <= known
    made, shipped = (
        json.loads(read.backend_tokenizer.to_str()),
        json.loads((DEMO_FOLDER / TEXT / "tokenizer.json").read_text()),
    )
    assert [made[key] for key in ("normalizer", "model")] == [shipped[key] for key in ("normalizer", "model")]
    texts = {
        "One enormous gold orb TRAVELS toward the left.": "a huge golden ball moves to the left",
        "a box jumps, leaping up and down": "a box bounces jumping up and down",
        "a travelling box": "a moving box",
        "a doughnut remains static; snow": "a donut stays still snowy",
        "boxes fall, disks rise and orbs move up": "box falls disc rises and ball moves up",
        "a dark blue tile, bright backdrop": "a blue tile bright backdrop",
        "a navy blue background": "a navy background",
        "a ring over the dark blue wall": "a ring over the navy wall",
        "a hoop slides left, drifting down and rises": "a hoop moves left sinking down rises",
        "the box is red, and it gets smaller and smaller": "the box is red gets smaller smaller",
        "red cubes and small tiles and the moon jump up and down": "red cube and small tile and the moon jumps up and down",
        "a white dot, not moving, no triangle, not blue": "a white dot still",
        "a dot without any red square": "a dot",
        "a box, not blue, yellow, no rings, white backdrop": "a box yellow white backdrop",
        "backdrop: dark; blue ball": "backdrop dark blue ball",
        "a ball goes from bottom to top in the blue sky": "a ball goes up in the navy background",
    }
    for text, meant in texts.items():
        assert normalise(text).split() == meant.split()
        assert read.unk_token_id not in read(text)["input_ids"]


def test_the_card_names_the_words_that_are_read() -> None:
    card = " ".join((DEMO_FOLDER / "MODEL_CARD.md").read_text().split())
    tables = (prompts.COLOUR_WORDS, prompts.SHAPE_WORDS, prompts.BACKGROUND_WORDS, prompts.SIZE_WORDS)
    words = {word for table in tables for synonyms in table.values() for word in synonyms}
    motions = {finite for pairs in prompts.MOTION_WORDS.values() for finite, _ in pairs}
    assert {word for word in words | motions if word not in card} == set()


def test_a_scene_at_the_end_of_a_long_text_is_read() -> None:
    read, scene = tokenizer(), "a red triangle moves right on a white background"
    told = read("Nobody who ever came here could have known beforehand " * 4 + scene, truncation=True)["input_ids"]
    assert read.decode(told).endswith(scene)


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
