"""RoPE tables by coordinate: the bits of those by token, at the shapes of production, and the velocities with them."""

import dataclasses
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed

from ltxkern.pipeline.model.inputs import KeptTables, ModalityInput, rotary_tables
from ltxkern.pipeline.model.transformer import LTX2Transformer, predict_velocity_batched
from ltxkern.pipeline.sampling.coordinates import Coordinates
from ltxkern.pipeline.sampling.latents import (
    AudioLatentShape,
    LatentShape,
    LatentState,
    VideoLatentShape,
    keyframe_coordinates,
)
from tests.pipeline.model.demo_inputs import AUDIO_TOKENS, VIDEO_TOKENS, inputs

STAGES = (VideoLatentShape(16, 17, 30, 128), VideoLatentShape(16, 34, 60, 128))
ODD = VideoLatentShape(7, 5, 9, 128)


def embedding(dim: int, heads: int, modality: str = "video") -> LTX2AudioVideoRotaryPosEmbed:
    """As LTX-2.3 makes them."""
    scale = {"scale_factors": (4,)} if modality == "audio" else {}
    return LTX2AudioVideoRotaryPosEmbed(
        dim, modality=modality, rope_type="split", double_precision=True, num_attention_heads=heads, **scale
    )


def thinned(state: LatentState, step: int) -> tuple[torch.Tensor, Coordinates]:
    """Every `step`-th token's positions."""
    assert state.coordinates is not None
    return state.positions[:, :, ::step], state.coordinates.part(slice(None, None, step))


@pytest.mark.parametrize("fps", [24.0, 25.0, 30000 / 1001])
@pytest.mark.parametrize(
    ("shape", "dim", "heads", "step"),
    [
        # Every token at one head and every 97th at all; 64 pairs, of which two in front are padding, or 63 without any.
        *((shape, 128, 1, 1) for shape in (*STAGES, ODD)),
        *((shape, 4096, 32, 97) for shape in STAGES),
        *((AudioLatentShape(frames), 2048, 32, 1) for frames in (126, 17)),
        (ODD, 126, 1, 1),
    ],
    ids=str,
)
def test_every_angle_has_the_bits_of_its_token(shape: LatentShape, dim: int, heads: int, step: int, fps: float) -> None:
    state = LatentState.create(shape, fps=fps)
    video = isinstance(shape, VideoLatentShape)
    if video:
        clean = torch.zeros(1, shape.height * shape.width, shape.channels, dtype=torch.bfloat16)
        keyframe = keyframe_coordinates(shape, 40, fps)
        state = state.append(clean, clean, torch.ones(*clean.shape[:2], 1), keyframe, levels=(1.0,))
    positions, coordinates = thinned(state, step)
    for axes, of in ((3, coordinates), (1, coordinates.first_axis())) if video else ((1, coordinates),):
        embed = embedding(dim, heads, "video" if video else "audio")
        tables = rotary_tables(embed, positions, of)
        assert tables.rows is not None
        assert len(tables.cos) == sum(len(bounds) for bounds in of.bounds)
        for one, other in zip(tables.by_token(heads, dim // 2 // heads), embed(positions[:, :axes]), strict=True):
            assert torch.equal(one, other)


def test_the_tables_of_stage_2_are_small() -> None:
    state = LatentState.create(STAGES[1])
    cos, sin, rows = rotary_tables(embedding(4096, 32), state.positions, state.coordinates)
    assert cos.shape == sin.shape == (16 + 34 + 60, 683)
    assert rows is not None
    assert cos.nbytes + sin.nbytes + rows.nbytes < 1 << 20


def pairs(seed: int, **coordinates: Coordinates) -> dict[str, Any]:
    given = inputs(seed)
    for name, of in coordinates.items():
        given[name] = dataclasses.replace(given[name], positions=of.positions(1), coordinates=of)
    return given


@pytest.mark.parametrize("known", [("video", "audio"), ("video",), ("audio",)], ids=str)
def test_the_velocity_is_that_of_tables_by_token(model: LTX2Transformer, known: tuple[str, ...]) -> None:
    """Of two branches at once, and where one modality has positions alone."""
    generator = torch.Generator().manual_seed(0)
    bounds = [10 * torch.rand(count, 2, generator=generator) for count in (2, 2, 2, AUDIO_TOKENS)]
    coordinates = {
        "video": Coordinates.on_grid(*bounds[:3]).part(slice(VIDEO_TOKENS)),
        "audio": Coordinates.on_grid(bounds[3]),
    }
    branches = [pairs(seed, **coordinates) for seed in range(2)]

    def without(item: ModalityInput, name: str) -> ModalityInput:
        return item if name in known else dataclasses.replace(item, coordinates=None)

    some = [{name: without(item, name) for name, item in branch.items()} for branch in branches]
    by_token = [
        {name: dataclasses.replace(item, coordinates=None) for name, item in branch.items()} for branch in branches
    ]
    ours, wanted = (predict_velocity_batched(model, each) for each in (some, by_token))
    for one, other in zip(ours, wanted, strict=True):
        for velocity, expected in zip(one, other, strict=True):
            assert velocity is not None
            assert torch.equal(velocity, expected)


def test_tables_are_kept_while_the_coordinates_stay() -> None:
    made: list[int] = []

    def counted(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(positions.shape[2])
        return torch.ones(1, 2, positions.shape[2], 4), torch.ones(1, 2, positions.shape[2], 4)

    def of(coordinates: Coordinates | None, *, alone: bool = False, name: str = "rope") -> Any:
        return kept.of(name, counted, torch.zeros(1, 2, 6, 2), coordinates, alone=alone)

    kept, bounds = KeptTables(), (torch.zeros(2, 2), torch.zeros(3, 2))
    first, second = Coordinates.on_grid(*bounds), Coordinates.on_grid(*bounds)
    assert of(first) is of(first)
    assert of(first, alone=True, name="cross").cos.shape[0] == 2
    assert made == [5, 2]
    assert of(second) is of(second) is not None
    assert of(first) is not of(None)  # tables by token are large, and are not kept
    assert made == [5, 2, 5, 5, 6]
