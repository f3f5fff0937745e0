"""This machine as the package keeps files by it: processor and driver."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def processor() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def nvidia_driver() -> str:
    """Version of NVIDIA's driver; where the system does not tell, the CUDA version that it serves."""
    told = Path("/proc/driver/nvidia/version")
    if told.is_file() and (found := re.search(r"Kernel Module\D*?\s(\d[\d.]+)", told.read_text())):
        return found[1]
    import torch

    return f"CUDA {getattr(torch._C, '_cuda_getDriverVersion', int)()}"
