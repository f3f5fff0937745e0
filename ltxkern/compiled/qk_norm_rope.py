"""Launch geometry of query and key RMSNorm with rotary embedding: one block a token and tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ltxkern.compiled.programs import THREADS, program
from ltxkern.compiled.rows import WARP_PACKS, WIDEST, dense_rows, type_names, vector_of
from ltxkern.compiled.steps import Argument, Call, Launch, Parameter, divider, nested
from ltxkern.compiled.tensors import param_code
from ltxkern.layout import ceil_div, dense, hand_back, round_up

if TYPE_CHECKING:
    from ltxkern.ops.qk_norm_rope import Arguments

Q, K, Q_WEIGHT, K_WEIGHT, COS, SIN, Q_OUT, K_OUT = (Argument(i) for i in range(8))
ARGUMENTS = 8


class Case(NamedTuple):
    """Everything of a call that its launches depend on; strides in elements, those of the tables by batch, head, token and pair."""

    type_code: int
    weight_codes: tuple[int, int]
    table_code: int
    strides: tuple[tuple[int, int], tuple[int, int]]
    table_strides: tuple[int, int, int, int]
    batch: int
    tokens: int
    heads: int
    pairs: int
    interleaved: bool
    eps: float
    vector: int


def _parameters(case: Case) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    for index, (x, weight, out) in enumerate(((Q, Q_WEIGHT, Q_OUT), (K, K_WEIGHT, K_OUT))):
        batch, token = case.strides[index]
        lies = {"weight_type": case.weight_codes[index], "batch_stride": batch, "token_stride": token}
        parameters |= nested(f"tensor[{index}]", x=x, weight=weight, out=out, **lies)
    batch, head, token, pair = case.table_strides
    return {
        **parameters,
        **{"cos": COS, "sin": SIN, "type": case.type_code, "table_type": case.table_code},
        **{"table_batch": batch, "table_head": head, "table_token": token, "table_pair": pair},
        **{"batch": case.batch, "tokens": case.tokens, "heads": case.heads, "pairs": case.pairs},
        **{"interleaved": int(case.interleaved), "eps": case.eps},
    }


def _in_packs(case: Case) -> Case:
    """The case with strides and pairs in packs."""
    vector = case.vector
    (q_batch, q_token), (k_batch, k_token) = case.strides
    batch, head, token, pair = case.table_strides
    return case._replace(
        strides=((q_batch // vector, q_token // vector), (k_batch // vector, k_token // vector)),
        table_strides=(batch // vector, head // vector, token // vector, pair),
        pairs=case.pairs // vector,
    )


def _small(case: Case) -> bool:
    """Whether 32 bits count the tokens, and the packs of every tensor; a case in packs."""
    batch, tokens, width = case.batch, case.tokens, 2 * case.heads * case.pairs
    of_x = [(batch - 1) * x_batch + (tokens - 1) * x_token + width for x_batch, x_token in case.strides]
    extents = (batch, case.heads, tokens, 1)
    of_table = (
        sum((extent - 1) * stride for extent, stride in zip(extents, case.table_strides, strict=True)) + case.pairs
    )
    return batch * tokens < 1 << 30 and max(*of_x, of_table, batch * tokens * width) < 1 << 32


def _packed(case: Case, threads: int) -> Launch | None:
    """The launch of the kernel that knows its dtypes, for tokens of whole warps and heads that fill a warp; None for others."""
    names = type_names(case.type_code, [case.table_code])
    if case.vector == 1 or names is None or case.weight_codes != (case.type_code, case.type_code):
        return None
    packs = _in_packs(case)
    width = 2 * packs.heads * packs.pairs
    block = width // WARP_PACKS * 32
    if 32 % packs.pairs or width % WARP_PACKS or not 0 < block <= threads or not _small(packs):
        return None
    parameters = _parameters(packs) | {"by_tokens": divider(case.tokens), "pairs_log2": packs.pairs.bit_length() - 1}
    parameters |= {"inverse_width": 1.0 / (2 * case.heads * case.pairs)}
    return Launch(f"ltxk::qk_norm_rope_packs<{names}>", (2 * case.batch * case.tokens,), block, parameters)


def device_steps(case: Case, threads: int = THREADS) -> list[Launch]:
    """q and k of a token in neighbouring blocks, whole in their registers or of no more threads than a token has packs."""
    if packed := _packed(case, threads):
        return [packed]
    vector = min(case.vector, WIDEST)
    block = min(threads, max(32, round_up(ceil_div(2 * case.heads * case.pairs, vector), 32)))
    grid = (2 * case.batch * case.tokens,)
    return [Launch(f"ltxk::qk_norm_rope<{vector}>", grid, block, _parameters(case))]


def cpu_calls(case: Case) -> list[Call]:
    """The CPU kernel's call."""
    return [Call("qk_norm_rope", _parameters(case))]


def run(tier: str, out: tuple[Tensor, Tensor], args: Arguments) -> None:
    """One call on checked arguments."""
    if args.q.numel() == 0:
        return
    targets = dense(out)
    q, k, q_weight, k_weight = (
        dense_rows(args.q),
        dense_rows(args.k),
        args.q_weight.contiguous(),
        args.k_weight.contiguous(),
    )
    cos, sin = args.cos, args.sin
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    batch, tokens = q.shape[:2]
    heads, pairs = cos.shape[1], cos.shape[3]
    table = (cos.stride(0) if cos.shape[0] == batch else 0, cos.stride(1), cos.stride(2), cos.stride(3))
    strides = ((q.stride(0), q.stride(1)), (k.stride(0), k.stride(1)))
    vector = 1
    given = [q, k, q_weight, k_weight, cos, sin, *targets]
    if args.layout == "split" and (table[3] == 1 or pairs == 1):
        vector = vector_of(q.element_size(), pairs, given, [*strides[0], *strides[1], *table[:3]])
    case = Case(
        type_code=param_code(q),
        weight_codes=(param_code(q_weight), param_code(k_weight)),
        table_code=param_code(cos),
        strides=strides,
        table_strides=table,
        batch=batch,
        tokens=tokens,
        heads=heads,
        pairs=pairs,
        interleaved=args.layout == "interleaved",
        eps=args.eps,
        vector=vector,
    )
    program(tier, cpu_calls if tier == "cpu" else device_steps, case, ARGUMENTS)(*given)
    hand_back(out, targets)
