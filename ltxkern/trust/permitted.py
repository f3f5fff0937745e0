"""The backends by name, and which of them the environment permits."""

from __future__ import annotations

import functools
import os

BACKENDS = ("cuda", "nvrtc", "triton", "cpu", "torch")
# Those whose tensors lie on a CUDA device.
DEVICE_BACKENDS = BACKENDS[:3]


def backend_names(text: str, variable: str) -> tuple[str, ...]:
    """The backends that a comma-separated text names; ValueError for an unknown one."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"{variable}: unknown backend {name!r}; known are {', '.join(BACKENDS)}")
    return names


@functools.cache
def environment_choice() -> tuple[str, ...] | None:
    """The backends that LTXKERN_BACKEND names, None for all; ValueError for an unknown one."""
    return backend_names(os.environ.get("LTXKERN_BACKEND", ""), "LTXKERN_BACKEND") or None
