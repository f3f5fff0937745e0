"""Runs one test on every backend of an op that this process has; a case that a backend refuses is skipped with its reason."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch

import ltxkern
from ltxkern.compiled import extension
from ltxkern.verify.report import device_of

# Without them a test that names the backend "cpu" would have nothing to test.
needs_cpu_kernels = pytest.mark.skipif(
    extension.unavailable("cpu") is not None, reason=f"CPU KERNELS NOT TESTED: {extension.unavailable('cpu')}"
)
Test = TypeVar("Test", bound=Callable[..., None])


def backends_of(op: str) -> list[str]:
    """Backends that have a kernel for the op and can run here; torch, the reference, is always among them."""
    return [name for name, reason in ltxkern.capabilities()[op].items() if reason is None]


def over_backends(op: str, *, on_device: bool = True) -> Callable[[Test], Test]:
    """Parametrises a test over the backends of an op, under the argument name `backend`.

    With `on_device` the tensors that the test makes lie where the backend works: on the GPU for cuda, nvrtc and compiled Triton.
    """

    def decorate(test: Test) -> Test:
        marked = pytest.mark.parametrize("backend", backends_of(op))(test)
        return pytest.mark.usefixtures("backend_device")(marked) if on_device else marked

    return decorate


@contextmanager
def serving(backend: str) -> Iterator[None]:
    """Ops in the block run on this backend; a case that it refuses is skipped with the refusal as the reason."""
    try:
        with ltxkern.use_backend(backend):
            yield
    except ltxkern.BackendError as refusal:
        pytest.skip(str(refusal))


@contextmanager
def default_device(backend: str) -> Iterator[None]:
    """Tensors made in the block lie on the backend's device."""
    with torch.device(device_of(backend)):
        yield
