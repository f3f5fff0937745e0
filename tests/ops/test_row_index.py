"""A row index into modulation tables: the bits of the materialised form in each op that takes one, contract, layouts, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from tests.ops.contract import (
    ACTIVATIONS,
    assert_as_close,
    assert_gradients,
    assert_same,
    compiled,
    noise,
    poisoned,
    strided,
    transposed,
)
from tests.serving import over_backends, serving

Tensors = dict[str, Tensor]
OPS: dict[str, Callable[..., Any]] = {
    "norm": lambda t, **more: ltxkern.rms_norm_modulate(t["x"], t["scale"], t["shift"], **more),
    "gated_norm": lambda t, **more: ltxkern.gated_residual_rms_norm_modulate(
        *(t[name] for name in ("x", "y", "gate", "scale", "shift")), **more
    ),
    "norms": lambda t, **more: ltxkern.gated_residual_rms_norm_modulate_twice(
        *(t[name] for name in ("x", "y", "gate", "scale", "shift", "shift", "scale")), **more
    ),
    "residual": lambda t, **more: ltxkern.gated_residual(t["x"], t["y"], t["gate"], **more),
}
over_ops = pytest.mark.parametrize("op", OPS)
TABLES = ("scale", "shift", "gate")
SHAPES = [
    (1, 6, 8),
    (2, 7, 13),
    (3, 1, 1),
    (5, 64),
    (1, 127, 40),
    (2, 3, 4, 16),
    (1, 3, 1040),
    (2, 3, 1024),
    (2, 519),
    (16,),
]


def drawn_tables(count: int, width: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Three tables as they come out of one sum: their rows lie three rows apart."""
    sums = 0.5 * noise(count, 3, width, dtype=dtype, seed=7)
    return dict(zip(TABLES, sums.unbind(-2), strict=True))


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, count: int = 3) -> Tensors:
    activations = {name: noise(*shape, dtype=dtype, seed=seed) for seed, name in enumerate("xy")}
    return activations | drawn_tables(count, shape[-1], dtype)


def materialised(tensors: Tensors, rows: Tensor) -> Tensors:
    """The tables with one row for each row of x."""
    return {name: value[rows.long()] if name in TABLES else value for name, value in tensors.items()}


