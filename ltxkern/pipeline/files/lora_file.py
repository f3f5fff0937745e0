"""Reads LoRA files with official key names and checks them against the transformer."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ltxkern.pipeline.files.headers import CheckpointError, StoredTensor, listed, read_header
from ltxkern.pipeline.files.official_names import lora_module

logger = logging.getLogger(__name__)

LoraWeights = dict[str, tuple[torch.Tensor, torch.Tensor, float | None]]

_FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)


def dequantise(factor: torch.Tensor, scale: torch.Tensor | float | None = None) -> torch.Tensor:
    """A stored factor as a tensor that the merge can read.

    Args:
        factor: fp16, bf16, fp32, fp64, or fp8 (e4m3, e5m2).
        scale: multiplier of an fp8 factor: one number, or one per row (rows,) or (rows, 1).

    Returns:
        fp16, bf16, fp32 and fp64 without a scale as they are; fp8 without a scale in bf16 (exact); with a scale in
        fp32, `factor * scale` rounded once.
    """
    if scale is None:
        return factor.to(torch.bfloat16) if factor.dtype in _FLOAT8 else factor
    multiplier = torch.as_tensor(scale, dtype=torch.float32, device=factor.device)
    if multiplier.dim() == 1 and multiplier.numel() == factor.shape[0]:
        multiplier = multiplier[:, None]
    return factor.to(torch.float32) * multiplier


def load_lora(path: str | Path, *, transformer: torch.nn.Module | None = None) -> LoraWeights:
    """Reads a LoRA file with official key names.

    Args:
        path: safetensors file with `diffusion_model.<module>.lora_A.weight` (R, in) and `.lora_B.weight` (out, R).
        transformer: where given, every module and shape is checked against it.

    Returns:
        {diffusers module name: (lora_A, lora_B, alpha or None)}, tensors on the CPU in the dtype of the file, fp8
        dequantised (`.lora_A.weight_scale` or `.scale_weight` beside it is its scale). The official merge ignores alpha.

    Raises:
        CheckpointError: no LoRA keys at all, A without B, ranks that disagree, modules or shapes the transformer
            does not have.
    """
    found = check_lora_file(path, transformer=transformer)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {
                module: (
                    _factor(file, parts, "lora_A"),
                    _factor(file, parts, "lora_B"),
                    float(file.get_tensor(parts["alpha"].key)) if "alpha" in parts else None,
                )
                for module, parts in sorted(found.items())
            }
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _factor(file: Any, parts: Mapping[str, StoredTensor], half: str) -> torch.Tensor:
    """One factor in a dtype that can be computed with: fp8 times its scale where the file has one."""
    scale = file.get_tensor(parts[f"{half}_scale"].key) if f"{half}_scale" in parts else None
    return dequantise(file.get_tensor(parts[half].key), scale)


def check_lora_file(
    path: str | Path, *, transformer: torch.nn.Module | None = None
) -> dict[str, dict[str, StoredTensor]]:
    """Checks a LoRA file from its header alone; the stored tensors by module and half.

    Args:
        path: as for `load_lora`.
        transformer: where given (on the meta device will do), every module and shape is checked against it.

    Raises:
        CheckpointError: as `load_lora`.
    """
    header = read_header(path)
    found: dict[str, dict[str, StoredTensor]] = {}
    foreign, unknown = [], []
    for key, tensor in header.tensors.items():
        parts = lora_module(key)
        if parts is None:
            unknown.append(key)
        elif "embeddings_connector" in key or "text_embedding_projection" in key:
            foreign.append(key)
        else:
            found.setdefault(parts[0], {})[parts[1]] = tensor
    if foreign:
        logger.warning(
            "%s: %d keys of the text connectors are left out, as the official merge does", path, len(foreign)
        )
    if unknown or not found:
        raise CheckpointError(
            f"{path}: expected keys diffusion_model.<module>.lora_A.weight and .lora_B.weight, got {listed(unknown) or 'none'}"
        )
    _check_lora(Path(path), found, transformer)
    return found


def _check_lora(
    path: Path, found: Mapping[str, Mapping[str, StoredTensor]], transformer: torch.nn.Module | None
) -> None:
    problems = []
    halves = [module for module, parts in sorted(found.items()) if not {"lora_A", "lora_B"} <= set(parts)]
    if halves:
        problems.append(f"{len(halves)} modules without lora_A or lora_B: {listed(halves)}")
    pairs = {module: (parts["lora_A"], parts["lora_B"]) for module, parts in found.items() if module not in halves}
    ranks = [
        f"{module} (A {a.shape}, B {b.shape})"
        for module, (a, b) in sorted(pairs.items())
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]
    ]
    if ranks:
        problems.append(f"{len(ranks)} pairs that are not (R, in) and (out, R): {listed(ranks)}")
    elif transformer is not None:
        linears = {name: m for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
        foreign = sorted(set(found) - set(linears))
        if foreign:
            problems.append(f"{len(foreign)} modules the transformer does not have: {listed(foreign)}")
        wrong = [
            f"{module} (expected {tuple(linears[module].weight.shape)}, got ({b.shape[0]}, {a.shape[1]}))"
            for module, (a, b) in sorted(pairs.items())
            if module in linears and (b.shape[0], a.shape[1]) != tuple(linears[module].weight.shape)
        ]
        if wrong:
            problems.append(f"{len(wrong)} of the wrong shape: {listed(wrong)}")
    if problems:
        raise CheckpointError(f"{path} does not fit the transformer; " + "; ".join(problems))
