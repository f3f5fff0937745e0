"""Facts about the machine and the software that results depend on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from ltxkern.trust.machine import processor

PACKAGES = (
    "torch",
    "triton",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "diffusers",
    "transformers",
    "safetensors",
    "av",
    "numpy",
)


def package_versions() -> dict[str, str | None]:
    """Installed version of each package that matters; None where it is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def environment() -> dict[str, Any]:
    """Machine, versions and devices, as plain data."""
    import torch

    import ltxkern

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return {
        "ltxkern": ltxkern.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "packages": package_versions(),
        "cuda": torch.version.cuda,
        "devices": devices,
        "backends": ltxkern.backends(),
    }
