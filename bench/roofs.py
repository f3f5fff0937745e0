"""The roofs of this machine, measured in the same run: a plain copy and a plain matrix product."""

from __future__ import annotations

import torch

from timing import CallTimer, Settings

COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
GEMM_SIZE = {"cuda": 8192, "cpu": 1024}


def copy_roof(device: torch.device, settings: Settings) -> float:
    """Bytes per second of a device copy, reads and writes counted, best of one round's samples."""
    source = torch.empty(COPY_BYTES[device.type] // 2, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    timer = CallTimer(lambda a, b: b.copy_(a), [(source, target)], device, settings)
    return COPY_BYTES[device.type] / min(timer.sample_round())


def gemm_roof(device: torch.device, dtype: torch.dtype, settings: Settings) -> float:
    """FLOP per second of a square matrix product on random data, median of its samples (a matrix product throttles)."""
    size = GEMM_SIZE[device.type]
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    timer = CallTimer(torch.mm, [(a, b)], device, settings)
    samples = sorted(timer.sample_rounds())
    return 2 * size**3 / samples[len(samples) // 2]
