"""A small transformer with its pristine weights, the phases of both stages, and what a fresh merge of each gives."""

import pytest

from ltxkern.pipeline.files.lora import lora_phases
from tests.pipeline.memory.lora_models import fresh_merges, linear_weights, random_lora, small_model


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def pristine(model):
    return linear_weights(model)


@pytest.fixture
def phases(model):
    return lora_phases([], random_lora("distilled", model, seed=1))


@pytest.fixture
def expected(pristine, phases):
    return fresh_merges(pristine, phases)
