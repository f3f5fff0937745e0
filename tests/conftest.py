"""Fixtures of the whole suite, and what of the user's machine it must not see."""

import atexit
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator

import pytest

from tests.serving import default_device

# Probes at first use would be calls among those that tests count, and a user's own proofs would choose other backends.
os.environ.setdefault("LTXKERN_SELFCHECK", "off")
if "LTXKERN_CACHE" not in os.environ:
    os.environ["LTXKERN_CACHE"] = tempfile.mkdtemp(prefix="ltxkern-tests-")
    atexit.register(shutil.rmtree, os.environ["LTXKERN_CACHE"], ignore_errors=True)
# Whoever starts the tests in the background has Ctrl-C ignored, here and in every process that tests start.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def backend_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors that the test makes lie on the device of its `backend`."""
    with default_device(request.getfixturevalue("backend")):
        yield
