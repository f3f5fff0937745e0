"""The demo transformer, built once a file."""

import pytest

from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.model.transformer import LTX2Transformer


@pytest.fixture(scope="module")
def model() -> LTX2Transformer:
    transformer = build_demo().transformer
    assert transformer is not None
    return transformer
