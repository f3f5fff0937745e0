"""Launch geometry of query and key RMSNorm with rotary embedding: one block a token and tensor."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled.programs import THREADS, program
from ltxkern.compiled.rows import WARP_PACKS, WIDEST, check_range, dense_rows, type_names, vector_of
from ltxkern.compiled.steps import Argument, Call, Launch, Parameter, divider, nested
from ltxkern.compiled.tensors import PARAM_CODES, param_code
from ltxkern.layout import ceil_div, dense, hand_back, round_up

if TYPE_CHECKING:
    from ltxkern.ops.qk_norm_rope import Arguments, RotaryTables

# Tensors of q, then of k: x, weight, cos, sin, rows, out.
PER_TENSOR = 6
ARGUMENTS = 2 * PER_TENSOR
_FP32 = PARAM_CODES[torch.float32]


class Side(NamedTuple):
    """Queries or keys, strides in elements.

    Attributes:
        strides: of x, by batch and token.
        table_strides: of cos and sin, by batch, head, token and pair; of tables by coordinate "token" is a row, "pair" a column.
        table_rows: how many rows those have.
        rows_strides: of the rows of tables by coordinate, by batch, axis and token.
    """

    weight_code: int
    tokens: int
    strides: tuple[int, int]
    table_strides: tuple[int, int, int, int]
    table_rows: int
    rows_strides: tuple[int, int, int]


class Case(NamedTuple):
    """Everything of a call that its launches depend on.

    Attributes:
        axes: coordinates of a token in tables by coordinate; 0 for tables by token.
        vector: elements of a thread's access.
    """

    type_code: int
    table_code: int
    sides: tuple[Side, Side]
    batch: int
    heads: int
    pairs: int
    axes: int
    interleaved: bool
    eps: float
    vector: int

    @property
    def rows(self) -> tuple[int, int]:
        """Tokens of q and of k in all batch items."""
        return self.batch * self.sides[0].tokens, self.batch * self.sides[1].tokens

    @property
    def lead(self) -> int:
        """Places before the first pair, where axes do not divide the pairs."""
        return -(self.heads * self.pairs) % self.axes if self.axes else 0


def _parameters(case: Case) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    for index, side in enumerate(case.sides):
        x, weight, cos, sin, rows, out = (Argument(index * PER_TENSOR + i) for i in range(PER_TENSOR))
        lies = dict(zip(("batch_stride", "token_stride"), side.strides, strict=True))
        table = dict(zip(("table_batch", "table_head", "table_token", "table_pair"), side.table_strides, strict=True))
        by_axis = dict(zip(("rows_batch", "rows_axis", "rows_token"), side.rows_strides, strict=True))
        parameters |= nested(
            f"tensor[{index}]",
            **{"x": x, "weight": weight, "out": out, "cos": cos, "sin": sin, "rows": rows if case.axes else None},
            **{"weight_type": side.weight_code, **lies, "tokens": side.tokens, **table, **by_axis},
            table_rows=side.table_rows,
        )
    return {
        **parameters,
        **{"type": case.type_code, "table_type": case.table_code},
        **{"batch": case.batch, "heads": case.heads, "pairs": case.pairs, "axes": case.axes, "lead": case.lead},
        **{"interleaved": int(case.interleaved), "eps": case.eps},
    }


def _sharing(case: Case) -> dict[str, Parameter]:
    """How the blocks of a launch fall to queries and keys."""
    q_rows, k_rows = case.rows
    shared = min(q_rows, k_rows)
    return {"shared_rows": shared, "in_turn": 2 * shared, "longer": int(k_rows > q_rows)}


def _float_bits(value: float) -> int:
    """A number as the 32 bits of an fp32."""
    return ctypes.c_uint32.from_buffer(ctypes.c_float(value)).value


def _in_packs(case: Case) -> Case:
    """The case with strides and pairs in packs; tables of several coordinates are read element by element, and keep theirs."""
    vector = case.vector
    table_vector = vector if case.axes < 2 else 1

    def packed(side: Side) -> Side:
        batch, head, token, pair = side.table_strides
        table = (batch // table_vector, head // table_vector, token // table_vector, pair)
        return side._replace(strides=(side.strides[0] // vector, side.strides[1] // vector), table_strides=table)

    return case._replace(sides=(packed(case.sides[0]), packed(case.sides[1])), pairs=case.pairs // vector)


def _small(case: Case) -> bool:
    """Whether 32 bits count the tokens, the table rows' numbers, and the packs of every tensor; a case in packs."""
    batch, width = case.batch, 2 * case.heads * case.pairs
    if max(case.rows) >= 1 << 30:
        return False
    reach = [max(case.rows) * width]
    for side in case.sides:
        x_batch, x_token = side.strides
        reach.append((batch - 1) * x_batch + (side.tokens - 1) * x_token + width)
        b, head, token, _ = side.table_strides
        last = side.table_rows - 1 if case.axes else side.tokens - 1
        reach.append((batch - 1) * b + (case.heads - 1) * head + last * token + width * case.vector)
        rows_batch, rows_axis, rows_token = side.rows_strides
        reach.append((batch - 1) * rows_batch + case.axes * rows_axis + side.tokens * rows_token)
    return max(reach) < 1 << 32


