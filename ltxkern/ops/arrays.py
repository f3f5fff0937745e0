"""Arrays of other libraries as arguments of the functional ops: NumPy on the CPU, CuPy, and all that speak DLPack, with no copy."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def is_array(value: object) -> bool:
    """Whether the value is an array that is no tensor."""
    return hasattr(type(value), "__dlpack__") and not isinstance(value, Tensor)


def through_torch(function: Callable[..., Any], local: Mapping[str, Any]) -> Any:
    """A call on arrays, the kind of the first argument handed back; tensors among them stay what they are.

    Args:
        function: an op's public function.
        local: its arguments by name, and what else it has made by now; the first argument is an array, or a list of them.
    Returns:
        `out` where it is given, else arrays of the first one's kind in the memory of the results.
    Raises:
        TypeError, ValueError: an array that torch cannot take, or whose library takes nothing back; each names the parameter.
    """
    given = {name: local[name] for name in inspect.signature(function).parameters}
    name, first = next(iter(given.items()))
    hand_back = _hand_back(name, first[0] if isinstance(first, (list, tuple)) else first)
    result = function(**{name: _taken(name, value) for name, value in given.items()})
    returned = _mapped(hand_back, result)
    # What came of `out` was handed back all the same: by that a library's own stream waits for torch's.
    return returned if given["out"] is None else given["out"]


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(_mapped(change, one) for one in value) if isinstance(value, (list, tuple)) else change(value)


def _taken(name: str, value: Any) -> Any:
    """The argument with tensors in the place of arrays, in their memory."""

    def tensor(array: Any) -> Any:
        if not is_array(array):
            return array
        if not _is_numpy(array):
            return torch.from_dlpack(array)
        awkward = not array.flags.writeable or any(stride < 0 for stride in array.strides)
        if awkward and name == "out":
            raise ValueError(
                "out must be writable and lie forwards in memory, got an array that does not: use out.copy()"
            )
        try:
            return torch.from_numpy(array.copy() if awkward else array)
        except TypeError as error:
            raise TypeError(
                f"{name} must be of a dtype that torch has, got {array.dtype}: use {name}.astype(float)"
            ) from error

    # Sizes of Python's own lists are no arrays, and None stays.
    return _mapped(tensor, value) if is_array(value) or isinstance(value, (list, tuple)) else value


def _is_numpy(array: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(array, numpy.ndarray)


def _hand_back(name: str, model: Any) -> Callable[[Tensor], Any]:
    """How a tensor becomes an array of the model's kind."""
    if _is_numpy(model):
        return Tensor.numpy
    homes = (
        model.__array_namespace__() if hasattr(model, "__array_namespace__") else None,
        sys.modules.get(type(model).__module__.partition(".")[0]),
        type(model),
    )
    for home in homes:
        taker: Callable[[Tensor], Any] | None = getattr(home, "from_dlpack", None)
        if taker is not None:
            return taker
    raise TypeError(
        f"{name} must be of a library that takes arrays by from_dlpack, got {type(model).__name__}: use torch.from_dlpack({name})"
    )
