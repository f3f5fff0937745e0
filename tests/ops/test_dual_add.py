"""dual_add: bit-equal to two adds, in place, layouts, calls around it, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from tests.ops.contract import (
    SAMPLER,
    assert_as_close,
    assert_gradients,
    assert_same,
    misaligned,
    noise,
    poisoned,
    strided,
    transposed,
)
from tests.serving import over_backends, serving

# Spans of the CPU kernel, packs of the device kernels, and what is left over beside them.
SHAPES = [(1,), (3, 5), (8, 16), (127, 67), (2, 4099), (3, 4096), (), (2, 3, 5, 8)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A weight and two deltas of about a twentieth of it."""
    return (
        noise(*shape, dtype=dtype),
        noise(*shape, dtype=dtype, seed=1, scale=0.05),
        noise(*shape, dtype=dtype, seed=2, scale=0.1),
    )


@over_backends("dual_add")
@pytest.mark.parametrize("dtype", SAMPLER, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_two_adds(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, first, second = drawn(shape, dtype)
    with serving(backend):
        sums = ltxkern.dual_add(x, first, second)
    assert_same(sums, (x + first, x + second))
    for actual, addend in zip(sums, (first, second), strict=True):
        assert_as_close(actual, x + addend, x.double() + addend.double())


@over_backends("dual_add")
@pytest.mark.parametrize("dtype", SAMPLER, ids=str)
@pytest.mark.parametrize("place", range(5))
def test_out_of_a_misaligned_tensor(backend: str, dtype: torch.dtype, place: int) -> None:
    given = [*drawn((64, 72), dtype), poisoned(noise(64, 72, dtype=dtype)), poisoned(noise(64, 72, dtype=dtype))]
    x, first, second = given[:3]
    given[place] = misaligned(given[place])
    with serving(backend):
        ltxkern.dual_add(*given[:3], out=(given[3], given[4]))
    assert_same(given[3:], (x + first, x + second))


@over_backends("dual_add")
def test_layouts(backend: str) -> None:
    x, first, second = drawn((2, 9, 6), torch.bfloat16)
    expected = x + first, x + second
    with serving(backend):
        for view in (strided, transposed):
            assert_same(ltxkern.dual_add(view(x), view(first), second), expected)
            out = view(poisoned(x)), view(poisoned(x))
            ltxkern.dual_add(x, first, second, out=out)
            assert_same([value.contiguous() for value in out], expected)
        # A row chunk of a weight, in place, with a neighbour that stays as it is.
        weight, other = x.clone(), poisoned(x)
        ltxkern.dual_add(weight[1:], first[1:], second[1:], out=(weight[1:], other[1:]))
        assert_same((weight[1:], other[1:]), (expected[0][1:], expected[1][1:]))
        assert_same(weight[:1], x[:1])
        assert bool(other[:1].isnan().all())


@over_backends("dual_add")
@pytest.mark.parametrize("dtype", SAMPLER, ids=str)
def test_ends_of_the_range(backend: str, dtype: torch.dtype) -> None:
    """Overflow, infinities, NaN, denormals, ties, signed zeros: as torch has them."""
    limits = torch.finfo(dtype)
    values = [
        0.0,
        -0.0,
        limits.max,
        -limits.max,
        limits.tiny,
        limits.smallest_normal / 4,
        torch.inf,
        -torch.inf,
        torch.nan,
    ]
    ends = torch.tensor([*values, 1.0, 1.0 + limits.eps, limits.eps / 2, 1.5 * limits.eps], dtype=dtype)
    x, first = (value.flatten().contiguous() for value in torch.meshgrid(ends, ends, indexing="ij"))
    with serving(backend):
        sums = ltxkern.dual_add(x, first, -first)
    assert_same(sums, (x + first, x - first))
    for actual, expected in zip(sums, (x + first, x - first), strict=True):
        assert_same(torch.signbit(actual[~actual.isnan()]), torch.signbit(expected[~expected.isnan()]))


@over_backends("dual_add")
@pytest.mark.parametrize("dtype", SAMPLER, ids=str)
def test_sums_past_the_caches(backend: str, dtype: torch.dtype) -> None:
    """More bytes than a last-level cache that counts: the CPU kernel then writes the sums that are not x past it."""
    rows = (33 << 20) // 5 // 1000 // dtype.itemsize
    x, first, second = (noise(1, 1000, dtype=dtype, seed=seed).repeat(rows, 1) for seed in range(3))
    first += torch.arange(rows, dtype=dtype)[:, None] / rows
    expected = x + first, x + second
    with serving(backend):
        assert_same(ltxkern.dual_add(x, first, second), expected)
        out = poisoned(x)
        ltxkern.dual_add(x, first, second, out=(out, x))
        assert_same((out, x), expected)


@over_backends("dual_add")
def test_gradients(backend: str) -> None:
    given = drawn((3, 5), torch.float32)
    with serving(backend):
        assert_gradients(ltxkern.dual_add, lambda x, *more: [x + each for each in more], *given, near=1e-6)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
        ({"x": torch.zeros(2, 3).long()}, TypeError, "x must be one of .* got torch.int64"),
        ({"first": torch.zeros(3)}, ValueError, r"first must have shape \(2, 3\), got \(3,\)"),
        ({"second": torch.zeros(2, 3).half()}, TypeError, "second must be torch.float32, got torch.float16"),
        ({"second": torch.zeros(2, 3, device="meta")}, ValueError, "second must be on cpu, got meta"),
        ({"out": (torch.zeros(2, 3), torch.zeros(2))}, ValueError, r"out\[1\] must have shape \(2, 3\)"),
        ({"out": (torch.zeros(2, 3).double(), torch.zeros(2, 3))}, TypeError, r"out\[0\] must be torch.float32"),
        ({"out": (torch.zeros(2, 3),)}, ValueError, "out must be a pair of tensors, got 1 of them"),
    ],
)
def test_errors(given: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"x": torch.zeros(2, 3), "first": torch.zeros(2, 3), "second": torch.zeros(2, 3), **given}
    with pytest.raises(error, match=words):
        ltxkern.dual_add(**arguments)
