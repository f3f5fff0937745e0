"""How tensors lie in memory: what collapses to a few strides, and dense stand-ins for what kernels do not take as it lies.

Arrays of other libraries, NumPy's on the CPU, CuPy's and those of all that speak DLPack, become tensors in the same memory.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size` (1 for 0)."""
    return 1 << max(0, size - 1).bit_length()


def ceil_div(size: int, part: int) -> int:
    """Number of parts of `part` that cover `size`."""
    return -(-size // part)


def round_up(size: int, multiple: int) -> int:
    """Smallest multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def lie_side_by_side(first: Tensor, second: Tensor) -> bool:
    """Whether every element of a matrix has that of a second one behind it, and one aligned access has both."""
    (row, column), address, size = first.stride(), first.data_ptr(), first.element_size()
    behind = second.stride() == (row, column) and second.data_ptr() == address + size
    return behind and column == 2 and row % 2 == 0 and address % (2 * size) == 0


def fresh(model: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of the model's shape, in its dtype or in another."""
    return torch.empty_like(model, dtype=dtype, memory_format=torch.contiguous_format)


def like(result: Tensor, model: Tensor) -> Tensor:
    """`result` with the strides that `torch.empty_like(model)` has, copied only where they differ."""
    if result.is_contiguous() and model.is_contiguous():
        return result
    target = torch.empty_like(model, dtype=result.dtype)
    return result if result.stride() == target.stride() else target.copy_(result)


def dense(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, or contiguous stand-ins for those that are not."""
    return [output if output.is_contiguous() else fresh(output) for output in outputs]


def hand_back(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies stand-ins to the outputs that they stand for."""
    for output, target in zip(outputs, targets, strict=True):
        if target is not output:
            output.copy_(target)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a dense copy of it."""
    return None if tensor is None else tensor.contiguous()


class ChannelView(NamedTuple):
    """Strides of an (N, C, *) tensor seen as (N, C, S)."""

    batch: int
    channel: int
    position: int


def channel_view(x: Tensor) -> ChannelView | None:
    """`x` as (N, C, S), or None where the dims after the channels do not collapse to one stride."""
    position, extent = 1, 0
    for dim in range(x.dim() - 1, 1, -1):
        size, stride = x.shape[dim], x.stride(dim)
        if size == 1:
            continue
        if extent == 0:
            position = stride
        elif stride != extent:
            return None
        extent = size * stride
        if stride == 0:
            return None
    return ChannelView(x.stride(0), x.stride(1), position)


class RowView(NamedTuple):
    """Leading dims of several tensors collapsed to (outer, inner), with the pair of strides of each tensor."""

    outer: int
    inner: int
    strides: tuple[tuple[int, int], ...]


def row_view(x: Tensor, *others: Tensor) -> RowView | None:
    """The rows of x (its last dim is a row) and of tensors that broadcast to it; None where they do not collapse to two dims."""
    return _row_view(x.shape, tuple([(tensor.shape, tensor.stride()) for tensor in (x, *others)]))


def rows_of(
    over_x: Sequence[Tensor | None], modulation: Sequence[Tensor | None], index: Tensor | None
) -> RowView | None:
    """`row_view` of x (the first), what else lies over its rows, the modulation and its row index; what is absent lies as x does.

    With an index the modulation is tables (N, D), whose pairs of strides are (0, between rows).
    """
    x = over_x[0]
    assert x is not None
    present = [x if tensor is None else tensor for tensor in over_x[1:]]
    if index is None:
        return row_view(x, *present, *(x if tensor is None else tensor for tensor in modulation), x)
    view = row_view(x, *present, index[..., None])
    return None if view is None else with_tables(view, modulation)


def with_tables(view: RowView, tables: Sequence[Tensor | None]) -> RowView:
    """The view of x, other operands and a row index, with the pairs of tables (N, D) before that of the index."""
    pairs = [(0, 0 if table is None else table.stride(0)) for table in tables]
    return view._replace(strides=(*view.strides[:-1], *pairs, view.strides[-1]))


def _broadcast_strides(onto: tuple[int, ...], shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor of this shape once it is expanded."""
    if shape == onto:
        return strides
    own = [0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
    return (0,) * (len(onto) - len(own)) + tuple(own)


# A model has few layouts: the collapsing is worked out once for each.
@functools.lru_cache(maxsize=4096)
def _row_view(shape: tuple[int, ...], layouts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]) -> RowView | None:
    views = [_broadcast_strides(shape, *layout) for layout in layouts]
    dims: list[tuple[int, tuple[int, ...]]] = []
    for dim, size in enumerate(shape[:-1]):
        if size == 1:
            continue
        strides = tuple(view[dim] for view in views)
        if dims and all(
            before == stride * size if stride else before == 0
            for before, stride in zip(dims[-1][1], strides, strict=True)
        ):
            dims[-1] = (dims[-1][0] * size, strides)
        else:
            dims.append((size, strides))
    if len(dims) > 2:
        return None
    none = (1, (0,) * len(views))
    padded = [none] * (2 - len(dims)) + dims
    return RowView(padded[0][0], padded[1][0], tuple(zip(padded[0][1], padded[1][1], strict=True)))


def unit_rows(*tensors: Tensor) -> bool:
    """Whether the last dim of every tensor is dense."""
    return all(tensor.stride(-1) == 1 or tensor.shape[-1] == 1 for tensor in tensors)


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
