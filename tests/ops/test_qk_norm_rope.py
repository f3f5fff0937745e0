"""qk_norm_rope: both layouts against fp64, tables by token and by row, of q and of k, calls around it, errors."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern.ops.qk_norm_rope import RotaryTables
from tests.ops.contract import ACTIVATIONS, assert_as_close, assert_gradients, assert_same, noise
from tests.serving import over_backends, serving

# batch, tokens, heads, head dim
SIZES = [
    (1, 6, 2, 8),
    (2, 7, 3, 2),
    (1, 1, 1, 4),
    (3, 13, 4, 6),
    (1, 61, 2, 16),
    (2, 3, 9, 128),
    (1, 2, 7, 58),
    (2, 3, 4, 256),
]
LAYOUTS = pytest.mark.parametrize("layout", ["split", "interleaved"])


def inputs(size: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, shared: bool = False) -> list[Tensor]:
    batch, tokens, heads, dim = size
    q, k = (noise(batch, tokens, heads * dim, dtype=dtype, seed=seed) for seed in (0, 1))
    weights = [1 + 0.3 * noise(heads * dim, dtype=dtype, seed=seed) for seed in (2, 3)]
    angles = 3 * noise(1 if shared else batch, heads, tokens, dim // 2, dtype=torch.float64, seed=4)
    return [q, k, *weights, angles.cos().to(dtype), angles.sin().to(dtype)]


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Each pair of numbers as a complex one, multiplied by cos + i sin."""
    heads = x.unflatten(-1, (cos.shape[1], -1))
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    half = heads.shape[-1] // 2
    first = heads[..., :half] if layout == "split" else heads[..., 0::2]
    second = heads[..., half:] if layout == "split" else heads[..., 1::2]
    out = torch.empty_like(heads)
    if layout == "split":
        out[..., :half], out[..., half:] = first * cos - second * sin, first * sin + second * cos
    else:
        out[..., 0::2], out[..., 1::2] = first * cos - second * sin, first * sin + second * cos
    return out.flatten(-2)


