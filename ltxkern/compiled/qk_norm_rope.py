"""Launch geometry of query and key RMSNorm with rotary embedding: one block a token and tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled.programs import THREADS, program
from ltxkern.compiled.rows import WARP_PACKS, WIDEST, check_range, dense_rows, type_names, vector_of
from ltxkern.compiled.steps import Argument, Call, Launch, Parameter, divider, float_bits, nested
from ltxkern.compiled.tensors import PARAM_CODES, param_code
from ltxkern.layout import ceil_div, dense, hand_back, lie_side_by_side, round_up

if TYPE_CHECKING:
    from ltxkern.ops.qk_norm_rope import Arguments, RotaryTables

# Tensors of q, then of k: x, weight, cos, sin, rows, out.
PER_TENSOR = 6
ARGUMENTS = 2 * PER_TENSOR
_FP32, _FP32_BYTES = PARAM_CODES[torch.float32], 4
# Elements of cosines that a call may put beside their sines; larger tables have the kernel that takes them as they lie.
MOST_COPIED = 1 << 24


class TableView(NamedTuple):
    """How cos and sin lie, strides in elements.

    Attributes:
        strides: by batch, head, token and pair; of tables by coordinate "token" is a row, "pair" a column.
        table_rows: rows of tables by coordinate.
        rows_strides: of the rows that tokens have in those, by batch, axis and token.
    """

    strides: tuple[int, int, int, int]
    table_rows: int = 0
    rows_strides: tuple[int, int, int] = (0, 0, 0)


class Side(NamedTuple):
    """Queries or keys: strides in elements by batch and token."""

    weight_code: int
    tokens: int
    strides: tuple[int, int]
    table: TableView


class Case(NamedTuple):
    """Everything of a call that its launches depend on.

    Attributes:
        axes: coordinates of a token in tables by coordinate; 0 for tables by token.
        beside: whether tables of three coordinates have every sine behind its cosine, and one access has both.
        vector: elements of a thread's access.
    """

    type_code: int
    table_code: int
    sides: tuple[Side, Side]
    batch: int
    heads: int
    pairs: int
    axes: int
    beside: bool
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
        table = dict(zip(("table_batch", "table_head", "table_token", "table_pair"), side.table.strides, strict=True))
        by_axis = dict(zip(("rows_batch", "rows_axis", "rows_token"), side.table.rows_strides, strict=True))
        parameters |= nested(
            f"tensor[{index}]",
            **{"x": x, "weight": weight, "out": out, "cos": cos, "sin": sin, "rows": rows if case.axes else None},
            **{"weight_type": side.weight_code, **lies, "tokens": side.tokens, **table, **by_axis},
            table_rows=side.table.table_rows,
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


def _in_packs(case: Case) -> Case:
    """The case with strides and pairs in packs; tables of several coordinates are read by cosines with their sines."""
    vector = case.vector
    table_vector = vector if case.axes < 2 else 2

    def packed(side: Side) -> Side:
        batch, head, token, pair = side.table.strides
        lies = (batch // table_vector, head // table_vector, token // table_vector, pair)
        x_strides = (side.strides[0] // vector, side.strides[1] // vector)
        return side._replace(strides=x_strides, table=side.table._replace(strides=lies))

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
        b, head, token, _ = side.table.strides
        last = side.table.table_rows - 1 if case.axes else side.tokens - 1
        reach.append((batch - 1) * b + (case.heads - 1) * head + last * token + width * case.vector)
        rows_batch, rows_axis, rows_token = side.table.rows_strides
        reach.append((batch - 1) * rows_batch + case.axes * rows_axis + side.tokens * rows_token)
    return max(reach) < 1 << 32


def _packed(case: Case, threads: int) -> Launch | None:
    """The launch of the kernel that knows its dtypes, for tokens of whole warps and heads that fill a warp; None for others."""
    names = type_names(case.type_code, [case.table_code])
    if case.vector == 1 or names is None or any(side.weight_code != case.type_code for side in case.sides):
        return None
    if case.axes not in (0, 1, 3) or (case.axes == 3 and not case.beside):
        return None
    # A row that no table has is read as the first.
    if case.axes and (case.table_code != _FP32 or not all(side.table.table_rows for side in case.sides)):
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
        **{"inverse_width": float_bits(1.0 / (2 * case.heads * case.pairs)), "least": float_bits(case.eps)},
    }
    q, k = packs.sides
    parameters |= {"by_q_tokens": divider(max(1, q.tokens)), "by_k_tokens": divider(max(1, k.tokens))}
    # 32 packs of pairs on, a thread is at the same place of a later head.
    heads_on = 32 >> pairs_log2
    parameters |= {"q_table_step": heads_on * q.table.strides[1], "k_table_step": heads_on * k.table.strides[1]}
    # Of a warp's pairs, those of a pack of every thread.
    shared_bytes = 2 * _FP32_BYTES * case.vector * block if case.axes == 3 else 0
    return Launch(f"ltxk::qk_norm_rope_packs<{names}, {case.axes}>", (sum(case.rows),), block, parameters, shared_bytes)


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


def _tables(tables: RotaryTables, batch: int, pairs: int, *, beside: bool = False) -> tuple[Tensor, Tensor, TableView]:
    """Cosines and sines that lie alike, and how; on demand side by side, unless a copy would be large."""
    cos, sin, rows = tables
    if beside and not lie_side_by_side(cos, sin) and cos.numel() <= MOST_COPIED:
        cos, sin, _ = tables.side_by_side()
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    if rows is None:
        own, head, token, pair = cos.stride()
        return cos, sin, TableView((own if cos.shape[0] == batch else 0, head, token, pair))
    row, column = cos.stride()
    row_batch, row_axis, row_token = rows.stride()
    # Of one coordinate a head's pairs lie in a row one after another.
    head = pairs * column if rows.shape[1] == 1 else 0
    by_axis = (row_batch if rows.shape[0] == batch else 0, row_axis, row_token)
    return cos, sin, TableView((0, head, row, column), cos.shape[0], by_axis)


def run(tier: str, out: tuple[Tensor, Tensor], args: Arguments) -> None:
    """One call on checked arguments."""
    if args.q.numel() + args.k.numel() == 0:
        return
    if tier == "cpu" and args.rows is not None:
        check_rows(args)
    targets = dense(out)
    q, k, q_weight, k_weight = (
        dense_rows(args.q),
        dense_rows(args.k),
        args.q_weight.contiguous(),
        args.k_weight.contiguous(),
    )
    batch, tokens, width = q.shape
    heads = args.head_count
    pairs = width // (2 * heads)
    axes = 0 if args.rows is None else args.rows.shape[1]
    packs = tier != "cpu" and axes == 3 and args.layout == "split" and param_code(args.cos) == _FP32
    cos, sin, table = _tables(args.q_tables, batch, pairs, beside=packs)
    shared, of_k = args.k_cos is None, args.k_tables
    k_cos, k_sin, k_table = (cos, sin, table) if shared else _tables(of_k, batch, pairs, beside=packs)
    beside = axes == 3 and lie_side_by_side(cos, sin) and (shared or lie_side_by_side(k_cos, k_sin))
    q_strides, k_strides = (q.stride(0), q.stride(1)), (k.stride(0), k.stride(1))
    vector = 1
    if args.layout == "split":
        aligned, steps = [q, k, q_weight, k_weight, *targets], [*q_strides, *k_strides]
        # Tables of several coordinates need not be.
        if axes < 2:
            aligned += [cos, sin] if shared else [cos, sin, k_cos, k_sin]
            steps += [*table.strides[:3], *k_table.strides[:3]]
        if axes > 1 or pairs == 1 or table.strides[3] == k_table.strides[3] == 1:
            vector = vector_of(q.element_size(), pairs, aligned, steps)
    case = Case(
        type_code=param_code(q),
        table_code=param_code(cos),
        sides=(
            Side(param_code(q_weight), tokens, q_strides, table),
            Side(param_code(k_weight), k.shape[1], k_strides, k_table),
        ),
        batch=batch,
        heads=heads,
        pairs=pairs,
        axes=axes,
        beside=beside,
        interleaved=args.layout == "interleaved",
        eps=float(args.eps),
        vector=vector,
    )
    q_tensors = (q, q_weight, cos, sin, args.rows, targets[0])
    run_program = program(tier, cpu_calls if tier == "cpu" else device_steps, case, ARGUMENTS)
    run_program(*q_tensors, k, k_weight, k_cos, k_sin, of_k.rows, targets[1])
    hand_back(out, targets)
