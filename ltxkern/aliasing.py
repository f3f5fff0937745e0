"""Memory that tensors of one call share: an output may be an input where its op says so, and touches no other.

Decided on the host from addresses and strides. Meta tensors and tensors without elements have no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

# Steps of the exact search between two strided tensors; what takes more counts as an overlap.
SEARCH_STEPS = 10_000


class Written(NamedTuple):
    """A tensor that a call writes: its name in messages, and the names of the inputs that it may be."""

    name: str
    tensor: Tensor
    may_be: tuple[str, ...] = ()


class Read(NamedTuple):
    """A tensor that a call reads; it stands for the argument `parameter` in a list of what an output may be."""

    name: str
    tensor: Tensor
    parameter: str = ""


def span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one behind the last; (0, 0) without memory."""
    begin = tensor.data_ptr()
    if begin == 0:
        return 0, 0
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def same(one: Tensor, other: Tensor) -> bool:
    """Whether both have the same elements at the same places in memory."""
    if one is other:
        return True
    if one.data_ptr() != other.data_ptr() or one.dtype != other.dtype or one.shape != other.shape:
        return False
    pairs = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(n < 2 or stride == other_stride for n, stride, other_stride in pairs)


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether a byte belongs to both: two blocks of columns of one matrix do not overlap, though their spans do."""
    (begin, end), (other_begin, other_end) = span(one), span(other)
    if begin >= other_end or other_begin >= end:
        return False
    return (one.is_contiguous() and other.is_contiguous()) or _meet(one, other, begin - other_begin)


def _meet(one: Tensor, other: Tensor, distance: int) -> bool:
    """Whether `distance + sum_k i_k s_k - sum_k j_k t_k` comes within an element for some indices, strides in bytes.

    Dims of one stride are one unknown. Going from the largest stride down, what the rest can add leaves few values to try.
    """
    reach: dict[int, tuple[int, int]] = {}
    for tensor, sign in ((one, 1), (other, -1)):
        for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
            step = stride * tensor.element_size()
            low, high = reach.get(step, (0, 0))
            reach[step] = (low, high + n - 1) if sign > 0 else (low - n + 1, high)
    terms = sorted(((step, *ends) for step, ends in reach.items() if step), reverse=True)
    rest = [(1 - other.element_size(), one.element_size() - 1)]
    for step, low, high in reversed(terms):
        rest.append((rest[-1][0] + step * low, rest[-1][1] + step * high))
    rest.reverse()
    pending, tried = [(0, distance)], 0
    while pending:
        depth, distance = pending.pop()
        tried += 1
        if depth == len(terms) or tried > SEARCH_STEPS:
            return True
        step, low, high = terms[depth]
        rest_low, rest_high = rest[depth + 1]
        first, last = max(low, -((distance + rest_high) // step)), min(high, (-distance - rest_low) // step)
        pending += [(depth + 1, distance + step * n) for n in range(first, min(last, first + SEARCH_STEPS) + 1)]
    return False


def folded(tensor: Tensor) -> bool:
    """Whether elements of the tensor may share memory, as those of an expanded one do."""
    if tensor.is_contiguous():
        return False
    last = 0
    for stride, n in sorted((stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride <= last:
            return True
        last += stride * (n - 1)
    return False


def apart(written: Iterable[Tensor], read: Iterable[Tensor]) -> bool:
    """Whether the written tensors are contiguous and their spans meet neither each other nor a read tensor's."""
    spans = []
    for tensor in written:
        if not tensor.is_contiguous():
            return False
        begin = tensor.data_ptr()
        spans.append((begin, begin + tensor.nbytes, True))
    spans += [(*span(tensor), False) for tensor in read]
    spans.sort()
    last, last_written = 0, 0
    for begin, end, writes in spans:
        if begin < last_written or (writes and begin < last):
            return False
        last = max(last, end)
        if writes:
            last_written = max(last_written, end)
    return True