def composition(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, layout: str, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Eager torch in the given dtype."""
    return (
        rotated(normed(q, q_weight, eps), cos, sin, layout),
        rotated(normed(k, k_weight, eps), cos, sin, layout),
    )


@over_backends("qk_norm_rope")
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@LAYOUTS
@pytest.mark.parametrize("shared", [False, True], ids=["tables", "shared"])
def test_contract(backend: str, dtype: torch.dtype, size: tuple[int, int, int, int], layout: str, shared: bool) -> None:
    given = inputs(size, dtype, shared)
    with serving(backend):
        out = ltxkern.qk_norm_rope(*given, layout=layout)
    exact = composition(*(value.double() for value in given), layout)
    for ours, theirs, double in zip(out, composition(*given, layout), exact, strict=True):
        assert_as_close(ours, theirs, double)


# batch, tokens of q and of k, heads, head dim, axes: pairs that the axes divide, and that they do not; rows of whole warps last.
BY_ROW = [
    (1, 6, 4, 2, 6, 3),
    (2, 7, 7, 4, 8, 3),
    (2, 3, 5, 3, 2, 2),
    (2, 1, 9, 5, 4, 1),
    (1, 4, 2, 2, 10, 4),
    (2, 3, 17, 32, 32, 3),
    (2, 5, 3, 16, 64, 3),
    (1, 3, 4, 16, 64, 1),
]


def by_row(batch: int, tokens: int, heads: int, dim: int, axes: int, dtype: torch.dtype, seed: int) -> RotaryTables:
    """Tables of four rows for each axis, and tokens that take them in no order."""
    angles = 3 * noise(4 * axes, -(-heads * dim // (2 * axes)), dtype=torch.float64, seed=seed)
    places = (1000 * noise(batch, axes, tokens, seed=seed + 1)).int().remainder(4)
    rows = places + 4 * torch.arange(axes, dtype=torch.int32)[:, None]
    return RotaryTables(angles.cos().to(dtype), angles.sin().to(dtype), rows)


def odd(tables: RotaryTables) -> RotaryTables:
    """Side by side, but from an odd element of their memory on."""
    both = torch.stack((tables.cos, tables.sin), dim=-1)
    cos, sin = torch.cat([both.new_zeros(1), both.flatten()])[1:].view_as(both).unbind(-1)
    return RotaryTables(cos, sin, tables.rows)


@over_backends("qk_norm_rope")
@pytest.mark.parametrize("size", BY_ROW, ids=str)
@LAYOUTS
def test_tables_by_row_give_the_bits_of_tables_by_token(backend: str, size: tuple[int, ...], layout: str) -> None:
    batch, q_tokens, k_tokens, heads, dim, axes = size
    for dtype, table_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2):
        q, k = (noise(batch, n, heads * dim, dtype=dtype, seed=n) for n in (q_tokens, k_tokens))
        weights = [noise(heads * dim, dtype=dtype, seed=seed) for seed in (2, 3)]
        of_q = by_row(batch, q_tokens, heads, dim, axes, table_dtype, 4)
        of_k = by_row(1, k_tokens, heads, dim, axes, table_dtype, 6)
        cos, sin, k_cos, k_sin = (
            table.contiguous() for tables in (of_q, of_k) for table in tables.by_token(heads, dim // 2)
        )
        with serving(backend):
            ours, *others = (
                ltxkern.qk_norm_rope(
                    *(q, k, *weights, one.cos, one.sin),
                    **{"rows": one.rows, "heads": heads, "layout": layout},
                    **{"k_cos": other.cos, "k_sin": other.sin, "k_rows": other.rows},
                )
                for one, other in (
                    (of_q, of_k),
                    (of_q.side_by_side(), of_k.side_by_side()),
                    (of_q, of_k.side_by_side()),
                    (odd(of_q), odd(of_k)),
                )
            )
            by_token = ltxkern.qk_norm_rope(q, k, *weights, cos, sin, k_cos=k_cos, k_sin=k_sin, layout=layout)
            alone = [
                ltxkern.qk_norm_rope(x, x, weight, weight, *tables, layout=layout)[0]
                for x, weight, tables in zip((q, k), weights, ((cos, sin), (k_cos, k_sin)), strict=True)
            ]
        assert_same(by_token, alone)
        for one in others if axes > 1 else ():
            assert_same(one, ours)
        # Narrow tables by row have no kernel of their own: where that of tables by token sums otherwise, a rounding may differ.
        near = {"rtol": 0, "atol": 0} if table_dtype == torch.float32 else {}
        torch.testing.assert_close(ours, by_token, **near)


@over_backends("qk_norm_rope")
def test_no_keys(backend: str) -> None:
    """Queries alone, where the keys have no token."""
    q, k, *weights, cos, sin = inputs((2, 7, 3, 4))
    with serving(backend):
        both, _ = ltxkern.qk_norm_rope(q, k, *weights, cos, sin)
        alone, none = ltxkern.qk_norm_rope(q, k[:, :0], *weights, cos, sin, k_cos=cos[:, :, :0], k_sin=sin[:, :, :0])
    assert torch.equal(alone, both)
    assert none.shape == (2, 0, 12)


@over_backends("qk_norm_rope")
@LAYOUTS
def test_fp32_tables_on_bf16_states(backend: str, layout: str) -> None:
    q, k, *weights, cos, sin = inputs((2, 7, 3, 4))
    given = [q.bfloat16(), k.bfloat16(), *(weight.bfloat16() for weight in weights), cos, sin]
    with serving(backend):
        out = ltxkern.qk_norm_rope(*given, layout=layout)
    exact = composition(*(value.double() for value in given), layout)
    for ours, double in zip(out, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert_as_close(ours, double.bfloat16(), double)


@over_backends("qk_norm_rope")
@LAYOUTS
def test_the_norm_of_each_pair_is_kept(backend: str, layout: str) -> None:
    q, k, _, _, cos, sin = inputs((2, 7, 3, 4))
    ones = torch.ones(12)
    with serving(backend):
        out, _ = ltxkern.qk_norm_rope(q, k, ones, ones, cos, sin, layout=layout, eps=0.0)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(2, 7), atol=1e-5, rtol=1e-5)


@over_backends("qk_norm_rope")
def test_no_rotation_is_the_norm(backend: str) -> None:
    q, k, q_weight, k_weight, cos, sin = inputs((2, 7, 3, 4))
    with serving(backend):
        out = ltxkern.qk_norm_rope(q, k, q_weight, k_weight, torch.ones_like(cos), torch.zeros_like(sin), eps=0.5)
    torch.testing.assert_close(out[0], normed(q, q_weight, 0.5), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out[1], normed(k, k_weight, 0.5), atol=1e-6, rtol=1e-6)


@over_backends("qk_norm_rope")
@LAYOUTS
def test_gradients(backend: str, layout: str) -> None:
    op = functools.partial(ltxkern.qk_norm_rope, layout=layout)
    with serving(backend):
        assert_gradients(op, functools.partial(composition, layout=layout), *inputs((2, 3, 2, 4)), near=1e-4)


@over_backends("qk_norm_rope")
def test_a_gradient_of_queries_alone(backend: str) -> None:
    q, *others = inputs((2, 3, 2, 4))
    q.requires_grad_()
    with serving(backend):
        out, _ = ltxkern.qk_norm_rope(q, *others)
        out.sum().backward()
    assert q.grad is not None
    assert float(q.grad.abs().sum()) > 0


def wrong_calls() -> list[tuple[dict[str, Any], type[Exception], str]]:
    tables = torch.zeros(2, 2, 3, 2)
    by_rows = {"cos": torch.zeros(5, 2), "sin": torch.zeros(5, 2), "rows": tables[:1, :, :, 0].int(), "heads": 2}
    return [
        ({"layout": "other"}, ValueError, 'layout must be "split" or "interleaved", got \'other\''),
        ({"q": torch.zeros(3, 8)}, ValueError, r"q must be \(B, T, heads \* d\), got shape \(3, 8\)"),
        ({"q": torch.zeros(2, 3, 8).double()}, TypeError, "q must be one of .* got torch.float64"),
        ({"k": torch.zeros(2, 4, 8)}, ValueError, r"k must have shape \(2, 3, 8\), got \(2, 4, 8\)"),
        ({"q_weight": torch.zeros(4)}, ValueError, r"q_weight must have shape \(8,\), got \(4,\)"),
        ({"k_weight": None}, TypeError, "k_weight must be a torch.Tensor, got NoneType"),
        ({"cos": tables[..., :1]}, ValueError, r"cos must be \(1 or 2, heads, 3, d/2\) with heads \* d = 8, got"),
        ({"cos": tables[0]}, ValueError, r"cos must be \(1 or 2, heads, 3, d/2\)"),
        ({"sin": tables[:1]}, ValueError, r"sin must have shape \(2, 2, 3, 2\), got \(1, 2, 3, 2\)"),
        ({"sin": tables.half()}, TypeError, "sin must be torch.float32, got torch.float16"),
        ({"out": (torch.zeros(2, 3, 8), torch.zeros(2, 3, 4))}, ValueError, r"out\[1\] must have shape \(2, 3, 8\)"),
        ({"k": torch.zeros(2, 4, 8)}, ValueError, r"got \(2, 4, 8\): give tables of its own tokens, k_cos and k_sin"),
        ({"heads": 4}, ValueError, "heads must be 2, that of cos, got 4: leave it out without rows"),
        ({"k_sin": tables}, ValueError, "k_cos and k_sin go together, got k_sin alone: give both or neither"),
        ({"k_cos": tables}, ValueError, "k_cos and k_sin go together, got k_cos alone: give both or neither"),
        ({"k_cos": tables[:, :1], "k_sin": tables}, ValueError, r"k_cos must be \(1 or 2, 2, 3, d/2\) with heads"),
        (
            {"k_cos": tables.half(), "k_sin": tables.half()},
            TypeError,
            "k_cos must be torch.float32 as cos, got torch.f",
        ),
        *((by_rows | wrong, error, words) for wrong, error, words in wrong_rows()),
    ]


def wrong_rows() -> list[tuple[dict[str, Any], type[Exception], str]]:
    """What is wrong in a call with tables by row."""
    rows, own = torch.zeros(1, 2, 3, dtype=torch.int32), {"k_cos": torch.zeros(5, 2), "k_sin": torch.zeros(5, 2)}
    return [
        ({"heads": None}, ValueError, "heads must be given with rows, got None"),
        ({"heads": 3}, ValueError, "heads must divide q's 8 into heads of even width, got 3"),
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0: use 1"),
        ({"rows": rows.long()}, TypeError, r"rows must be torch.int32, got torch.int64: use rows.to\(torch.int32\)"),
        ({"rows": rows[..., :2]}, ValueError, r"rows must be \(1 or 2, axes, 3\), got \(1, 2, 2\)"),
        ({"rows": rows[:, :1]}, ValueError, r"cos must be \(N, 4\) with rows of 1 axes, got \(5, 2\)"),
        (own, ValueError, "rows and k_rows go together, got rows alone: give both or neither"),
        ({"k_rows": rows}, ValueError, "k_cos and k_rows go together, got k_rows alone: give both or neither"),
        (
            {"k_cos": torch.zeros(5, 4), "k_sin": torch.zeros(5, 4), "k_rows": rows[:, :1]},
            *(ValueError, "k_rows must have 2 axes as rows, got 1"),
        ),
    ]


@pytest.mark.parametrize(("given", "error", "words"), wrong_calls())
def test_errors(given: dict[str, Any], error: type[Exception], words: str) -> None:
    names = ("q", "k", "q_weight", "k_weight", "cos", "sin")
    sizes = ((2, 3, 8), (2, 3, 8), (8,), (8,), (2, 2, 3, 2), (2, 2, 3, 2))
    arguments = {name: torch.zeros(size) for name, size in zip(names, sizes, strict=True)}
    with pytest.raises(error, match=words):
        ltxkern.qk_norm_rope(**{**arguments, **given})


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", ["rows", "k_rows"])
@pytest.mark.parametrize("wrong", [-1, 12])
def test_a_wrong_row_on_the_host_is_refused(backend: str, name: str, wrong: int) -> None:
    x, weight = noise(2, 5, 24), torch.ones(24)
    cos, sin, rows = by_row(2, 5, 2, 12, 3, torch.float32, 0)
    given = {"rows": rows, "k_rows": rows.clone()}
    given[name][1, 2, 3] = wrong
    with (
        serving(backend),
        pytest.raises(ValueError, match=rf"^{name} must be at least 0 and below 12, .* got {wrong}$"),
    ):
        ltxkern.qk_norm_rope(x, x, weight, weight, cos, sin, heads=2, k_cos=cos, k_sin=sin, **given)
