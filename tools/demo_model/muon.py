"""Muon: momentum whose matrices are made orthogonal before they move the weights; vectors follow Adam."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


# A matrix with more rows and columns than this is cut into pieces of so many rows: its cost grows with the cube.
_WIDE, _PIECE = 128, 64


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix (or stack of matrices) whose singular values are all about 1, by five odd polynomials of degree 5."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    if torch.cpu._is_avx512_bf16_supported():
        x = x.bfloat16()
    for a, b, c in _NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two and more dimensions (a kernel is a matrix, one row an output), Adam for the others.

    Args:
        parameters: what is trained, by name.
        lr: of the matrices, in root mean square of a step as Adam counts it: steps of 0.2 lr an element.
        vector_lr: of the vectors.
        momentum: of the matrices.
        tables: parts of names of parameters that are tables of vectors; they follow Adam too.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        *,
        vector_lr: float,
        momentum: float = 0.95,
        tables: tuple[str, ...] = (),
    ) -> None:
        matrices: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for name, parameter in parameters:
            if parameter.requires_grad:
                vector = parameter.ndim < 2 or any(word in name for word in tables)
                (vectors if vector else matrices).append(parameter)
        groups = [
            {"params": matrices, "lr": lr, "full_lr": lr, "momentum": momentum, "matrices": True},
            {"params": vectors, "lr": vector_lr, "full_lr": vector_lr, "matrices": False},
        ]
        super().__init__(groups, {})

    def scale_rates(self, factor: float) -> None:
        """Sets learning rates to a share of the full ones."""
        for group in self.param_groups:
            group["lr"] = group["full_lr"] * factor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not group["matrices"]:
                for parameter in moved:
                    self._step_vector(parameter, parameter.grad, group)
                continue
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in moved:
                alike.setdefault(parameter.shape, []).append(parameter)
            for parameters in alike.values():
                self._step_matrices(parameters, group)

    def _step_matrices(self, parameters: list[nn.Parameter], group: dict) -> None:
        """Of one shape, all at once: most are small, and a call costs more than their products."""
        update = torch.stack([self._with_momentum(parameter, group["momentum"]) for parameter in parameters]).flatten(2)
        rows, columns = update.shape[1:]
        if min(rows, columns) > _WIDE and rows % _PIECE == 0:
            update = update.view(-1, _PIECE, columns)
        update = orthogonalise(update) * (0.2 * math.sqrt(max(update.shape[1:])))
        for parameter, each in zip(parameters, update.view(len(parameters), *parameters[0].shape), strict=True):
            parameter.add_(each, alpha=-group["lr"])

    def _with_momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)

    def _step_vector(self, parameter: nn.Parameter, gradient: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["count"] = 0
        state["count"] += 1
        state["first"].lerp_(gradient, 0.1)
        state["second"].lerp_(gradient.square(), 0.01)
        first = state["first"] / (1 - 0.9 ** state["count"])
        second = state["second"] / (1 - 0.99 ** state["count"])
        parameter.addcdiv_(first, second.sqrt() + 1e-8, value=-group["lr"])
