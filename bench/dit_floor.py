"""The floor of a forward: its matrix products and attention calls alone, one after another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_count import PRODUCTS


class ContractionLog(TorchDispatchMode):
    """Keeps the matrix products and attention calls of what runs inside: functions, weights, and layouts of other tensors."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        attends = "scaled_dot_product" in name
        if attends or name in PRODUCTS:
            # A product of oneDNN's may have a function within: the floor is without.
            alone = (*args[:3], "none", [], "") if name == "_linear_pointwise" else args
            self.calls.append((func, tuple(map(self._kept, alone)), kwargs or {}))
            matrices = [part for part in args if isinstance(part, Tensor)]
            if attends:
                self.flops += 4 * matrices[0].numel() * matrices[1].shape[-2]
            else:
                self.flops += 2 * result.numel() * matrices[-2].shape[-1]
        return result

    def _kept(self, part: Any) -> Any:
        """A weight as it is: it is read from where the forward reads it; of any other tensor the layout."""
        if not isinstance(part, Tensor) or part.untyped_storage().data_ptr() in self._weights:
            return part
        return Layout(tuple(part.shape), part.stride(), part.dtype)


class Layout(NamedTuple):
    """Of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def floor_calls(log: ContractionLog, device: torch.device) -> Callable[[], None]:
    """All logged calls one after another, on the weights, and for each layout on one tensor of random data."""

    @functools.cache
    def random(layout: tuple[Any, ...]) -> Tensor:
        shape, stride, dtype, _ = layout
        # Of an expanded tensor several elements are one.
        elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        return torch.randn(elements, dtype=dtype, device=device).as_strided(shape, stride)

    def filled(part: Any, place: int) -> Any:
        return random((*part, place)) if isinstance(part, Layout) else part

    calls = [
        functools.partial(func, *(filled(part, place) for place, part in enumerate(args)), **kwargs)
        for func, args, kwargs in log.calls
    ]

    def run() -> None:
        for call in calls:
            call()

    return run
