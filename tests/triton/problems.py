"""A problem of one op: the public call, the result in fp64, the torch composition's result; and the tensors it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

HALF_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAMPLER_DTYPES = (*HALF_DTYPES, torch.float64)


@dataclass(frozen=True)
class Problem:
    """`call(out)` writes into the given outputs; the results are worked out when they are asked for, never on meta tensors.

    Attributes:
        models: for each output a tensor of its shape, strides and dtype.
        formula: the results in fp64, by a formula of its own.
        composition: the torch composition in the op's dtypes.
    """

    call: Callable[[list[Tensor]], object]
    models: Sequence[Tensor]
    formula: Callable[[], Sequence[Tensor]]
    composition: Callable[[], Sequence[Tensor]]

    @cached_property
    def exact(self) -> Sequence[Tensor]:
        return self.formula()

    @cached_property
    def composed(self) -> Sequence[Tensor]:
        return self.composition()

    def outputs(self) -> list[Tensor]:
        """Outputs full of NaN."""
        return [torch.full_like(model, float("nan")) for model in self.models]


@dataclass(frozen=True)
class Case:
    """One op with one set of sizes; `make(device, dtype)` builds the problem; `bit_equal`: results are the composition's bits."""

    name: str
    make: Callable[[str, torch.dtype], Problem]
    dtypes: tuple[torch.dtype, ...] = HALF_DTYPES
    bit_equal: bool = False

    def __str__(self) -> str:
        return self.name


class Draw:
    """Seeded tensors, the same numbers on every device; on "meta" none at all."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, mean: float = 0.0, std: float = 1.0) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64) * std + mean
        return value.to(dtype or self.dtype).to(self.device)


# Cases of production size, by the name of their row in the baseline of compiled kernels, and the dtype they are compiled in.
Launches = dict[str, tuple[list[Case], torch.dtype]]


def run(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """The results of a case, held to it."""
    problem = case.make(device, dtype)
    results = problem.outputs()
    problem.call(results)
    assert_close_to_exact(results, problem, str(case))
    if case.bit_equal:
        assert all(map(torch.equal, results, problem.composed))
    return results


def assert_close_to_exact(results: list[Tensor], problem: Problem, label: str) -> None:
    """Error against fp64 at most 1.5 times that of the torch composition, on RMS and on the maximum."""
    for index, (result, exact, composed) in enumerate(zip(results, problem.exact, problem.composed, strict=True)):
        assert result.shape == composed.shape
        assert result.dtype == composed.dtype
        error, allowed = (result.double() - exact).abs(), (composed.double() - exact).abs()
        # Where the composition happens to be exact, the resolution of the compute dtype is the measure.
        floor = exact.abs().max() * (2e-15 if result.dtype == torch.float64 else 6e-8)
        for name, measure in (("RMS", lambda e: e.square().mean().sqrt()), ("maximum", lambda e: e.max())):
            got, limit = measure(error), 1.5 * measure(allowed) + floor
            assert got <= limit, f"{label}[{index}]: {name} error {got:.3e}, at most {limit:.3e} allowed"
