"""Activations from shapes: what a part of a run takes follows from its tensors, and grows with them."""

from dataclasses import replace

import pytest
import torch

from ltxkern.pipeline.files.found import FoundModel
from ltxkern.pipeline.planning.activations import encode_activations, latent_bytes, stage_activations, video_activations
from ltxkern.pipeline.planning.weights import ModelSizes, model_sizes
from ltxkern.pipeline.run.request import GenerationRequest

SMALL = GenerationRequest(prompt="a", height=64, width=128, num_frames=9)


@pytest.fixture(scope="module")
def sizes() -> ModelSizes:
    return model_sizes(FoundModel.of("demo-random"), dtype=torch.float32)


def test_latents_and_contexts_are_counted_to_the_byte(sizes: ModelSizes) -> None:
    first, second = ((1, 16, 2, height, 2 * height) for height in (1, 2))
    video = sum(torch.empty(shape).numel() for shape in (first, second))
    audio = torch.empty(SMALL.stages(sizes.geometry)[0].audio.dims()).numel()
    contexts = sizes.text_tokens * (64 + 32)
    assert latent_bytes(sizes, SMALL) == 4 * (2 * video + 2 * audio + 2 * contexts)


def test_branches_in_one_forward_take_more(sizes: ModelSizes) -> None:
    stage = SMALL.stages(sizes.geometry)[0]
    alone = stage_activations(
        sizes, SMALL, stage, True
    ).device  # what lies between two blocks, of every branch; one within
    assert stage_activations(sizes, replace(SMALL, max_batch_size=3), stage, True).device > 1.5 * alone


def test_encoding_holds_at_least_the_picture(sizes: ModelSizes) -> None:
    small, large = (encode_activations(sizes, side, side, unified=False).device for side in (64, 128))
    assert 3 * 64 * 64 * 4 < small < large


def test_on_a_gpu_the_frames_wait_on_the_host(sizes: ModelSizes) -> None:
    last = SMALL.stages(sizes.geometry)[-1]
    frames = 3 * 9 * 64 * 128 * 4
    apart = video_activations(sizes, SMALL, last, unified=False)
    together = video_activations(sizes, SMALL, last, unified=True)
    assert apart.host == 2 * frames
    assert together.host == 0
    assert together.device >= apart.device - frames
