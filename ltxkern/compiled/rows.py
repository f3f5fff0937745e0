"""Launch geometry of the transformer's row kernels: modulated RMSNorm, gated residual, head gate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled.programs import THREADS, program
from ltxkern.compiled.steps import Argument, Call, Launch, Parameter, divider, float_bits, nested
from ltxkern.compiled.tensors import CODED, CUDA_NAMES, PARAM_CODES, aligned16, param_code
from ltxkern.layout import RowView, ceil_div, dense, hand_back, power_of_two, round_up, row_view, with_tables

if TYPE_CHECKING:
    from ltxkern.ops.gated_residual import HeadGateArguments, ResidualArguments
    from ltxkern.ops.rms_norm_modulate import Arguments, GatedArguments, TwiceArguments


# Packs of 16 bytes of x that a warp has of a row in the kernels that know their dtypes, 4 a thread: rows of whole warps go there.
WARP_PACKS = 128
# Elements of one access of the kernels that look at dtypes as they run, at most: more would not fit the registers.
WIDEST = 4
_FP32 = PARAM_CODES[torch.float32]


class Operand(NamedTuple):
    """An operand over the rows of x: its type code, and its strides between rows in elements."""

    code: int
    outer: int
    inner: int


class RowIndex(NamedTuple):
    """A row index: bytes of one, rows of the tables that it points into, its strides between rows of x in elements."""

    itemsize: int
    table_rows: int
    outer: int
    inner: int


class Case(NamedTuple):
    """Everything of a call that its launches depend on.

    Attributes:
        operands: x first; None where an operand is absent.
        row_index: which row of its tables a row of x takes; None where scale, shift and gate are no tables.
        column: stride of the gate along a row, for the gated residual.
        vector: elements of a thread's access.
    """

    operands: tuple[Operand | None, ...]
    rows: int
    inner: int
    width: int
    vector: int
    eps: float = 0.0
    weight_code: int | None = None
    column: int = 0
    row_index: RowIndex | None = None

    @property
    def packs(self) -> int:
        """Of a row."""
        return self.width // self.vector


def _fields(case: Case, names: Sequence[str], index: Argument) -> dict[str, Parameter]:
    """The operands by name, then the row index, which is the tensor `index`."""
    fields: dict[str, Parameter] = {}
    for at, (name, operand) in enumerate(zip(names, case.operands, strict=True)):
        code, outer, inner = operand or Operand(0, 0, 0)
        data = None if operand is None else Argument(at)
        fields |= nested(name, data=data, type=code, outer_stride=outer, inner_stride=inner)
    itemsize, count, outer, inner = case.row_index or RowIndex(0, 0, 0, 0)
    data = None if case.row_index is None else index
    return fields | nested("index", data=data, bytes=itemsize, count=count, outer_stride=outer, inner_stride=inner)


def vector_of(itemsize: int, width: int, tensors: Sequence[Tensor | None], strides: list[int]) -> int:
    """Elements of one access: 16 bytes of x where widths, strides and addresses of all operands allow it, else one."""
    vector = 16 // itemsize
    fits = aligned16(*tensors) and all(size % vector == 0 for size in (width, *strides))
    return vector if fits else 1


def type_names(activation: int, others: Iterable[int]) -> str | None:
    """Template arguments of a kernel that knows its dtypes, where there is one: all others of x's dtype, or all in fp32."""
    (other, *different) = set(others)
    if different or other not in (activation, _FP32):
        return None
    return f"{CUDA_NAMES[CODED[activation]]}, {CUDA_NAMES[CODED[other]]}"


def _reach(case: Case, operand: Operand | None, is_table: bool = False) -> int:
    """Elements from an operand's first to behind its last."""
    if operand is None:
        return 0
    outer, inner = case.rows // case.inner, case.inner
    if is_table and case.row_index is not None:
        outer, inner = 1, case.row_index.table_rows
    return (outer - 1) * operand.outer + (inner - 1) * operand.inner + case.width