def _packed(case: Case, threads: int) -> Launch | None:
    """The launch of the kernel that knows its dtypes, for tokens of whole warps and heads that fill a warp; None for others."""
    names = type_names(case.type_code, [case.table_code])
    if case.vector == 1 or names is None or any(side.weight_code != case.type_code for side in case.sides):
        return None
    if case.axes not in (0, 1, 3) or (case.axes and case.table_code != _FP32):
        return None
    packs = _in_packs(case)
    width = 2 * packs.heads * packs.pairs
    block = width // WARP_PACKS * 32
    if 32 % packs.pairs or width % WARP_PACKS or not 0 < block <= threads or not _small(packs):
        return None
    pairs_log2 = packs.pairs.bit_length() - 1
    parameters: dict[str, Parameter] = {
        **_parameters(packs),
        **{"lead": case.lead, **_sharing(case), "pairs_log2": pairs_log2, "width": width},
        **{"inverse_width": _float_bits(1.0 / (2 * case.heads * case.pairs)), "least": _float_bits(case.eps)},
    }
    q, k = packs.sides
    parameters |= {"by_q_tokens": divider(max(1, q.tokens)), "by_k_tokens": divider(max(1, k.tokens))}
    # 32 packs of pairs on, a thread is at the same place of a later head.
    heads_on = 32 >> pairs_log2
    parameters |= {"q_table_step": heads_on * q.table_strides[1], "k_table_step": heads_on * k.table_strides[1]}
    return Launch(f"ltxk::qk_norm_rope_packs<{names}, {case.axes}>", (sum(case.rows),), block, parameters)


def device_steps(case: Case, threads: int = THREADS) -> list[Launch]:
    """q and k of a token in neighbouring blocks, whole in their registers or of no more threads than a token has packs."""
    if packed := _packed(case, threads):
        return [packed]
    vector = min(case.vector, WIDEST)
    block = min(threads, max(32, round_up(ceil_div(2 * case.heads * case.pairs, vector), 32)))
    parameters = _parameters(case) | _sharing(case)
    parameters |= {"by_pairs": divider(case.pairs), "by_axes": divider(max(1, case.axes))}
    return [Launch(f"ltxk::qk_norm_rope<{vector}>", (sum(case.rows),), block, parameters)]


def cpu_calls(case: Case) -> list[Call]:
    """The CPU kernel's call."""
    return [Call("qk_norm_rope", _parameters(case))]


def check_rows(args: Arguments) -> None:
    """Every row that a token has on an axis is one of its tables'.

    Raises:
        ValueError: one on the host is not.
    """
    for name, (cos, _, rows) in (("rows", args.q_tables), ("k_rows", args.k_tables)):
        if rows is not None and (name == "rows" or args.k_cos is not None):
            check_range(rows, cos.shape[0], name)


def _side(x: Tensor, weight: Tensor, tables: RotaryTables, out: Tensor, heads: int) -> tuple[Side, list[Tensor | None]]:
    """Queries or keys as the kernels take them, and their tensors."""
    x, weight = dense_rows(x), weight.contiguous()
    cos, sin, rows = tables
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    if rows is None:
        own = cos.stride(0) if cos.shape[0] == x.shape[0] else 0
        table, count, by_axis = (own, cos.stride(1), cos.stride(2), cos.stride(3)), 0, (0, 0, 0)
    else:
        # Of one coordinate a head's pairs lie in a row one after another.
        step = x.shape[-1] // (2 * heads) * cos.stride(1)
        table, count = (0, step if rows.shape[1] == 1 else 0, cos.stride(0), cos.stride(1)), cos.shape[0]
        by_axis = (rows.stride(0) if rows.shape[0] == x.shape[0] else 0, rows.stride(1), rows.stride(2))
    side = Side(param_code(weight), x.shape[1], (x.stride(0), x.stride(1)), table, count, by_axis)
    return side, [x, weight, cos, sin, rows, out]


def _vector(case: Case, tensors: list[Tensor | None], itemsize: int) -> int:
    """Elements of one access; tables of several coordinates are read element by element, and need not be aligned."""
    strides: list[int] = []
    whole = case.axes < 2
    for side in case.sides:
        if whole and side.table_strides[3] != 1 and case.pairs > 1:
            return 1
        strides += [*side.strides, *(side.table_strides[:3] if whole else ())]
    read = (0, 1, 2, 3, 5) if whole else (0, 1, 5)
    aligned = [tensors[first + i] for first in (0, PER_TENSOR) for i in read]
    return vector_of(itemsize, case.pairs, aligned, strides)


def run(tier: str, out: tuple[Tensor, Tensor], args: Arguments) -> None:
    """One call on checked arguments."""
    if args.q.numel() + args.k.numel() == 0:
        return
    targets = dense(out)
    heads = args.head_count
    pairs = args.q.shape[-1] // (2 * heads)
    q, q_tensors = _side(args.q, args.q_weight, args.q_tables, targets[0], heads)
    k, k_tensors = _side(args.k, args.k_weight, args.k_tables, targets[1], heads)
    case = Case(
        type_code=param_code(args.q),
        table_code=param_code(args.cos),
        sides=(q, k),
        batch=args.q.shape[0],
        heads=heads,
        pairs=pairs,
        axes=0 if args.rows is None else args.rows.shape[1],
        interleaved=args.layout == "interleaved",
        eps=args.eps,
        vector=1,
    )
    if tier == "cpu":
        check_rows(args)
    given = [*q_tensors, *k_tensors]
    if args.layout == "split":
        case = case._replace(vector=_vector(case, given, args.q.element_size()))
    program(tier, cpu_calls if tier == "cpu" else device_steps, case, ARGUMENTS)(*given)
    hand_back(out, targets)