def indices(kind: str, lead: tuple[int, ...], count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Row indices (lead) below count: any order, one for all, two runs, and tensors that do not lie densely."""
    size = torch.Size(lead).numel()
    mixed = (noise(size, seed=9) * 1000).to(dtype).remainder(count)
    if kind == "constant":
        return torch.full(lead, count - 1, dtype=dtype)
    if kind == "runs":
        return torch.arange(size).ge(size // 3).to(dtype).clamp_max(count - 1).reshape(lead)
    if kind == "strided":
        return torch.stack([mixed, mixed + count], dim=-1)[:, 0].reshape(lead)
    if kind == "part":
        wider = (noise(*lead[:-1], lead[-1] + 3, seed=9) * 1000).to(dtype).remainder(count)
        return wider[..., 1:-2]
    if kind == "expanded":
        return mixed[: lead[-1]].expand(lead) if lead else mixed[0]
    return mixed.reshape(lead)


@over_backends("rms_norm_modulate")
@over_ops
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_materialised_form(backend: str, op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors, rows = drawn(shape, dtype), indices("mixed", shape[:-1], 3)
    with serving(backend):
        assert_same(OPS[op](tensors, rows=rows), OPS[op](materialised(tensors, rows)))


@over_backends("rms_norm_modulate")
@over_ops
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", ["mixed", "constant", "runs", "strided", "part", "expanded"])
def test_any_index(backend: str, op: str, kind: str, index: torch.dtype) -> None:
    """Tables wider than x among them, and of one row."""
    for count in (1, 2, 5):
        tensors = drawn((2, 9, 24), torch.bfloat16, count) | drawn_tables(count, 24)
        rows = indices(kind, (2, 9), count, index)
        with serving(backend):
            assert_same(OPS[op](tensors, rows=rows), OPS[op](materialised(tensors, rows)))


@over_backends("rms_norm_modulate")
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_contract(backend: str, dtype: torch.dtype) -> None:
    tensors, rows = drawn((2, 37, 40), dtype), indices("mixed", (2, 37), 3)

    def gated(x: Tensor, y: Tensor, gate: Tensor, **_: Tensor) -> Tensor:
        return x + y * gate

    def norm(x: Tensor, scale: Tensor, shift: Tensor, **_: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + scale) + shift

    with serving(backend):
        plain, residual = OPS["norm"](tensors, rows=rows), OPS["residual"](tensors, rows=rows)
        summed, normed = OPS["gated_norm"](tensors, rows=rows, weight=torch.ones(40, dtype=dtype))
    given = materialised(tensors, rows)
    exact = {name: value.double() for name, value in given.items()}
    assert_as_close(plain, norm(**given), norm(**exact))
    assert_as_close(residual, gated(**given), gated(**exact))
    assert_same(summed, residual)
    after = [{**values, "x": summed.to(values["x"].dtype)} for values in (given, exact)]
    assert_as_close(normed, norm(**after[0]), norm(**after[1]))


@over_backends("rms_norm_modulate")
@over_ops
@pytest.mark.parametrize("view", [strided, transposed])
def test_layouts(backend: str, op: str, view: Callable[[Tensor], Tensor]) -> None:
    """Activations, tables and an index that do not lie densely; leading dims that do not collapse."""
    tensors = drawn((2, 3, 4, 6))
    rows = indices("mixed", (4, 3, 2), 3).permute(2, 1, 0)
    views = {name: view(value) for name, value in tensors.items()}
    with serving(backend):
        assert_same(OPS[op](views, rows=rows), OPS[op](materialised(views, rows)))


@over_backends("rms_norm_modulate")
@over_ops
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("first", "pitch"), [(1, 528), (0, 521), (8, 529)])
def test_tables_at_any_address(backend: str, op: str, dtype: torch.dtype, first: int, pitch: int) -> None:
    """Rows of tables that no access of 16 bytes meets, beside a fresh copy of them that it does."""
    tensors, rows = drawn((40, 520), dtype), indices("mixed", (40,), 3)
    for seed, name in enumerate(TABLES):
        whole = noise(first + 3 * pitch, dtype=dtype, seed=seed)
        tensors[name] = whole[first:].view(3, pitch)[:, :520]
    with serving(backend):
        assert_same(OPS[op](tensors, rows=rows), OPS[op](materialised(tensors, rows)))


@over_backends("rms_norm_modulate")
@over_ops
def test_gradients(backend: str, op: str) -> None:
    """Those of the materialised form, summed over the rows of x that take a row of a table."""
    tensors, rows = drawn((2, 9, 6)), indices("mixed", (2, 9), 3)

    def indexed(*given: Tensor) -> Any:
        return OPS[op](dict(zip(tensors, given, strict=True)), rows=rows)

    def in_full(*given: Tensor) -> Any:
        return OPS[op](materialised(dict(zip(tensors, given, strict=True)), rows))

    with serving(backend):
        assert_gradients(indexed, in_full, *tensors.values())


def nan_where_out_of_range(op: str, dtype: torch.dtype, width: int, index: torch.dtype) -> None:
    """A device cannot refuse a row: nothing outside the tables is read for it, and the other rows are as they were."""
    tensors = drawn((2, 5, width), dtype, count=2)
    ends = torch.iinfo(index)
    rows = torch.tensor([[0, 1, -1, 0, 2], [ends.max, 1, 1, ends.min, 0]], dtype=index)
    good = (rows >= 0) & (rows < 2)
    results, expected = OPS[op](tensors, rows=rows), OPS[op](tensors, rows=rows * good)
    for one, other in zip(*(([x] if isinstance(x, Tensor) else x) for x in (results, expected)), strict=True):
        assert torch.equal(one[good], other[good])
        assert bool(one[~good].isnan().all())


def wrong_calls() -> list[tuple[dict[str, Any], type[Exception], str]]:
    rows = torch.zeros(2, 3, dtype=torch.int64)
    return [
        ({"rows": [[0, 1, 0], [0, 1, 0]]}, TypeError, r"rows must be a torch\.Tensor, got list"),
        ({"rows": rows.float()}, TypeError, r"rows must be one of torch\.int32, torch\.int64, got torch\.float32: use"),
        ({"rows": rows.bool()}, TypeError, r"rows must be one of .* got torch\.bool: use rows\.to\(torch\.int64\)"),
        ({"rows": rows.to("meta")}, ValueError, r"rows must be on cpu, got meta"),
        ({"rows": rows[..., None]}, ValueError, r"rows must have shape \(2, 3\), got \(2, 3, 1\)"),
        ({"rows": rows[:1]}, ValueError, r"rows must have shape \(2, 3\), got \(1, 3\)"),
        ({"gate": torch.zeros(4)}, ValueError, r"gate must have shape \(N, 4\) with rows, got \(4,\)"),
        ({"gate": torch.zeros(2, 1)}, ValueError, r"gate must have shape \(N, 4\) with rows, got \(2, 1\)"),
        ({"gate": torch.zeros(1, 2, 4)}, ValueError, r"gate must have shape \(N, 4\) with rows, got \(1, 2, 4\)"),
        ({"gate": torch.zeros(2, 4).double()}, TypeError, r"gate must be one of .* got torch\.float64"),
        ({"gate": torch.zeros(2, 4, device="meta")}, ValueError, r"gate must be on cpu, got meta"),
    ]


@pytest.mark.parametrize(("given", "error", "words"), wrong_calls())
def test_errors(given: dict[str, Any], error: type[Exception], words: str) -> None:
    tensors = drawn((2, 3, 4), count=2)
    for name, op in (("gate", "residual"), ("scale", "norm"), ("shift", "norm"), ("gate", "gated_norm")):
        changed = {**tensors, name: given["gate"]} if "gate" in given else tensors
        with pytest.raises(error, match="^" + words.replace("gate", name)):
            OPS[op](changed, rows=given.get("rows", torch.zeros(2, 3, dtype=torch.int32)))


def test_tables_of_different_length_are_an_error() -> None:
    tensors = drawn((2, 3, 4), count=2)
    rows = torch.zeros(2, 3, dtype=torch.int64)
    for name in ("shift", "gate"):
        with pytest.raises(ValueError, match=rf"^{name} must have as many rows as scale, 2, got \(3, 4\)"):
            OPS["gated_norm"]({**tensors, name: torch.zeros(3, 4)}, rows=rows)
    one = torch.zeros(())
    with pytest.raises(ValueError, match=r"^x must have at least 1 dimensions with rows, got shape \(\)"):
        ltxkern.gated_residual(one, one, torch.zeros(2, 1), rows=one.long())


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@over_ops
@pytest.mark.parametrize("wrong", [-1, 2, 1 << 40])
def test_a_wrong_index_on_the_host_is_refused_before_anything_is_written(backend: str, op: str, wrong: int) -> None:
    tensors = drawn((2, 3, 4), count=2)
    rows = torch.zeros(2, 3, dtype=torch.int64)
    rows[1, 1] = wrong
    kept = tensors["x"].clone()
    outs = {"gated_norm": 1, "norms": 2}.get(op)
    out = (tensors["x"], *(poisoned(kept) for _ in range(outs))) if outs else tensors["x"]
    with serving(backend), pytest.raises(ValueError, match=rf"^rows must be at least 0 and below 2, .* got {wrong}$"):
        OPS[op](tensors, rows=rows, out=out)
    assert torch.equal(tensors["x"], kept)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_wrong_index_is_refused_in_a_compiled_caller(backend: str) -> None:
    table, rows = noise(3, 4), torch.tensor([0, 3])
    function = compiled(lambda x, rows: ltxkern.rms_norm_modulate(x, table, table, rows=rows))
    with serving(backend), pytest.raises(ValueError, match=r"^rows must be at least 0 and below 3, .* got 3$"):
        function(noise(2, 4, seed=1), rows)
