"""This machine as the package keeps files by it: processor and driver."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def processor_fields() -> dict[str, str]:
    """What Linux says of the last processor by name: "model name", "vendor_id"; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    return dict(re.findall(r"^(.*?)\s*: (.*)$", info.read_text(), re.MULTILINE)) if info.is_file() else {}


def processor() -> str:
    """Model name of the processor."""
    return processor_fields().get("model name", "").strip() or platform.processor() or platform.machine()


def nvidia_driver() -> str:
    """Version of NVIDIA's driver; where the system does not tell, the CUDA version that it serves."""
    told = Path("/proc/driver/nvidia/version")
    if told.is_file() and (found := re.search(r"Kernel Module\D*?\s(\d[\d.]+)", told.read_text())):
        return found[1]
    import torch

    return f"CUDA {getattr(torch._C, '_cuda_getDriverVersion', int)()}"
