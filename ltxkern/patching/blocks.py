"""Blocks whose own forward changes with their norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ltxkern.patching.flow import Flow, Node, Value
from ltxkern.patching.watch import Fused, stands


@dataclass(frozen=True)
class Activated:
    """Parameters of a block's forward, each with its position, that go into the activation and nowhere else."""

    parameters: tuple[tuple[str, int], ...]
    inplace: bool = False  # as the activation does it: the caller may look


class ActivatedBefore(Fused):
    """A block whose activation, which also served its time embedding, is passed: the embedding comes activated."""

    _ltxkern: Activated

    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        """The block's own forward."""
        if not stands(self):
            return type(self).forward(self, *args, **keywords)
        given = list(args)
        for name, position in self._ltxkern.parameters:
            if name in keywords:
                keywords[name] = _activated(keywords[name], self._ltxkern.inplace)
            elif position < len(given):
                given[position] = _activated(given[position], self._ltxkern.inplace)
        return super().forward(*given, **keywords)


def _activated(value: Any, inplace: bool) -> Any:
    return F.silu(value, inplace=inplace) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class ResidualNames:
    """Children of a residual block in the order of their calls."""

    first: str
    first_norm: str
    second: str
    second_norm: str
    activation: str


class ResidualBlock(Fused):
    """`silu(norm2(second(silu(norm1(first(x))))) + x)`; the norms include their activations."""

    _ltxkern: ResidualNames

    def forward(self: Any, x: Tensor) -> Tensor:
        """The residual goes into the second norm."""
        if not stands(self):
            return type(self).forward(self, x)
        names = self._ltxkern
        y = getattr(self, names.first_norm)(getattr(self, names.first)(x))
        return getattr(self, names.second_norm)(getattr(self, names.second)(y), residual=x)


def residual_names(flow: Flow, block: nn.Module) -> ResidualNames | None:
    """The children of a block whose forward is that of `ResidualBlock` and nothing else."""
    last = _only(flow.returned)
    total = _only(last.inputs[0]) if last is not None and last.kind == "call" and len(last.inputs) == 1 else None
    if last is None or total is None or total.kind != "sum" or len(flow.calls) != 6:
        return None
    for part, residual in (total.inputs, total.inputs[::-1]):
        names, x = [], _only(part)
        while x is not None and x.kind == "call" and len(x.inputs) == 1:
            names.append(x.name)
            x = _only(x.inputs[0])
        if x is not None and x.kind == "parameter" and _only(residual) is x and len(names) == 5:
            second_norm, second, activation, first_norm, first = names
            if activation == last.name and None not in flow.uses[x]:
                return ResidualNames(first, first_norm, second, second_norm, activation)
    return None


def _only(value: Value) -> Node | None:
    return next(iter(value)) if len(value) == 1 else None
