"""The demo pipeline of a test module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ltxkern.pipeline.generator import HQTwoStagePipeline
from tests.pipeline.demo_runs import make


@pytest.fixture(scope="module")
def pipeline() -> Iterator[HQTwoStagePipeline]:
    with make() as opened:
        yield opened
