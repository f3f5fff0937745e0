"""RMSNorm of queries and keys over all heads together, then rotary position embedding."""

from typing import NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled import qk_norm_rope as launch
from ltxkern.dispatch import Op
from ltxkern.layout import fresh, power_of_two, through_torch, unit_rows
from ltxkern.ops import tiers
from ltxkern.ops.checks import (
    ACTIVATION_DTYPES,
    check_choice,
    check_device,
    check_finite_number,
    check_integer,
    check_like,
    check_out,
    check_pair,
    check_tensor,
    check_together,
    check_vector,
)

LAYOUTS = ("split", "interleaved")
NAMES, K_NAMES = ("cos", "sin", "rows"), ("k_cos", "k_sin", "k_rows")


class RotaryTables(NamedTuple):
    """Cosines and sines of positions: a row per token, or with `rows` a row per coordinate.

    By token cos and sin are (B or 1, heads, T, d / 2).

    By coordinate they are (N, ceil(heads * d / 2 / axes)), a row for each value that a coordinate takes, and `rows`, int32 of
    (B or 1, axes, T), says which row a token has on each axis. Pairs are counted over all heads and the axes take turns with them:
    the columns of a token's rows, one axis after another and then the next column, end with its last pair. Where axes do not
    divide the pairs, what is too many in front belongs to none. Of three axes the GPU kernels are quickest `side_by_side()`.
    """

    cos: Tensor
    sin: Tensor
    rows: Tensor | None = None

    def by_token(self, heads: int, pairs: int) -> tuple[Tensor, Tensor]:
        """The same numbers with a row per token, for heads of `pairs` pairs."""
        rows = self.rows
        if rows is None:
            return self.cos, self.sin

        def spread(table: Tensor) -> Tensor:
            # (B, axes, T, columns): a pair's axis changes first.
            taken = table[rows.long()].permute(0, 2, 3, 1).flatten(2)
            return taken[..., taken.shape[-1] - heads * pairs :].unflatten(-1, (heads, pairs)).transpose(1, 2)

        return spread(self.cos), spread(self.sin)

    def side_by_side(self) -> "RotaryTables":
        """The same numbers in one tensor (..., 2), each sine behind its cosine; cos and sin are views of it."""
        cos, sin = torch.stack((self.cos, self.sin), dim=-1).unbind(-1)
        return RotaryTables(cos, sin, self.rows)


class Arguments(NamedTuple):
    """q (B, T, heads * d), k (B, L, heads * d), their weights (heads * d,), and tables as `RotaryTables` has them."""

    q: Tensor
    k: Tensor
    q_weight: Tensor
    k_weight: Tensor
    cos: Tensor
    sin: Tensor
    eps: float
    layout: str
    rows: Tensor | None
    heads: int | None  # given with rows: tables by token have them as a dim
    k_cos: Tensor | None  # None: k has the tables of q
    k_sin: Tensor | None
    k_rows: Tensor | None

    @property
    def head_count(self) -> int:
        """How many heads."""
        return self.cos.shape[1] if self.heads is None else self.heads

    @property
    def q_tables(self) -> RotaryTables:
        """Of the queries."""
        return RotaryTables(self.cos, self.sin, self.rows)

    @property
    def k_tables(self) -> RotaryTables:
        """Of the keys."""
        if self.k_cos is None or self.k_sin is None:
            return self.q_tables
        return RotaryTables(self.k_cos, self.k_sin, self.k_rows)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Rotate pairs of a (B, T, heads, d) tensor by (B, heads, T, d/2) tables."""
    cos, sin = cos.float().transpose(1, 2), sin.float().transpose(1, 2)
    if layout == "split":
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


def _one(x: Tensor, weight: Tensor, tables: RotaryTables, args: Arguments) -> Tensor:
    heads = args.head_count
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + args.eps) * weight.float()
    cos, sin = tables.by_token(heads, x.shape[-1] // (2 * heads) if heads else 0)
    return rotate(y.unflatten(-1, (heads, -1)), cos, sin, args.layout).flatten(-2).to(x.dtype).contiguous()


def reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    layout: str,
    rows: Tensor | None = None,
    heads: int | None = None,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    k_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The composition in fp32 with one rounding."""
    args = Arguments(q, k, q_weight, k_weight, cos, sin, eps, layout, rows, heads, k_cos, k_sin, k_rows)
    launch.check_rows(args)
    return _one(q, q_weight, args.q_tables, args), _one(k, k_weight, args.k_tables, args)


