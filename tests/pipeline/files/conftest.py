"""The demo model, and the same in official files and in a diffusers folder; made once a file."""

from pathlib import Path

import pytest

from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.model.components import Components
from tests.official_files import write_diffusers_demo, write_official_demo


@pytest.fixture(scope="module")
def demo() -> Components:
    return build_demo()


@pytest.fixture(scope="module")
def official(demo: Components, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_official_demo(tmp_path_factory.mktemp("official"), demo)


@pytest.fixture(scope="module")
def folder(demo: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_diffusers_demo(tmp_path_factory.mktemp("diffusers"), demo)