def check(written: Sequence[Written], read: Iterable[Read]) -> None:
    """Refuse outputs whose elements would be changed while they are still read, or written twice.

    Raises:
        ValueError: one sentence that names both tensors and says what to give.
    """
    for output in written:
        if folded(output.tensor):
            raise ValueError(
                f"{output.name} has elements that may share memory, shape {tuple(output.tensor.shape)} with strides "
                f"{output.tensor.stride()}: give memory of its own, as torch.empty makes it"
            )
    spans = [(*span(tensor), True, index) for index, (_, tensor, _) in enumerate(written)]
    inputs = list(read)
    spans += [(*span(tensor), False, index) for index, (_, tensor, _) in enumerate(inputs)]
    spans.sort()
    open_spans: list[tuple[int, int, bool, int]] = []
    for item in spans:
        begin, end, writes, index = item
        if begin == end:
            continue
        open_spans = [other for other in open_spans if other[1] > begin]
        for _, _, other_writes, other_index in open_spans:
            if writes and other_writes:
                _check_outputs(*sorted((written[index], written[other_index]), key=lambda output: output.name))
            elif writes or other_writes:
                _check_pair(*(written[index], inputs[other_index]) if writes else (written[other_index], inputs[index]))
        open_spans.append(item)


def _check_outputs(one: Written, other: Written) -> None:
    if share_memory(one.tensor, other.tensor):
        raise ValueError(f"{one.name} and {other.name} overlap: give each memory of its own")


def _check_pair(output: Written, given: Read) -> None:
    legal = given.parameter in output.may_be
    if (legal and same(output.tensor, given.tensor)) or not share_memory(output.tensor, given.tensor):
        return
    if legal:
        raise ValueError(f"{output.name} overlaps {given.name} in part: give {given.name} itself or memory of its own")
    raise ValueError(f"{output.name} overlaps {given.name}: give {output.name} memory of its own")


class Signature:
    """What an op reads and writes, for the check of its calls.

    Args:
        kinds: torch schema type of each argument of the op, by its name.
        may_be: for each output the arguments that it may be, element for element; of an op whose outputs are a list, for each of
            them in turn, once for every entry of its list arguments. None: the op changes its first argument.
    """

    def __init__(self, kinds: Mapping[str, str], may_be: Sequence[Sequence[str]] | None) -> None:
        tensors = [(index, name) for index, (name, kind) in enumerate(kinds.items()) if kind.startswith("Tensor")]
        self._in_place = may_be is None
        self._written_name = tensors[0][1] if self._in_place else "out"
        self._may_be = [tuple(names) for names in may_be or [()]]
        self._read = tensors[1:] if self._in_place else tensors

    def check(self, outputs: Sequence[Tensor], args: Sequence[Any]) -> None:
        """Refuse a call whose outputs overlap each other, or its inputs otherwise than `may_be` says.

        Raises:
            ValueError: see `check`.
        """
        bounds: list[tuple[int, int, int]] = []
        for number, output in enumerate(outputs):
            begin = output.data_ptr()
            end = begin + output.nbytes
            if not output.is_contiguous():
                return self._check_named(outputs, args)
            for other_begin, other_end, _ in bounds:
                if begin < other_end and other_begin < end:
                    return self._check_named(outputs, args)
            bounds.append((begin, end, number))
        for index, name in self._read:
            value = args[index]
            if value is None:
                continue
            if isinstance(value, Tensor):
                first = value.data_ptr()
                for begin, end, number in bounds:
                    meets = first < end and (first >= begin or span(value)[1] > begin)
                    if meets and (value is not outputs[number] or name not in self._may_be[number]):
                        return self._check_named(outputs, args)
                continue
            for entry, tensor in enumerate(value):
                if tensor is None:
                    continue
                first = tensor.data_ptr()
                for begin, end, number in bounds:
                    if first < end and (first >= begin or span(tensor)[1] > begin):
                        group, own = divmod(number, len(value))
                        if tensor is not outputs[number] or own != entry or name not in self._may_be[group]:
                            return self._check_named(outputs, args)
        return None

    def _check_named(self, outputs: Sequence[Tensor], args: Sequence[Any]) -> None:
        lists = [len(args[index]) for index, _ in self._read if isinstance(args[index], (list, tuple))]
        entries = lists[0] if lists and not self._in_place else 1
        read = []
        for index, name in self._read:
            value = args[index]
            listed = isinstance(value, (list, tuple))
            for entry, tensor in enumerate(value if listed else (value,)):
                if tensor is not None:
                    label = f"{name}[{entry}]" if listed and (entries > 1 or self._in_place) else name
                    read.append(Read(label, tensor, f"{name}[{entry}]"))
        written = []
        for index, tensor in enumerate(outputs):
            group, entry = divmod(index, entries)
            name = self._written_name
            name += f"[{group}]" if len(outputs) > entries else ""
            name += f"[{entry}]" if entries > 1 else ""
            written.append(Written(name, tensor, tuple(f"{parameter}[{entry}]" for parameter in self._may_be[group])))
        check(written, read)
