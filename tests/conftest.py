"""Fixtures of the whole suite."""

from collections.abc import Iterator

import pytest

from tests.serving import default_device


@pytest.fixture
def backend_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors that the test makes lie on the device of its `backend`."""
    with default_device(request.getfixturevalue("backend")):
        yield
