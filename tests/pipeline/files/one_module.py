"""A LoRA file that changes one module."""

from pathlib import Path

import torch
from safetensors.torch import save_file


def one_module(path: Path, metadata: dict[str, str], alpha: float | None = None, **more: torch.Tensor) -> Path:
    module = "transformer.transformer_blocks.0.attn1.to_k"
    tensors = {f"{module}.lora_A.weight": torch.randn(4, 64), f"{module}.lora_B.weight": torch.randn(64, 4)}
    if alpha is not None:
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    save_file(tensors | {f"{module}.{part}": tensor for part, tensor in more.items()}, path, metadata)
    return path
