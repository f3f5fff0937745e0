"""Small videos and tones to write, and what a folder holds."""

from pathlib import Path

import torch
from torch import Tensor


def video(frames: int, height: int = 48, width: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Slowly changing colours that survive compression."""
    t = torch.linspace(0, 1, frames).view(-1, 1, 1)
    y, x = torch.linspace(0, 1, height).view(1, -1, 1), torch.linspace(0, 1, width).view(1, 1, -1)
    planes = torch.broadcast_tensors(0.5 + 0.4 * (x - 0.5), 0.2 + 0.5 * y, 0.3 + 0.4 * t)
    return torch.stack(planes, dim=-1).to(dtype)


def tone(samples: int) -> Tensor:
    time = torch.arange(samples) / 48000
    return torch.stack((0.5 * torch.sin(2764 * time), 0.25 * torch.sin(5529 * time)))


def leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())
