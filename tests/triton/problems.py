"""A problem of one op: the public call, the result in fp64, the torch composition's result; and the tensors it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALF_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAMPLER_DTYPES = (*HALF_DTYPES, torch.float64)


@dataclass(frozen=True)
class Problem:
    """`call(out)` writes into poisoned outputs; `exact` is fp64; `composed` is the torch composition in the op's dtypes."""

    call: Callable[[list[Tensor]], object]
    outputs: Callable[[], list[Tensor]]
    exact: list[Tensor]
    composed: list[Tensor]


@dataclass(frozen=True)
class Case:
    """One op with one set of sizes; `make(device, dtype)` builds the problem."""

    name: str
    make: Callable[[str, torch.dtype], Problem]
    dtypes: tuple[torch.dtype, ...] = HALF_DTYPES

    def __str__(self) -> str:
        return self.name


class Draw:
    """Seeded tensors, the same numbers on every device."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, mean: float = 0.0, std: float = 1.0) -> Tensor:
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64) * std + mean
        return value.to(dtype or self.dtype).to(self.device)


def poisoned(models: Sequence[Tensor]) -> list[Tensor]:
    """Tensors like the models, full of NaN."""
    return [torch.full_like(model, float("nan")) for model in models]


def problem(call: Callable[[list[Tensor]], object], exact: Sequence[Tensor], composed: Sequence[Tensor]) -> Problem:
    return Problem(call, lambda: poisoned(composed), list(exact), list(composed))