def _refuse_triton(args: Arguments) -> str | None:
    heads = args.head_count
    padded = 2 * power_of_two(heads) * power_of_two(args.q.shape[-1] // max(1, 2 * heads))
    if padded > tiers.MAX_WIDTH:
        return (
            f"tokens of {args.q.shape[-1]}: the kernel keeps at most {tiers.MAX_WIDTH} padded elements in registers, "
            f"needs {padded}"
        )
    if not unit_rows(args.q, args.k):
        return "the last dim of q or k is not dense"
    for prefix, tables in (("", args.q_tables), ("k_", args.k_tables)):
        strides = tables.cos.stride(), tables.sin.stride()
        if strides[0] != strides[1]:
            names = f"{prefix}cos and {prefix}sin have strides {strides[0]} and {strides[1]}"
            return f"{names}: the kernel takes tables of one layout"
    return None


OP = Op(
    "qk_norm_rope",
    Arguments,
    "(Tensor, Tensor)",
    reference,
    lambda args: (fresh(args.q), fresh(args.k)),
    backends=[*tiers.compiled(launch.run), tiers.triton("qk_norm_rope", _refuse_triton)],
    may_be=[("q",), ("k",)],
    indices={"rows": "cos", "k_rows": "k_cos"},
)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    layout: str = "split",
    rows: Tensor | None = None,
    heads: int | None = None,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    k_rows: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys over the inner dim, then rotate them by position.

    `v rsqrt(mean(v^2) + eps) weight` over all heads; then per head, in split layout with halves (v1, v2):
    `(v1 cos - v2 sin, v2 cos + v1 sin)`; in interleaved layout the pairs are neighbours.

    Args:
        q, k: (B, T, heads * d) and (B, L, heads * d), fp16, bf16 or fp32.
        q_weight, k_weight: (heads * d,).
        cos, sin: (B or 1, heads, T, d / 2), fp16, bf16 or fp32; with `rows` (N, ceil(heads * d / 2 / axes)): of three axes
            quickest as `RotaryTables.side_by_side` has them, which the CUDA kernel for fp32 tables else makes of them in
            every call; of one axis each dense.
        eps: added to the mean square.
        layout: "split" (LTX-2.3) or "interleaved".
        rows: int32 (B or 1, axes, T): the row of cos and sin that a token has on each axis. Pair i of a token, counted over all
            heads, takes column `(i + lead) // axes` of its row on axis `(i + lead) % axes`; lead = -(heads * d / 2) mod axes.
        heads: how many, with `rows`.
        k_cos, k_sin, k_rows: tables of k where they are not those of q, in the same form.
        out: pair of tensors; the first may be q, the second k.
    Returns:
        (q, k) rotated, shapes and dtypes as given.
    Raises:
        TypeError, ValueError: each names the parameter. A row that tables do not have is an error on a CPU; on other devices
            NaN comes into its token.

    Contract: rounded; fp32 arithmetic, one rounding. Tables by row of one or three axes in fp32 give the bits
        of the same numbers by token.
    Bytes: read and write q and k, read the tables. Of bf16 q and k as long as the tables, fp32 tables by token are half as
        much again; by row they are 0.6 MB for any length at (16, 34, 60) coordinates.
    Source: Su et al. 2021 (RoPE); the LTX-2 attention.
    """
    args = Arguments(q, k, q_weight, k_weight, cos, sin, eps, layout, rows, heads, k_cos, k_sin, k_rows)
    if out is None and (known := OP.again(args)) is not None:
        return known
    if check_tensor("q", q, dtypes=ACTIVATION_DTYPES, arrays=True):
        return through_torch(qk_norm_rope, locals())
    if q.dim() != 3:
        raise ValueError(f"q must be (B, T, heads * d), got shape {tuple(q.shape)}")
    inner = q.shape[2]
    if k_cos is None:
        _check_without_k_tables(q, k, k_sin, k_rows)
    else:
        _check_k(q, k)
        check_together("k_cos", k_cos, "k_sin", k_sin)
        if (rows is None) != (k_rows is None):
            check_together("rows", rows, "k_rows", k_rows)
    check_vector("q_weight", q_weight, inner, q.device)
    check_vector("k_weight", k_weight, inner, q.device)
    if heads is not None or rows is not None:
        heads = _check_heads(heads, rows, cos, inner)
    _check_tables(NAMES, q, cos, sin, rows, heads)
    if k_cos is not None and k_sin is not None:
        _check_tables(K_NAMES, k, k_cos, k_sin, k_rows, cos.shape[1] if heads is None else heads)
        _check_alike(cos, rows, k_cos, k_rows)
    check_choice("layout", layout, LAYOUTS)
    check_finite_number("eps", eps, low=0.0)
    if out is not None:
        check_pair(out)
        check_out(out[0], q.shape, q.dtype, q.device, "out[0]")
        check_out(out[1], k.shape, k.dtype, k.device, "out[1]")
    return OP(Arguments(q, k, q_weight, k_weight, cos, sin, eps, layout, rows, heads, k_cos, k_sin, k_rows), out)


def _check_k(q: Tensor, k: Tensor) -> None:
    """k is q but for its tokens."""
    check_tensor("k", k, dtypes=(q.dtype,))
    check_device("k", k, q.device)
    if k.dim() != 3 or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have shape ({q.shape[0]}, L, {q.shape[2]}), got {tuple(k.shape)}")


def _check_without_k_tables(q: Tensor, k: Tensor, k_sin: Tensor | None, k_rows: Tensor | None) -> None:
    """k has the tables of q, and so its tokens."""
    if k_sin is not None or k_rows is not None:
        check_together("k_cos", None, "k_sin" if k_rows is None else "k_rows", 0)
    try:
        check_like("k", k, q)
    except ValueError as error:
        own = k.dim() == 3 and (k.shape[0], k.shape[2]) == (q.shape[0], q.shape[2]) and k.shape[1] != q.shape[1]
        raise ValueError(f"{error}: give tables of its own tokens, k_cos and k_sin") from None if own else error


def _check_heads(heads: int | None, rows: Tensor | None, cos: Tensor, inner: int) -> int | None:
    """Heads are given with rows, and are those of tables by token otherwise; the number to hand on."""
    if rows is None:
        if heads is not None and isinstance(cos, Tensor) and cos.dim() == 4 and heads != cos.shape[1]:
            raise ValueError(f"heads must be {cos.shape[1]}, that of cos, got {heads}: leave it out without rows")
        return None
    if heads is None:
        raise ValueError("heads must be given with rows, got None: tables by row do not say how many there are")
    check_integer("heads", heads, 1)
    if inner % (2 * heads):
        raise ValueError(f"heads must divide q's {inner} into heads of even width, got {heads}")
    return heads


def _check_tables(
    names: tuple[str, str, str], x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, heads: int | None
) -> None:
    """Tables of x's tokens; those by token have these heads where they are known."""
    batch, tokens, inner = x.shape
    name, sin_name, rows_name = names
    check_tensor(name, cos, dtypes=ACTIVATION_DTYPES)
    if rows is None:
        fits = (
            cos.dim() == 4
            and cos.shape[0] in (1, batch)
            and cos.shape[2] == tokens
            and 2 * cos.shape[1] * cos.shape[3] == inner
            and heads in (None, cos.shape[1])
        )
        if not fits:
            raise ValueError(
                f"{name} must be (1 or {batch}, {'heads' if heads is None else heads}, {tokens}, d/2) "
                f"with heads * d = {inner}, got {tuple(cos.shape)}"
            )
    else:
        check_tensor(rows_name, rows, dtypes=(torch.int32,))
        if rows.dim() != 3 or rows.shape[0] not in (1, batch) or rows.shape[1] < 1 or rows.shape[2] != tokens:
            raise ValueError(f"{rows_name} must be (1 or {batch}, axes, {tokens}), got {tuple(rows.shape)}")
        check_device(rows_name, rows, x.device)
        columns = -(-inner // (2 * rows.shape[1]))
        if cos.dim() != 2 or cos.shape[1] != columns:
            raise ValueError(
                f"{name} must be (N, {columns}) with {rows_name} of {rows.shape[1]} axes, got {tuple(cos.shape)}"
            )
    check_device(name, cos, x.device)
    check_like(sin_name, sin, cos)


def _check_alike(cos: Tensor, rows: Tensor | None, k_cos: Tensor, k_rows: Tensor | None) -> None:
    """Tables of q and of k are of one dtype and as many axes."""
    if k_cos.dtype != cos.dtype:
        raise TypeError(f"k_cos must be {cos.dtype} as cos, got {k_cos.dtype}: use k_cos.to({cos.dtype})")
    if rows is not None and k_rows is not None and rows.shape[1] != k_rows.shape[1]:
        raise ValueError(f"k_rows must have {rows.shape[1]} axes as rows, got {k_rows.shape[1]}")
