"""What a benchmark measures: cases (named shapes), calls (inputs and functions of one case) and suites (the cases of one op)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
CASE_SETS = ("small", "all", "large", "all-large")

# Correctness needs the inputs, both outputs and a few temporaries in fp64 beside what is timed.
FP64_COPIES = 6


@dataclass(frozen=True)
class Case:
    """One named shape of an op.

    Args:
        name: as on the command line and in the results.
        shape: of the main tensor; only for the table and the memory estimate.
        size: "small" runs anywhere in seconds, "medium" wants a GPU or patience, "large" wants a large GPU.
        options: what else the suite's `prepare` needs to know.
    """

    name: str
    shape: tuple[int, ...]
    size: str = "medium"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Call:
    """Inputs of one case and the functions that may be timed on them.

    Args:
        args: tensors, sequences of tensors and plain values; a provider is called as `function(*args)`.
        op: the toolkit's public function on these arguments.
        composition: the torch composition that the op replaces. In the model's dtype it is the eager baseline and what
            torch.compile compiles; on fp64 copies of the arguments it is the reference of record.
        other: further baselines by name, called like `composition`.
        peers: functions of other libraries by name; each entry imports its library when called, and may raise ImportError.
        changes: indices of the arguments that a call changes in place; their first one is the result.
        flops: of one call, where the op is a matrix product.
        reads: how many bytes of the arguments one call must read, where it is not all of them.
    """

    args: tuple[Any, ...]
    op: Callable[..., Any]
    composition: Callable[..., Any]
    other: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    peers: Mapping[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    changes: tuple[int, ...] = ()
    flops: int = 0
    reads: int | None = None


@dataclass(frozen=True)
class Suite:
    """All cases of one op.

    Args:
        op: stem of the op's files.
        cases: in the order of the table.
        prepare: builds a case's call, `prepare(case, dtype, device, generator)`.
        dtypes: what it runs in unless told otherwise; an op whose tensors have one fixed dtype names only that.
        allowed_dtypes: what `--dtypes` may ask of it.
        cpu_dtypes: instead of `dtypes` on a CPU; torch's bf16 matrix product is not vectorised on most of them.
        contract: "exact" or "rounded", as the op's docstring says.
    """

    op: str
    cases: Sequence[Case]
    prepare: Callable[[Case, torch.dtype, torch.device, torch.Generator], Call]
    dtypes: tuple[str, ...] = ("bf16",)
    allowed_dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    cpu_dtypes: tuple[str, ...] | None = None
    contract: str = "rounded"

    def default_dtypes(self, device: torch.device) -> tuple[str, ...]:
        """What runs where `--dtypes` says nothing."""
        return self.cpu_dtypes if device.type == "cpu" and self.cpu_dtypes is not None else self.dtypes


def select_cases(suite: Suite, wanted: str) -> list[Case]:
    """The cases a `--cases` value names: small, all (all but large), large, all-large, or names separated by commas.

    Raises:
        ValueError: a name the suite does not have.
    """
    if wanted == "all-large":
        return list(suite.cases)
    if wanted in CASE_SETS:
        return [case for case in suite.cases if case.size == wanted or (wanted == "all" and case.size != "large")]
    return named_cases(suite.op, suite.cases, wanted)


def named_cases(op: str, cases: Sequence[Case], wanted: str) -> list[Case]:
    """Those that a list of names has, commas between.

    Raises:
        ValueError: no such name, or none at all.
    """
    by_name = {case.name: case for case in cases}
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if name not in by_name]
    if unknown or not names:
        missing = ", ".join(unknown) or repr(wanted)
        raise ValueError(
            f"--cases: {op} has no case {missing}; it has {', '.join(by_name)}, or use {', '.join(CASE_SETS)}"
        )
    return [by_name[name] for name in names]


def needed_bytes(case: Case, dtype: torch.dtype) -> int:
    """Memory one case wants: two rotated sets of input, residual and output, and the fp64 check."""
    return case.numel * (2 * 3 * dtype.itemsize + FP64_COPIES * 8)


def normal(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Callable[..., Tensor]:
    """`random(*shape)`: standard normal values, drawn in fp32."""
    return lambda *shape: torch.randn(*shape, device=device, dtype=torch.float32, generator=generator).to(dtype)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, sequences entered."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with `change` applied to every tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map_tensors(item, change) for item in value)
    if isinstance(value, list):
        return [map_tensors(item, change) for item in value]
    return value


def in_fp64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of the reference of record: floating tensors in fp64, the rest as it is."""
    return map_tensors(args, lambda t: t.double() if t.is_floating_point() else t)


def clone_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments in fresh memory, strides kept."""
    return map_tensors(args, lambda t: t.clone(memory_format=torch.preserve_format))


def count_bytes(value: Any) -> int:
    """Bytes behind the distinct elements of the tensors in a value; expanded dimensions count once."""
    total = 0
    for tensor in tensors_of(value):
        sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        total += math.prod(sizes) * tensor.element_size()
    return total


def result_of(call: Call, args: tuple[Any, ...], returned: Any) -> list[Tensor]:
    """Output tensors of one call: what it returned, or the argument it changed."""
    return list(tensors_of(args[call.changes[0]] if call.changes else returned))


def floor_bytes(call: Call, outputs: Sequence[Tensor]) -> int:
    """The least traffic of one call: every input read once, every output written once."""
    return (count_bytes(call.args) if call.reads is None else call.reads) + count_bytes(list(outputs))