def _small(case: Case, tables: int) -> bool:
    """Whether 32 bits count all rows, indices, and packs of operands; those from the `tables`-th on may be tables."""
    index = case.row_index
    indices = 0 if index is None else _reach(case, Operand(0, index.outer, index.inner))
    reach = max(_reach(case, operand, at >= tables) for at, operand in enumerate(case.operands))
    packs = max(reach // case.vector, case.rows * case.packs)
    return max(packs, indices) < 1 << 32 and case.rows < 1 << 31


def _in_packs(case: Case, strided: int) -> Case:
    """The case with the width and the strides of its first `strided` operands in packs."""
    operands = [
        operand and Operand(operand.code, operand.outer // case.vector, operand.inner // case.vector)
        for operand in case.operands[:strided]
    ]
    return case._replace(operands=(*operands, *case.operands[strided:]), width=case.packs)


# Order of the tensors of rms_norm_modulate: operands, weight, sum, out, the second out, index.
WEIGHT, SUMMED, NORM_OUT, NORM_OUT2, NORM_INDEX = (Argument(i) for i in range(7, 12))
NORM_OPERANDS = ("x", "y", "scale", "shift", "gate", "scale2", "shift2")
NORM_ARGUMENTS = 12


def _norm_parameters(case: Case) -> dict[str, Parameter]:
    return {
        **_fields(case, NORM_OPERANDS, NORM_INDEX),
        **{
            "weight": WEIGHT,
            "weight_type": case.weight_code or 0,
            "summed": SUMMED,
            "out": NORM_OUT,
            "out2": NORM_OUT2,
        },
        **{"rows": case.rows, "inner": case.inner, "width": case.width, "eps": case.eps},
    }


def norm_steps(case: Case, threads: int = THREADS) -> list[Launch]:
    """One block a row: the whole of it in registers where it fills warps, else of no more threads than the row has packs."""
    x, _, *modulation = case.operands
    assert x is not None
    names = type_names(x.code, [operand.code for operand in modulation if operand])
    block, rest = divmod(case.packs * 32, WARP_PACKS)
    whole = case.vector > 1 and rest == 0 and block % 32 == 0 and block <= threads and case.weight_code is None
    if whole and names and _small(case, tables=2):
        parameters = _norm_parameters(_in_packs(case, len(case.operands)))
        parameters |= {"by_inner": divider(case.inner)}
        parameters |= {"inverse_width": float_bits(1.0 / case.width), "least": float_bits(case.eps)}
        gated = "false" if case.operands[1] is None else "true"
        return [Launch(f"ltxk::rms_norm_modulate_packs<{names}, {gated}>", (case.rows,), block, parameters)]
    vector = min(case.vector, WIDEST)
    block = min(threads, max(32, round_up(ceil_div(case.width, vector), 32)))
    return [Launch(f"ltxk::rms_norm_modulate_rows<{vector}>", (case.rows,), block, _norm_parameters(case))]


def norm_calls(case: Case) -> list[Call]:
    """The CPU kernel's call."""
    return [Call("rms_norm_modulate_rows", _norm_parameters(case))]


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where its last dim is not dense."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def collapsed(operands: Sequence[Tensor | None]) -> tuple[list[Any], RowView]:
    """Operands with dense rows whose leading dims collapse to two, by copies where they do not; x is the first."""
    given = [None if tensor is None else dense_rows(tensor) for tensor in operands]
    x = given[0]
    assert x is not None
    view = row_view(x, *(x if tensor is None else tensor for tensor in given[1:]))
    if view is None:
        given = [
            None if tensor is None else tensor.expand(*x.shape[:-1], tensor.shape[-1]).contiguous() for tensor in given
        ]
        x = given[0]
        assert x is not None
        view = row_view(x, *(x if tensor is None else tensor for tensor in given[1:]))
    assert view is not None
    return given, view


def _operand(tensor: Tensor | None, strides: tuple[int, int]) -> Operand | None:
    return None if tensor is None else Operand(param_code(tensor), *strides)


def check_range(rows: Tensor, count: int, name: str = "rows") -> None:
    """Every index names one of `count` rows. On a device that would be a wait for it, so only host tensors are looked at.

    Raises:
        ValueError: the least or the largest one does not.
    """
    # A tensor that traces has no values, and one under vmap may not be read; torch's own lookup checks the latter.
    if type(rows) is not Tensor or not rows.is_cpu or rows.numel() == 0 or torch._C._functorch.is_batchedtensor(rows):
        return
    least, most = (int(value) for value in rows.aminmax())
    if least < 0 or most >= count:
        wrong = least if least < 0 else most
        raise ValueError(f"{name} must be at least 0 and below {count}, the number of rows of the tables, got {wrong}")


def table_rows(table: Tensor, x: Tensor) -> Tensor:
    """A table with dense rows; a copy where its rows lie so that no 16-byte access of x's elements would meet them.

    A fresh table has such rows: by them the order of the sums, and so the bits, are those of materialised rows.
    """
    table = dense_rows(table)
    vector = 16 // x.element_size()
    if x.shape[-1] % vector or (aligned16(table) and table.stride(0) % vector == 0):
        return table
    return table.clone(memory_format=torch.contiguous_format)


def lay_out(
    tier: str, over_x: Sequence[Tensor | None], modulation: Sequence[Tensor | None], rows: Tensor | None
) -> tuple[list[Any], RowView, Tensor | None, RowIndex | None]:
    """Operands as the kernels take them, copied where they do not lie so.

    Args:
        tier: whose kernels.
        over_x: x and what else lies over its rows.
        modulation: over the rows of x too, or tables (N, D) with `rows`.
        rows: the row index into the tables.
    Returns:
        All operands; their view, in which a table has strides (0, between rows); the index, and how it lies.
    """
    if rows is None:
        return *collapsed([*over_x, *modulation]), None, None
    x = over_x[0]
    assert x is not None
    tables = [
        None if table is None else dense_rows(table) if tier == "cpu" else table_rows(table, x) for table in modulation
    ]
    count = next(table.shape[0] for table in tables if table is not None)
    if tier == "cpu":
        check_range(rows, count)
    (*given, index), view = collapsed([*over_x, rows[..., None]])
    *strides, own = with_tables(view, tables).strides
    row_index = RowIndex(rows.element_size(), count, *own)
    return [*given, *tables], view._replace(strides=tuple(strides)), index, row_index


def _run_norm(tier: str, outputs: Sequence[Tensor], args: Arguments | GatedArguments | TwiceArguments) -> None:
    """`outputs`: the norm, the sum where there is one, the second norm where there is one."""
    x, weight = args.x, args.weight
    if x.numel() == 0:
        return
    y, gate, scale2, shift2 = (getattr(args, name, None) for name in ("y", "gate", "scale2", "shift2"))
    given, view, index, row_index = lay_out(tier, [x, y], [args.scale, args.shift, gate, scale2, shift2], args.rows)
    targets = dense(outputs)
    weight = None if weight is None else weight.contiguous()
    operands = tuple([_operand(tensor, strides) for tensor, strides in zip(given, view.strides, strict=True)])
    strides = [stride for pair in view.strides for stride in pair]
    vector = vector_of(x.element_size(), x.shape[-1], [*given, weight, *targets], strides)
    sizes = (view.outer * view.inner, view.inner, x.shape[-1], vector)
    weight_code = None if weight is None else param_code(weight)
    case = Case(operands, *sizes, float(args.eps), weight_code, row_index=row_index)
    out, summed, out2 = (*targets, None, None)[:3]
    program(tier, norm_calls if tier == "cpu" else norm_steps, case, NORM_ARGUMENTS)(
        *given, weight, summed, out, out2, index
    )
    hand_back(outputs, targets)


def rms_norm_modulate(tier: str, out: Tensor, args: Arguments) -> None:
    """rms_norm_modulate on rows that collapse to two dims."""
    _run_norm(tier, [out], args)


def gated_norm(tier: str, out: tuple[Tensor, Tensor], args: GatedArguments) -> None:
    """gated_residual_rms_norm_modulate: out is (sum, norm)."""
    _run_norm(tier, [out[1], out[0]], args)


def gated_norm_twice(tier: str, out: tuple[Tensor, Tensor, Tensor], args: TwiceArguments) -> None:
    """gated_residual_rms_norm_modulate_twice: out is (sum, norm, second norm)."""
    _run_norm(tier, [out[1], out[0], out[2]], args)


GATE_OUT, GATE_INDEX = Argument(3), Argument(4)
GATE_ARGUMENTS = 5


def _gate_parameters(case: Case) -> dict[str, Parameter]:
    return {
        **_fields(case, ("x", "y", "gate"), GATE_INDEX),
        **{"gate_column": case.column, "out": GATE_OUT},
        **{"rows": case.rows, "inner": case.inner, "width": case.width},
    }


def _packed_gate(case: Case, threads: int) -> Launch | None:
    """The launch of a kernel that knows its dtypes, or None where there is none: rows of whole warps, or whole warps of heads."""
    x, y, gate = case.operands
    assert x is not None
    assert gate is not None
    names, packs = type_names(x.code, [gate.code]), case.rows * case.packs
    # A head has one gate, so only what lies over x is counted in packs.
    kernel, share, strided = ("gated_residual", case.packs // WARP_PACKS, 3) if y else ("head_gate", case.packs, 2)
    whole = case.vector > 1 and (case.packs if y else packs) % WARP_PACKS == 0 and case.column == (1 if y else 0)
    if not whole or names is None or packs >= 1 << 31 or not _small(case, tables=2):
        return None
    if y is None and _reach(case, gate) >= 1 << 32:
        return None
    parameters = _gate_parameters(_in_packs(case, strided)) | {
        "by_inner": divider(case.inner),
        "by_share": divider(share),
    }
    blocks = ceil_div(packs // WARP_PACKS, threads // 32)
    return Launch(f"ltxk::{kernel}_packs<{names}>", (blocks,), threads, parameters)


def gate_steps(case: Case, threads: int = THREADS) -> list[Launch]:
    """Short rows share a block, long ones take several side by side; rows of whole warps know no blocks."""
    if packed := _packed_gate(case, threads):
        return [packed]
    vector = min(case.vector, WIDEST)
    row_threads = min(threads, power_of_two(ceil_div(case.width, vector)))
    tiles = ceil_div(case.width, row_threads * vector)
    groups = ceil_div(case.rows, threads // row_threads)
    parameters = {**_gate_parameters(case), "row_threads": row_threads, "tiles": tiles}
    return [Launch(f"ltxk::gated_residual_rows<{vector}>", (groups * tiles,), threads, parameters)]


def gate_calls(case: Case) -> list[Call]:
    """The CPU kernel's call."""
    return [Call("gated_residual_rows", _gate_parameters(case))]


def _run_gate(tier: str, out: Tensor, x: Tensor, y: Tensor | None, gate: Tensor, rows: Tensor | None = None) -> None:
    if x.numel() == 0:
        return
    given, view, index, row_index = lay_out(tier, [x, y], [gate], rows)
    width, gate = x.shape[-1], given[2]
    (target,) = dense([out])
    column = gate.stride(-1) if y is not None and gate.shape[-1] == width else 0
    operands = tuple([_operand(tensor, strides) for tensor, strides in zip(given, view.strides, strict=True)])
    strides = [stride for pair in view.strides[: 3 if column else 2] for stride in pair]
    aligned = [*given[:2], target, gate if column else None]
    vector = vector_of(x.element_size(), width, aligned, [*strides, 0 if column in (0, 1) else 1])
    case = Case(operands, view.outer * view.inner, view.inner, width, vector, column=column, row_index=row_index)
    program(tier, gate_calls if tier == "cpu" else gate_steps, case, GATE_ARGUMENTS)(*given, target, index)
    hand_back([out], [target])


def gated_residual(tier: str, out: Tensor, args: ResidualArguments) -> None:
    """gated_residual on rows that collapse to two dims."""
    x, y, gate, rows = args
    gate = gate.reshape(1) if gate.dim() == 0 else gate
    if x.dim() == 0:
        x, y, out = x.reshape(1), y.reshape(1), out.view(1)
    _run_gate(tier, out, x, y, gate, rows)


def head_gate(tier: str, out: Tensor, args: HeadGateArguments) -> None:
    """head_gate: a row is one head."""
    _run_gate(tier, out, args.x, None, args.logits[..., None])
