"""Opens the golden data files: tensors by key and the metadata, with environment variables naming other files."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Golden:
    """One golden file: every tensor by key, and the header metadata with its JSON values decoded."""

    path: Path
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, Any]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def keys(self, prefix: str = "") -> list[str]:
        """Sorted keys that start with `prefix`; none at all is an error, so that no group goes unchecked."""
        found = sorted(key for key in self.tensors if key.startswith(prefix))
        if not found:
            raise AssertionError(f"{self.path} holds no key that starts with {prefix!r}")
        return found

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose key starts with `prefix`, under their keys without it."""
        return {key[len(prefix) :]: self.tensors[key] for key in self.keys(prefix)}


@cache
def open_golden() -> Golden:
    """golden.safetensors; `metadata` holds `hq_params` and `meta` (parameters per tensor key)."""
    path = Path(os.environ.get("LTXKERN_GOLDEN") or DATA / "golden.safetensors")
    tensors, header = _read(path)
    return Golden(path, tensors, json.loads(header["json"]))


def matching(pattern: str) -> list[re.Match[str]]:
    """Keys of `open_golden` that match the whole pattern; none at all is an error, so that no group goes unchecked."""
    found = [match for key in sorted(open_golden().tensors) if (match := re.fullmatch(pattern, key))]
    assert found, f"{open_golden().path} holds no key like {pattern!r}"
    return found


def open_golden_modules() -> Golden:
    """modules.safetensors; `metadata` holds `configs` and `weights` (names, shapes and the fill rule)."""
    path = Path(os.environ.get("LTXKERN_GOLDEN_MODULES") or DATA / "modules.safetensors")
    tensors, header = _read(path)
    return Golden(path, tensors, {key: json.loads(value) for key, value in header.items()})


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(str(path), framework="pt") as file:
        keys = file.keys()
        return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
